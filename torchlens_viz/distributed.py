"""Work that is shared among the processes of a torchrun, and brought together again."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, TypeVar

import torch.distributed as dist

from torchlens_viz.errors import DistributedError, in_one_line, kind_of, message_of, reason_of

T = TypeVar("T")

_PATIENCE: Final = datetime.timedelta(
    hours=24
)  # a share may take long; a process that dies is noticed at once


def world() -> tuple[int, int]:
    """Return this process's rank and how many there are; (0, 1) without torch.distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


@contextlib.contextmanager
def joined() -> Iterator[int]:
    """Join the processes of the torchrun that started this one, if one did; give this process's rank."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not dist.is_available() or dist.is_initialized():
        yield world()[0]
        return
    dist.init_process_group("gloo")
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


def gathered(work: Callable[[], Sequence[T]]) -> list[T]:
    """Do this process's share of the work and return what all of them made, in the order of their ranks.

    Args:
        work: Makes this process's share; the parts must be picklable.

    Raises:
        DistributedError: Another process failed or died.
    """
    count = world()[1]
    if count == 1:
        return list(work())
    failure: BaseException | None = None
    try:
        if dist.get_backend() == "gloo":
            dist.barrier()  # notices at once who is dead already, for whom the next call would wait
        group: Any = dist.new_group(backend="gloo", timeout=_PATIENCE)
    except RuntimeError as error:
        raise DistributedError(
            "another process of this run died before its share began "
            f"({reason_of(error)}); start the run again"
        ) from error
    mine: Sequence[T] = ()
    try:
        mine = work()
    except BaseException as error:
        failure = error
    told = None if failure is None else f"{kind_of(failure)}: {in_one_line(message_of(failure))}"
    shares: list[Any] = [None] * count
    try:
        dist.all_gather_object(shares, (list(mine), told), group=group)
    except RuntimeError as error:
        raise failure or DistributedError(
            "another process of this run died before its share was done "
            f"({reason_of(error)}); start the run again"
        ) from error
    finally:
        dist.destroy_process_group(group)
    if failure is not None:
        try:
            raise failure
        finally:
            failure = None  # an error that this frame holds would hold this frame, and all that it holds
    for other, (_, told) in enumerate(shares):
        if told is not None:
            raise DistributedError(f"process {other} failed, so that the result would be incomplete: {told}")
    return [part for share, _ in shares for part in share]
