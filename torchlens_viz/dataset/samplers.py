"""In which order a loader yields its inputs, and whether that is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from torchlens_viz.errors import InvalidArgumentError, InvalidTypeError

_SHUFFLING: Final = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


class UnknownOrder(NamedTuple):
    """A sampler of whole batches, whatever it does."""

    sampler: Any


def sampler_of(loader: Any) -> Any:
    """Return what names the inputs of a loader one by one; None where nothing does."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return None
    if loader.batch_sampler is None:
        return loader.sampler
    if type(loader.batch_sampler) is BatchSampler:
        return loader.batch_sampler.sampler
    return UnknownOrder(loader.batch_sampler)


def padding(sampler: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function that tells of places in the order of iteration whether they count here.

    A `DistributedSampler` makes the shares equal by giving some inputs to a second process.
    """
    if not isinstance(sampler, DistributedSampler) or sampler.drop_last:
        return lambda places: torch.ones_like(places, dtype=torch.bool)
    count, rank, processes = len(sampler.dataset), sampler.rank, sampler.num_replicas  # type: ignore[arg-type]
    return lambda places: places * processes + rank < count


def refuse_what_is_no_loader(loader: Any) -> None:
    """Raise `InvalidTypeError` for what yields single inputs, each of which would pass for a batch."""
    is_dataset = isinstance(loader, Dataset) and not isinstance(loader, IterableDataset)
    if isinstance(loader, torch.Tensor) or is_dataset:
        remedy = (
            "`x.split(64)`" if isinstance(loader, torch.Tensor) else "`DataLoader(dataset, batch_size=64)`"
        )
        raise InvalidTypeError(
            f"`loader` must yield batches, got a {type(loader).__name__}, which yields single inputs; pass "
            f"{remedy}"
        )


def refuse_loss_of_order(loader: Any) -> None:
    """Raise `InvalidArgumentError` for a loader whose workers hand out batches as they come."""
    if isinstance(loader, DataLoader) and loader.num_workers and not getattr(loader, "in_order", True):
        raise InvalidArgumentError(
            "`loader` must keep the order of its batches, got a DataLoader with `in_order=False`; leave that "
            "out, or pass `indices`, a function of a batch"
        )


def refuse_unknown_order(sampler: Any, *, shared: bool) -> None:
    """Raise `InvalidArgumentError` where the place of an input says nothing of its index.

    Args:
        sampler: As from `sampler_of`.
        shared: Whether other processes survey other inputs.
    """
    if shared and not isinstance(sampler, DistributedSampler):
        raise InvalidArgumentError(
            "`loader` must have a DistributedSampler where several processes survey together, or `indices` "
            "must say which inputs are this one's, or else each input would count once per process"
        )
    if isinstance(sampler, _SHUFFLING):
        raise InvalidArgumentError(
            f"`loader` must not shuffle, got one with a {type(sampler).__name__}: the index of an input "
            "would be lost; build it with `shuffle=False`, or pass `indices`"
        )
    is_known = sampler is None or isinstance(sampler, SequentialSampler | DistributedSampler | Sequence)
    if isinstance(sampler, UnknownOrder) or not is_known:
        kind = type(sampler.sampler if isinstance(sampler, UnknownOrder) else sampler).__name__
        raise InvalidArgumentError(
            f"`indices` must say which input comes when, for a loader with a {kind}, whose order is not known"
        )
