"""In which order a loader yields inputs, and how many in each batch, as far as that can be told."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import chain, islice, repeat
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
from torchlens_viz.models.inputs import are_reordered
from torchlens_viz.models.keeping import same_random_numbers

_DEPTH: Final = 8  # how far to look for a DataLoader inside of something else
_MOST: Final = 1000  # and at how many objects
_CONTAINERS: Final = (list, tuple, Mapping)
_LINKS: Final = (FunctionType, MethodType, CellType, partial)
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


def hidden_loader(batches: Any) -> Any:
    """Return what loader a running iterator draws on; None where there is none to be seen.

    Some loaders are made only once the first batch is wanted.

    Raises:
        InvalidArgumentError: Its order is not known.
    """
    found = loader_within(batches)
    if not isinstance(found, _BaseDataLoaderIter):
        return None
    refuse_loss_of_order(found)
    sampler = getattr(found._index_sampler, "sampler", found._index_sampler)
    if not isinstance(found._dataset, IterableDataset) and not is_in_turn(sampler):
        refuse_unknown_order(UnknownOrder(sampler), shared=False)
    return found


def refuse_skipping(batches: Any) -> None:
    """Raise `InvalidArgumentError` where `islice` or the like left out batches before its first."""
    found = loader_within(batches)
    skips = isinstance(batches, filter) or type(batches).__module__ == "itertools"
    if skips and isinstance(found, _BaseDataLoaderIter) and found._num_yielded > 1:
        raise InvalidArgumentError(
            f"`loader` must begin with the first batch, got a {type(batches).__name__} that left out "
            f"{found._num_yielded - 1}, so that the place of an input says nothing of its index; pass "
            "`indices`"
        )


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


class Watch:
    """Hears of batches that a loader collates in another order than their items were read in.

    It raises nothing where batches are collated, which may be in a thread or a process of somebody's.

    Args:
        loader: A DataLoader or its running iterator, as `loader_within` finds it.
    """

    def __init__(self, loader: Any) -> None:
        is_begun = isinstance(loader, _BaseDataLoaderIter)
        self._loader = loader
        self._dataset: Any = getattr(loader, "_dataset" if is_begun else "dataset", None)
        self._holder: Any = getattr(loader, "_dataset_fetcher", None) if is_begun else loader
        self._collate = _collate_of(loader)
        # Whether it is over, and whether anything was not in order.
        self._flags: Any = torch.zeros(2, dtype=torch.uint8, device="cpu")
        if not _is_watchable(loader, self._collate):
            self._holder = None
            return
        has_workers = not is_begun and loader.num_workers > 0
        if has_workers:
            self._flags.share_memory_()  # type: ignore[no-untyped-call]
        if self._holder is None or (has_workers and getattr(loader, "_iterator", None) is not None):
            self.try_again()  # workers that run already are not heard of
        if self._holder is not None:
            self._holder.collate_fn = _InOrder(self._collate, self._flags)

    def check(self) -> None:
        """Raise `InvalidArgumentError` where a batch is not in order."""
        if self._flags[1]:
            raise InvalidArgumentError(_REORDERED)

    def give_back(self, *, is_over: bool) -> None:
        """Give the loader its own function back, once those who collate for this pass have been told.

        Args:
            is_over: Watch no more, also where workers stay for the next pass.
        """
        self._flags[0] = is_over
        if self._holder is not None and (is_over or self._holder is self._loader):
            self._holder.collate_fn = self._collate

    def try_again(self) -> None:
        """Collate as many items as are in a batch, for a loader of whose first batch nothing was heard.

        Raises:
            InvalidArgumentError: They are not in order.
        """
        sampler = getattr(self._loader, "batch_sampler", getattr(self._loader, "_index_sampler", None))
        size = getattr(sampler, "batch_size", None)
        is_read = _is_watchable(self._loader, self._collate) and not isinstance(
            self._dataset, IterableDataset
        )
        if self._collate is None or not is_read or not isinstance(size, int):
            return
        with suppress(Exception), same_random_numbers():  # it may be that this loader reads other items
            items = [self._dataset[place] for place in range(min(size, len(self._dataset)))]
            _InOrder(self._collate, self._flags)(items)
        self.check()


def _collate_of(loader: Any) -> Any:
    return getattr(loader, "collate_fn", getattr(loader, "_collate_fn", None))


def _is_watchable(loader: Any, collate: Any) -> bool:
    is_single = getattr(loader, "batch_sampler", getattr(loader, "_auto_collation", None)) in (None, False)
    return collate not in (None, default_collate, default_convert) and not is_single


class _InOrder:
    """Collates items as another function does, and flags what it puts into another order."""

    def __init__(self, collate: Callable[[Any], Any], flags: torch.Tensor) -> None:
        self._collate, self._flags, self._has_tried = collate, flags, False

    def __call__(self, items: Any) -> Any:
        if self._flags.any():
            return self._collate(items)
        given = list(items)  # it may sort the list itself
        batch = self._collate(items)
        is_reordered = are_reordered(given, batch)
        if is_reordered is None and not self._has_tried:  # it makes something else of them
            self._has_tried = True
            with suppress(Exception), same_random_numbers():
                is_reordered = are_reordered([_first(self._collate([each])) for each in given], batch)
        if is_reordered:
            self._flags[1] = 1
        return batch


def _first(batch: Any) -> list[torch.Tensor]:
    """Return the first row of all in a batch of one item."""
    return [each[0] for each in tree_leaves(batch) if isinstance(each, torch.Tensor) and each.ndim]
