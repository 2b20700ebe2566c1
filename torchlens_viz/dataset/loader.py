"""What a loader yields: which part of a batch is the input, and which index each input has."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Final, NamedTuple, TypeAlias, final

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
from torchlens_viz.nested import map_tensors, tensors

InputOf: TypeAlias = str | int | Callable[[Any], Any] | None
Indices: TypeAlias = Sequence[int] | torch.Tensor | Callable[[Any], Any] | None

_USUAL_KEYS: Final = ("pixel_values", "image", "images", "img", "input", "inputs", "x")
_SHUFFLING: Final = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


class Batch(NamedTuple):
    """One batch, ready for a model.

    Attributes:
        args: What the model is called with, by position.
        kwargs: And by name.
        samples: (N,) int64 on the CPU, the index of each input.
        skipped: How many inputs of the batch were left out, because another process has them.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    samples: torch.Tensor
    skipped: int = 0

    def to(self, device: torch.device | None) -> Batch:
        """Return the batch with its tensors on a device."""
        if device is None:
            return self

        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, non_blocking=True)

        return self._replace(args=map_tensors(move, self.args), kwargs=map_tensors(move, self.kwargs))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one input."""
        return tuple(next(tensors((self.args, self.kwargs))).shape[1:])


def input_of(batch: Any, rule: InputOf) -> Any:
    """Return the part of a batch that a model takes.

    Args:
        batch: A tensor; a tuple or list, of which the first is taken; or a mapping, of which the value under
            the first of the keys `pixel_values`, `image`, `images`, `img`, `input`, `inputs`, `x` is taken.
        rule: In place of that, a key, a place, or a function of the batch.

    Raises:
        InvalidArgumentError: There is no such part.
        InvalidTypeError: It is no tensor.
    """
    found = batch
    if callable(rule):
        found = rule(batch)
    elif rule is not None:
        try:
            found = batch[rule]
        except (LookupError, TypeError, ValueError) as error:
            raise InvalidArgumentError(
                f"`input_of` must be a part of every batch, got {rule!r} for a {_told(batch)}"
            ) from error
    elif isinstance(batch, Mapping):
        key = next((key for key in _USUAL_KEYS if key in batch), None)
        if key is None:
            raise InvalidArgumentError(
                f"`input_of` must say which part of a batch is the input, got a {_told(batch)}; pass one of "
                "its keys"
            )
        found = batch[key]
    elif isinstance(batch, tuple | list) and batch:
        found = batch[0]
    if isinstance(found, torch.Tensor) or (callable(rule) and next(tensors(found), None) is not None):
        return found
    raise InvalidTypeError(
        f"`loader` must yield tensors, tuples that begin with one, or mappings with one, got a "
        f"{_told(batch)}; say with `input_of` which part is the input"
    )


@final
class Numbering:
    """Which index each input of a loader has, and which inputs another process has too.

    Args:
        loader: The loader.
        indices: The indices in the order of iteration, a function of a batch that gives them, or None for
            the place in that order.
        input_of: Which part of a batch is the input; see the function `input_of`.
        shared: Whether other processes survey other inputs.

    Raises:
        InvalidArgumentError: The loader shuffles and `indices` is None, indices are repeated or negative, or
            every process would survey the same.
    """

    def __init__(self, loader: Any, indices: Indices, input_of: InputOf, *, shared: bool) -> None:
        refuse_what_is_no_loader(loader)
        sampler = sampler_of(loader)
        self._rule = input_of
        self._function = indices if callable(indices) else None
        self._padding = padding(sampler)
        self._known: torch.Tensor | None = None
        self._is_partial = isinstance(loader, DataLoader) and loader.drop_last
        self._following: Iterator[int] | None = None
        self.place = 0
        self._last = -1
        if self._function is None:
            refuse_loss_of_order(loader)
        if indices is None:
            refuse_unknown_order(sampler, shared=shared)
            if isinstance(sampler, DistributedSampler | Sequence):
                # Of a list, or of a sampler whose order follows from its seed and epoch alone.
                self._following = iter(sampler)
        elif self._function is None:
            self._known = _checked(indices)

    @property
    def listed(self) -> torch.Tensor | None:
        """The indices that were given, (N,) int64, where they are a list."""
        return self._known

    def read(self, batch: Any) -> Batch:
        """Return the next batch with the index of every input; padding is left out.

        Raises:
            InvalidArgumentError: It has no inputs, or there are fewer indices than inputs.
        """
        given = input_of(batch, self._rule)
        is_one = isinstance(given, torch.Tensor) or not isinstance(given, tuple | Mapping)
        args = (given,) if is_one else given if isinstance(given, tuple) else ()
        kwargs = dict(given) if isinstance(given, Mapping) else {}
        first = next(tensors((args, kwargs)))
        if first.ndim < 2 or len(first) == 0:
            raise InvalidArgumentError(
                f"`loader` must yield batches (N, ...) of one or more inputs, got shape {tuple(first.shape)}"
            )
        count = len(first)
        samples = self._next(batch, count)
        places = torch.arange(self.place, self.place + count)
        self.place += count
        is_kept = self._padding(places)
        if bool(is_kept.all()):
            return Batch(args, kwargs, samples)
        rows = is_kept.nonzero().flatten()

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            is_batch = tensor.ndim > 0 and len(tensor) == count
            return tensor.index_select(0, rows.to(tensor.device)) if is_batch else tensor

        return Batch(
            map_tensors(keep, args), map_tensors(keep, kwargs), samples[rows], skipped=count - len(rows)
        )

    def are_in_order(self, samples: torch.Tensor) -> bool:
        """Tell whether indices increase and are larger than all before them."""
        is_later = bool((samples.diff() > 0).all()) and int(samples[0]) > self._last
        self._last = max(self._last, int(samples.max()))
        return is_later

    def finish(self) -> None:
        """Refuse a loader that yielded fewer inputs than there are indices.

        Raises:
            InvalidArgumentError: It did, and is no DataLoader that drops the last batch.
        """
        if self._known is not None and self.place < len(self._known) and not self._is_partial:
            raise InvalidArgumentError(
                f"`indices` must name each input of the loader, got {len(self._known)} for "
                f"{self.place} inputs"
            )
        if self._following is not None and not self._is_partial and next(self._following, None) is not None:
            raise InvalidArgumentError(
                f"`loader` must yield every input that its sampler names, got {self.place} inputs and no "
                "more: does its `collate_fn` leave some out? Pass `indices`, a function of a batch"
            )

    def _next(self, batch: Any, count: int) -> torch.Tensor:
        if self._function is not None:
            samples = _checked(self._function(batch))
            if len(samples) != count:
                raise InvalidArgumentError(
                    f"`indices` must give one index per input, got {len(samples)} for a batch of {count}"
                )
            return samples
        if self._known is not None:
            samples = self._known[self.place : self.place + count]
        elif self._following is not None:
            samples = torch.tensor(list(islice(self._following, count)), dtype=torch.int64)
        else:
            return torch.arange(self.place, self.place + count)
        if len(samples) < count:
            raise InvalidArgumentError(
                f"`indices` must name each input of the loader, got {self.place + len(samples)} "
                "and more inputs"
            )
        return samples


def inputs_in(loader: Any) -> int | None:
    """Return how many inputs a loader will yield, as far as can be told."""
    sampler = sampler_of(loader)
    if isinstance(sampler, UnknownOrder):
        return None
    try:
        if isinstance(loader, list | tuple):
            return sum(len(first) for batch in loader for first in islice(tensors(batch), 1))
        return len(loader.dataset if sampler is None else sampler)
    except (AttributeError, TypeError):
        return None


def _checked(indices: Any) -> torch.Tensor:
    try:
        found = torch.as_tensor(indices if isinstance(indices, torch.Tensor) else list(indices))
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidTypeError(f"`indices` must be ints, got {type(indices).__name__}") from error
    found = found.detach().cpu()
    if found.numel() == 0:
        return torch.empty(0, dtype=torch.int64)
    if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool or found.ndim != 1:
        raise InvalidTypeError(
            f"`indices` must be ints, one for each input, got {found.dtype} (shape {tuple(found.shape)})"
        )
    found = found.long()
    if int(found.min()) < 0:
        raise InvalidArgumentError(f"`indices` must not be negative, got {int(found.min())}")
    ordered = found.sort().values
    repeated = ordered[1:][ordered.diff() == 0]
    if len(repeated):
        raise InvalidArgumentError(f"`indices` must name each input once, got {int(repeated[0])} twice")
    return found


def _told(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return f"{type(batch).__name__} with the keys {', '.join(map(repr, batch))}"
    return f"{type(batch).__name__}"


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
