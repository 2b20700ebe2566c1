"""In which order a loader yields inputs, and how many in each batch, as far as that can be told."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice, repeat
from math import prod
from types import CellType, FunctionType, GeneratorType, MethodType
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves
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
    default_collate,
    default_convert,
)
from torch.utils.data.dataloader import _BaseDataLoaderIter

from torchlens_viz.arguments import shown
from torchlens_viz.errors import InvalidArgumentError, InvalidTypeError

_DEPTH: Final = 8  # how far to look for a DataLoader inside of something else
_MOST: Final = 1000  # and at how many objects
_CONTAINERS: Final = (list, tuple, Mapping)
_LINKS: Final = (FunctionType, MethodType, CellType, partial)
_VALUES: Final = (torch.Tensor, np.ndarray, int, float)
_PROBED: Final = 4096  # so many values of an item, or a few more, are compared with those in the batch
_DISTINCT: Final = 3  # so many different items tell that they were put into another order
_REORDERED: Final = (
    "`loader` must keep the order of the items in a batch, got one whose `collate_fn` changes it, so that "
    "which is which is lost; leave that out, or pass `indices`, a function of a batch"
)
_SHUFFLING: Final = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


class UnknownOrder(NamedTuple):
    """A sampler of whole batches, whatever it does."""

    sampler: Any


def loader_within(loader: Any) -> Any:
    """Return the DataLoader, or its iterator, that something else yields the batches of, as tqdm does.

    Where none is found, that is the thing itself.
    """
    seen: set[int] = set()
    around = [loader]
    for depth in range(_DEPTH):
        for each in around:
            if isinstance(each, DataLoader | _BaseDataLoaderIter):
                return each
        seen |= {id(each) for each in around}
        if len(seen) > _MOST:
            break
        inner = chain.from_iterable(_parts(each, is_outermost=depth == 0) for each in around)
        around = [part for part in inner if id(part) not in seen and _may_lead_on(part)]
    return loader


def _parts(thing: Any, *, is_outermost: bool) -> list[Any]:
    """Return what an object refers to, that of C such as `itertools.chain` included."""
    if is_outermost and isinstance(thing, _CONTAINERS):
        return []  # batches themselves
    if isinstance(thing, FunctionType):  # what it closes over, and not the module that it stands in
        return [*(thing.__closure__ or ()), *(thing.__defaults__ or ())]
    if isinstance(thing, GeneratorType):
        within = [] if thing.gi_frame is None else list(thing.gi_frame.f_locals.values())
        return [*within, *gc.get_referents(thing)]
    return list(islice(thing, _MOST)) if isinstance(thing, list | tuple) else gc.get_referents(thing)


def _may_lead_on(thing: Any) -> bool:
    if isinstance(thing, type | str | bytes | torch.Tensor | np.ndarray | Dataset | nn.Module):
        return False
    is_link = isinstance(thing, _LINKS) or type(thing).__module__ == "itertools"  # such as the data of a tee
    return is_link or hasattr(type(thing), "__iter__")


def refuse_hidden_order(batches: Any) -> None:
    """Raise `InvalidArgumentError` where a running iterator draws on a loader whose order is not known.

    Some loaders are made only once the first batch is wanted.
    """
    found = loader_within(batches)
    if isinstance(found, _BaseDataLoaderIter):
        refuse_loss_of_order(found)
        sampler = getattr(found._index_sampler, "sampler", found._index_sampler)
        if not isinstance(found._dataset, IterableDataset) and not is_in_turn(sampler):
            refuse_unknown_order(UnknownOrder(sampler), shared=False)


def batch_sizes(loader: Any) -> Iterator[int] | None:
    """Return how many inputs each batch of a loader must have; None where that cannot be told."""
    sampler = getattr(loader, "batch_sampler", getattr(loader, "_index_sampler", None))
    if type(sampler) is not BatchSampler:
        return None
    try:
        inputs = len(sampler.sampler)  # type: ignore[arg-type]
    except TypeError:
        return None
    size = sampler.batch_size
    rest = [] if sampler.drop_last or inputs % size == 0 else [inputs % size]
    return chain(repeat(size, inputs // size), rest)


def sampler_of(loader: Any) -> Any:
    """Return what names the inputs of a loader one by one; None where nothing does."""
    if isinstance(loader, _BaseDataLoaderIter):
        if isinstance(loader._dataset, IterableDataset):
            return None
        inner = getattr(loader._index_sampler, "sampler", loader._index_sampler)
        # What it has yielded is not heard of, and another sampler than this one may begin anew differently.
        is_fresh = loader._num_yielded == 0 and is_in_turn(inner)
        return inner if is_fresh else UnknownOrder(inner)
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return None
    if loader.batch_sampler is None:
        return loader.sampler
    if type(loader.batch_sampler) is BatchSampler:
        return loader.batch_sampler.sampler
    return UnknownOrder(loader.batch_sampler)


def is_in_turn(sampler: Any) -> bool:
    """Tell whether a sampler names one input after another: one of torch's, that nobody made otherwise."""
    return isinstance(sampler, SequentialSampler) and type(sampler).__iter__ is SequentialSampler.__iter__


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
    is_iterable = hasattr(type(loader), "__iter__") or hasattr(type(loader), "__getitem__")
    if not is_iterable or isinstance(loader, np.generic):  # a number of numpy's has both
        raise InvalidTypeError(
            f"`loader` must yield batches, got {shown(loader)}; pass a DataLoader or a list"
        )
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
    """Raise `InvalidArgumentError` for a loader whose workers make the order of the batches."""
    is_begun = isinstance(loader, _BaseDataLoaderIter)
    if not is_begun and not isinstance(loader, DataLoader):
        return
    source, workers, in_order = (
        (loader._dataset, loader._num_workers, getattr(loader, "_in_order", True))
        if is_begun
        else (loader.dataset, loader.num_workers, getattr(loader, "in_order", True))
    )
    if isinstance(source, IterableDataset) and workers > 1:
        raise InvalidArgumentError(
            f"`loader` must read an IterableDataset with one worker at most, got {workers}, which "
            "yield in turn what each of them reads, so that the place of an input says nothing of its index; "
            "pass `num_workers=1`, or `indices`, a function of a batch"
        )
    if workers and not in_order:
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
    is_known = sampler is None or is_in_turn(sampler) or isinstance(sampler, DistributedSampler | Sequence)
    if isinstance(sampler, UnknownOrder) or not is_known:
        kind = type(sampler.sampler if isinstance(sampler, UnknownOrder) else sampler).__name__
        raise InvalidArgumentError(
            f"`indices` must say which input comes when, for a loader with a {kind}, whose order is not known"
        )


@contextmanager
def order_within_batches_watched(loader: Any) -> Iterator[None]:
    """Let a loader that starts within the block refuse what it collates in another order than it was read.

    That is seen where it keeps their values. Workers that stay for the next pass would go on with it, and are
    left alone.
    """
    found = loader_within(loader)
    holder = found if isinstance(found, DataLoader) else getattr(found, "_dataset_fetcher", None)
    collate = getattr(holder, "collate_fn", None)
    is_single = getattr(found, "batch_sampler", getattr(found, "_auto_collation", None)) in (None, False)
    is_kept = getattr(found, "persistent_workers", False)
    if collate in (None, default_collate, default_convert) or is_single or is_kept:
        yield
        return
    holder.collate_fn = _InOrder(collate)  # type: ignore[union-attr]
    try:
        yield
    finally:
        if holder is found:  # else a running iterator, which goes on with it
            holder.collate_fn = collate


def is_refusal_of_order(error: InvalidArgumentError) -> bool:
    """Tell whether that is `refusal_of_order`, also where a worker put it among the lines of a traceback."""
    return _REORDERED in str(error)


def refusal_of_order() -> InvalidArgumentError:
    """Return the error for a loader that collates in another order."""
    return InvalidArgumentError(_REORDERED)


class _InOrder:
    """Collates items as another function does, and refuses what it puts into another order."""

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self._collate = collate

    def __call__(self, items: Any) -> Any:
        given = list(items)  # it may sort the list itself
        batch = self._collate(items)
        if are_reordered(given, batch):
            raise refusal_of_order()
        return batch


def are_reordered(items: Sequence[Any], batch: Any) -> bool:
    """Tell whether a batch holds items in another order, by the largest part that has their values."""
    parts = [[each for each in tree_leaves(item) if isinstance(each, _VALUES)] for item in items]
    columns, said, size = list(_columns(batch, len(items))), set[bool](), 0
    if len({len(each) for each in parts}) != 1:
        return False
    for given in sorted(zip(*parts, strict=True), key=lambda given: -_size(given[0])):
        if said and _size(given[0]) < size:
            break
        size, part = _size(given[0]), [value for each in given for value in _as_tensors(each)]
        if len(part) == len(items):
            found = [_order_of(part, rows) for rows in columns if rows[0].ndim == part[0].ndim]
            said |= {order == list(range(len(items))) for order in found if order is not None}
    return bool(said) and True not in said


def _size(value: Any) -> int:
    return prod(getattr(value, "shape", ()))


def _columns(batch: Any, count: int) -> Iterator[Sequence[torch.Tensor]]:
    """Yield all in a batch that has a row for each of so many items."""
    if isinstance(batch, torch.Tensor | np.ndarray):
        yield from (each.unbind() for each in _as_tensors(batch) if each.ndim and len(each) == count)
    elif isinstance(batch, Mapping | list | tuple):
        parts = list(batch.values() if isinstance(batch, Mapping) else batch)
        rows = [value for each in parts for value in _as_tensors(each)]
        if len(rows) == len(parts) == count:
            yield rows
        for each in parts:
            yield from _columns(each, count)


def _order_of(items: Sequence[torch.Tensor], rows: Sequence[torch.Tensor]) -> list[int] | None:
    """Return which item each row holds; None where rows are no items, or too many of these are alike."""
    different: list[torch.Tensor] = []
    least = _DISTINCT if items[0].numel() == 1 else min(_DISTINCT, len(items))
    for item in items:
        if len(different) < least and not any(_holds(each, item) for each in different):
            different.append(item)
    if len(different) < least:
        return None
    if all(map(_holds, rows, items)):
        return list(range(len(items)))
    left, order = dict(enumerate(items)), list[int]()
    for row in rows:
        order += [next((place for place, item in left.items() if _holds(row, item)), -1)]
        if left.pop(order[-1], None) is None:
            return None
    return order


def _holds(row: torch.Tensor, item: torch.Tensor) -> bool:
    """Tell whether a row is an item, or one that was padded at its end with the same value throughout."""
    if row.ndim != item.ndim or any(map(int.__lt__, row.shape, item.shape)):
        return False
    for dim, least in enumerate(item.shape if row.shape != item.shape else ()):
        if row.shape[dim] > least:
            rest = row.narrow(dim, least, row.shape[dim] - least)
            if rest.numel() and bool((rest != rest.flatten()[0]).any()):
                return False
            row = row.narrow(dim, 0, least)
    if item.numel() > _PROBED:
        step = item.numel() // _PROBED
        row, item = row.reshape(-1)[::step], item.reshape(-1)[::step]
    return torch.equal(row, item if item.dtype == row.dtype else item.to(row.dtype))


def _as_tensors(value: Any) -> list[torch.Tensor]:
    """Return what holds plain numbers as a tensor on the CPU, as the only one in a list."""
    try:
        found = value if isinstance(value, torch.Tensor) else None
        if found is None and isinstance(value, _VALUES):
            found = torch.as_tensor(value, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        return []
    is_plain = found is not None and found.layout == torch.strided and found.device.type == "cpu"
    return [found.detach()] if found is not None and is_plain else []
