"""A progress bar, for those who asked for one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from torchlens_viz.errors import MissingDependencyError

T = TypeVar("T")


def tracked(items: Iterable[T], *, shown: bool, total: int, unit: str) -> Iterator[T]:
    """Pass items on, with a bar on stderr that counts them where `shown`.

    Raises:
        MissingDependencyError: A bar was asked for and tqdm is not installed.
    """
    if not shown:
        return iter(items)
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise MissingDependencyError(
            "`progress=True` needs tqdm, which is not installed; run "
            '`python -m pip install "torchlens_viz[progress]"`'
        ) from error
    return iter(tqdm(items, total=total, unit=unit))
