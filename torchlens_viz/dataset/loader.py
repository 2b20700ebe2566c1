"""What a loader yields: batches, and which index each of their inputs has."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any, NamedTuple, TypeAlias, final

import torch
from torch.utils.data import DataLoader, DistributedSampler

from torchlens_viz.arguments import check_dense, listed
from torchlens_viz.dataset.order import (
    UnknownOrder,
    Watch,
    batch_sizes,
    hidden_loader,
    loader_within,
    padding,
    refuse_loss_of_order,
    refuse_skipping,
    refuse_unknown_order,
    refuse_what_is_no_loader,
    sampler_of,
)
from torchlens_viz.errors import InvalidArgumentError, InvalidTypeError, calling
from torchlens_viz.models.calls import ModelInputs, arguments_of, inputs_like
from torchlens_viz.models.inputs import InputOf, images_in, input_of
from torchlens_viz.nested import map_tensors, tensors

Indices: TypeAlias = Sequence[int] | torch.Tensor | Callable[[Any], Any] | None


class Batch(NamedTuple):
    """One batch, ready for a model.

    Attributes:
        args: What the model is called with, by position.
        kwargs: And by name.
        samples: (N,) int64 on the CPU, the index of each input.
        skipped: How many inputs of the batch were left out, because another process has them.
        whole: What the loader yielded; where inputs were left out, its tensors are without them too.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    samples: torch.Tensor
    skipped: int = 0
    whole: Any = None

    def to(self, device: torch.device | None) -> Batch:
        """Return the batch with its tensors on a device."""
        if device is None:
            return self

        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, non_blocking=True)

        return self._replace(args=map_tensors(move, self.args), kwargs=map_tensors(move, self.kwargs))

    def all_on(self, device: torch.device | None) -> Any:
        """Return all that the loader yielded, with its tensors on a device."""
        return self.whole if device is None else map_tensors(lambda tensor: tensor.to(device), self.whole)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one image; of a list of several, that of the first."""
        images = images_in(self.args or self.kwargs)
        return tuple(images.shape[1:] if isinstance(images, torch.Tensor) else images[0].shape)


@final
class Numbering:
    """Which index each input of a loader has, and which inputs another process has too.

    Once the first batch was read, `inputs` says what the model is called with beside images.

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
        outermost, loader = loader, loader_within(loader)
        sampler = sampler_of(loader)
        self._is_open = indices is None and loader is outermost and not isinstance(loader, DataLoader)
        self._is_by_place = indices is None
        self._rule = input_of
        self._sizes = batch_sizes(loader) if indices is None else None
        self._function = indices if callable(indices) else None
        self._padding = padding(sampler)
        self._known: torch.Tensor | None = None
        self._is_partial = loader is not outermost or (isinstance(loader, DataLoader) and loader.drop_last)
        self._following: Iterator[int] | None = None
        self.inputs: ModelInputs = None
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

    def each(self, loader: Iterable[Any]) -> Iterator[Any]:
        """Yield the batches of the loader.

        Raises:
            InvalidArgumentError: With the first of them a DataLoader has come to light whose order is not
                known.
        """
        batches: Any = None
        running: Any = None
        watches = [] if self._function is not None else [Watch(loader_within(loader))]
        try:
            batches = iter(loader)
            running = (batch for batch in batches)  # asked for once: some begin anew when asked again
            first = list(islice(running, 1))
            for watch in watches:  # with the first batch those who collate the others have been told
                watch.give_back(is_over=False)
            if first and self._is_by_place:
                refuse_skipping(batches)
            late = hidden_loader(batches) if first and self._is_open else None
            if late is not None:
                self._sizes = batch_sizes(late)
                watches.append(Watch(late))
                watches[-1].try_again()
            for batch in chain(first, running):
                for watch in watches:
                    watch.check()
                yield batch
        finally:
            for watch in watches:
                watch.give_back(is_over=True)
            batches = running = None  # or else workers stop where garbage is collected, slowly

    def read(self, batch: Any) -> Batch:
        """Return the next batch with the index of every input; padding is left out.

        Raises:
            InvalidArgumentError: It has no inputs, or there are fewer indices than inputs.
        """
        given = input_of(batch, self._rule)
        args, kwargs = arguments_of(given)
        images = images_in(given)
        if isinstance(images, torch.Tensor) and (images.ndim < 2 or len(images) == 0):
            raise InvalidArgumentError(
                f"`loader` must yield batches (N, ...) of one or more inputs, got shape {tuple(images.shape)}"
            )
        count = len(images)
        if self.place == 0:
            self.inputs = inputs_like(given)
        self._require_all(count)
        samples = self._next(batch, count)
        places = torch.arange(self.place, self.place + count, device="cpu")
        self.place += count
        is_kept = self._padding(places)
        if bool(is_kept.all()):
            return Batch(args, kwargs, samples, whole=batch)
        rows = is_kept.nonzero().flatten()

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            is_batch = tensor.ndim > 0 and len(tensor) == count
            return tensor.index_select(0, rows.to(tensor.device)) if is_batch else tensor

        def kept(part: Any) -> Any:
            is_list = part is images and isinstance(part, list)
            return [part[row] for row in rows.tolist()] if is_list else map_tensors(keep, part)

        return Batch(
            tuple(map(kept, args)),
            {key: kept(part) for key, part in kwargs.items()},
            samples[rows],
            skipped=count - len(rows),
            whole=map_tensors(keep, batch),
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

    def _require_all(self, count: int) -> None:
        """Refuse a batch that has not as many inputs as its sampler named."""
        wanted = None if self._sizes is None else next(self._sizes, None)
        if wanted is not None and wanted != count:
            raise InvalidArgumentError(
                f"`loader` must yield every input that its sampler names, got a batch of {count} where "
                f"{wanted} were named: its `collate_fn` leaves some out, or makes several of one, so that "
                "which is which is lost; pass `indices`, a function of a batch"
            )

    def _next(self, batch: Any, count: int) -> torch.Tensor:
        if self._function is not None:
            with calling("indices(batch)", "return the index of every input of a batch"):
                samples = _checked(self._function(batch))
            if len(samples) != count:
                raise InvalidArgumentError(
                    f"`indices` must give one index per input, got {len(samples)} for a batch of {count}"
                )
            return samples
        if self._known is not None:
            samples = self._known[self.place : self.place + count]
        elif self._following is not None:
            samples = torch.tensor(list(islice(self._following, count)), dtype=torch.int64, device="cpu")
        else:
            return torch.arange(self.place, self.place + count, device="cpu")
        if len(samples) < count:
            raise InvalidArgumentError(
                f"`indices` must name each input of the loader, got {self.place + len(samples)} "
                "and more inputs"
            )
        return samples


def inputs_in(loader: Any) -> int | None:
    """Return how many inputs a loader will yield, as far as can be told."""
    loader = loader_within(loader)
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
        is_tensor = isinstance(indices, torch.Tensor)
        found = (
            indices if is_tensor else torch.as_tensor(listed(indices, "indices", most=2**31), device="cpu")
        )
        check_dense(found, "`indices`")
        found = found.detach().cpu()
    except Exception as error:
        raise InvalidTypeError(f"`indices` must be ints, got {type(indices).__name__}") from error
    if found.numel() == 0:
        return torch.empty(0, dtype=torch.int64, device="cpu")
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
