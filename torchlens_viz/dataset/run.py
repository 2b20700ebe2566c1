"""One pass over a loader: every layer's tally, batch by batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Final, final

import torch
from torch import nn

from torchlens_viz.dataset.checkpoint import Logbook, Progress, fingerprint
from torchlens_viz.dataset.gradients import Gradients, Name, Taken
from torchlens_viz.dataset.loader import Batch, Numbering
from torchlens_viz.dataset.observation import NOTHING_TOLD, Observation, Told
from torchlens_viz.dataset.tally import Tally
from torchlens_viz.errors import InvalidArgumentError
from torchlens_viz.hooks.capture import Capture
from torchlens_viz.hooks.followers import Followers
from torchlens_viz.hooks.forward import refuse_torchscript, refuse_unhookable
from torchlens_viz.hooks.layout import Layout, mixes_layouts
from torchlens_viz.hooks.sink import Sink, real_tensor
from torchlens_viz.models.inputs import shown_to
from torchlens_viz.models.layers import Layer, unwrap
from torchlens_viz.models.state import inference
from torchlens_viz.nested import cloned

_BESIDE: Final = (
    "what it takes beside images goes into `inputs`; where that is in the batches, let a function as "
    "`input_of` return a tuple or a dict"
)
_FOLLOWED: Final = 2  # batches in which it is found out where the channels are


@final
class Pass:
    """One pass over a loader; `progress` always speaks of whole batches.

    Args:
        model: The network.
        layers: Its layers that are surveyed.
        numbering: What tells the input and the indices of a batch.
        book: Where to keep what was found so far; None keeps nothing.
        device: Where batches are moved to; None leaves them where they are.
        empty: What is known of every layer before the first batch.
        alike: Whether to find out how alike the channels respond.
        gradients: What takes gradients, where any are asked for; the pass is then made with its copy.
        channel_dim: The dimension that counts channels, where the caller says it.
        tell: Makes of what the network puts out and of a batch what is known of its inputs besides; None for
            nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        numbering: Numbering,
        book: Logbook | None,
        device: torch.device | None,
        empty: Tally,
        *,
        alike: bool,
        gradients: Gradients | None,
        channel_dim: int | None,
        tell: Callable[[Any, Batch], Told] | None,
    ) -> None:
        self._numbering, self._book, self._device = numbering, book, device
        self._alike, self._tell = alike, tell
        self._gradients = gradients
        self._model = model if gradients is None else gradients.model
        self._layers = tuple(layers) if gradients is None else gradients.within(tuple(layers))
        self._layout = Layout(self._layers, channel_dim, finds_inputs=mixes_layouts(self._model))
        self._watch = _Watch(self._layout, gradients)
        self._watching: Callable[[], AbstractContextManager[None]] = nullcontext  # of the first batch's pass
        self.progress = Progress(tallies=dict.fromkeys((layer.name for layer in layers), empty))

    def go(self, loader: Iterable[Any], count: Callable[[int], object]) -> None:
        """Survey all batches, or those before Ctrl-C.

        Args:
            loader: Batches.
            count: Called after each with how many inputs it had.

        Raises:
            ArchiveError: The book was begun with other data.
            InvalidArgumentError: A layer or the indices do not fit.
        """
        before = None if self._book is None else self._book.read()
        if before is not None and before.is_complete:
            self._require_same_beginning(loader, before)
            self.progress = before
            count(before.inputs)
            return
        try:
            with inference(self._model, watched=False) as watching, self._hooks():
                self._watching = watching
                for raw in self._numbering.each(loader):
                    batch = self._numbering.read(raw)
                    if self.progress.batches == 0 and self._book is not None:
                        before = self._begin(batch, before)
                    if before is not None and self.progress.batches < before.batches:
                        self._pass_over(batch, before)
                    else:
                        self._survey(batch)
                    count(len(batch.samples))
            self._numbering.finish()
            _refuse_repeated(self.progress.tallies)
            self.progress = self.progress._replace(is_complete=True)
            if before is not None and self.progress.batches < before.batches:
                assert self._book is not None
                self._book.require_same_count(before, self.progress.inputs)
        except KeyboardInterrupt:
            if before is not None and self.progress.batches < before.batches:
                self.progress = before
            if self.progress.inputs == 0:
                raise
        if self._book is not None and self.progress.inputs:
            self._book.write(self.progress)

    def _require_same_beginning(self, loader: Iterable[Any], before: Progress) -> None:
        """Hold the first batch of a loader, if it yields one at all, to that of a finished run."""
        assert self._book is not None
        for raw in self._numbering.each(loader):
            self._book.require_same_data(before, fingerprint(self._numbering.read(raw)))
            break

    def _hooks(self) -> Capture[None]:
        """Make the calls of all layers reach the observations of the batch that is under way."""
        refuse_torchscript(self._model)
        check = partial(refuse_unhookable, self._model, self._layers, stop=False, compiled="eager")
        return Capture(unwrap(self._model), self._layers, check, self._watch)

    def _begin(self, batch: Batch, before: Progress | None) -> Progress | None:
        """Note what the first batch is, and hold that of an earlier run to it."""
        assert self._book is not None
        found = fingerprint(batch)
        self.progress = self.progress._replace(first_batch=found)
        if before is not None:
            self._book.require_same_data(before, found)
        return before

    def _pass_over(self, batch: Batch, before: Progress) -> None:
        assert self._book is not None
        if len(batch.samples):
            self._numbering.are_in_order(batch.samples)
        now = self.progress
        self.progress = now._replace(batches=now.batches + 1, inputs=now.inputs + len(batch.samples))
        if self.progress.batches == before.batches:
            self._book.require_same_count(before, self.progress.inputs)
            self.progress = before

    @contextmanager
    def _followed(self) -> Iterator[None]:
        """Find out within the block where channels are, and what comes after each layer."""
        followers = self._watch.followers
        try:
            with self._layout.following():
                followers.begin()
                yield
        finally:
            followers.end()

    def _run(self, batch: Batch, *, in_order: bool, must_follow: bool) -> Any:
        """Let the observations of a batch see what the layers put out; return what the network does."""
        self._watch.begin(
            {
                name: Observation(
                    name,
                    tally,
                    batch.samples,
                    in_order=in_order,
                    alike=self._alike,
                    by_input=self._tell is not None,
                )
                for name, tally in self.progress.tallies.items()
            }
        )
        watching, self._watching = self._watching, nullcontext
        given = args, kwargs = cloned((batch.args, batch.kwargs))
        with (
            shown_to(self._model, given, "loader", _BESIDE),
            watching(),
            self._followed() if must_follow else nullcontext(),
        ):
            return self._model(*args, **kwargs)

    def _weighed(self, gradients: Gradients, batch: Batch, *, in_order: bool, must_follow: bool) -> Any:
        """Run a batch and take gradients; return what the network puts out."""
        while True:  # each time more of what the network writes to is copied
            with gradients.running():
                output = self._run(batch, in_order=in_order, must_follow=must_follow)
                if not gradients.is_spoilt():
                    gradients.weigh(output, batch, self._watch.weigh)
                    return output

    def _survey(self, batch: Batch) -> None:
        now, shape = self.progress, batch.shape
        inputs = len(batch.samples)
        if inputs == 0:  # all of it is another process's
            self.progress = now._replace(batches=now.batches + 1)
            return
        in_order = self._numbering.are_in_order(batch.samples)
        there = batch.to(self._device)
        # A layer that has not run in two batches may never run.
        must_follow = now.batches == 0 or (now.batches < _FOLLOWED and self._layout.must_follow)
        if self._gradients is None:
            output = self._run(there, in_order=in_order, must_follow=must_follow)
        else:
            output = self._weighed(self._gradients, there, in_order=in_order, must_follow=must_follow)
        with torch.inference_mode(False), torch.no_grad():
            tallies = self._watch.end(NOTHING_TOLD if self._tell is None else self._tell(output, there))
        if must_follow:
            tallies = {
                name: replace(tally, follower=tally.follower or self._watch.followers.found.get(name, ""))
                for name, tally in tallies.items()
            }
        # In one step, so that Ctrl-C never leaves half a batch.
        self.progress = Progress(
            tallies=tallies,
            batches=now.batches + 1,
            inputs=now.inputs + inputs,
            shape=shape if now.inputs == 0 or now.shape == shape else None,
            first_batch=now.first_batch,
        )
        if self._book is not None:
            self._book.write_in_time(self.progress)


@final
class _Watch(Sink[None]):
    """Hands what every layer puts out to its observation of the batch that is under way."""

    __slots__ = ("_aliases", "_calls", "_dims", "_gradients", "_layout", "_seen", "followers")

    def __init__(self, layout: Layout, gradients: Gradients | None) -> None:
        self._layout = layout
        self._gradients = gradients
        self.followers = Followers()
        self._seen: dict[str, Observation] = {}
        self._calls = Counter[str]()
        self._dims: dict[str, tuple[int, int]] = {}  # of inputs, and of channels
        self._aliases: dict[str, str] = {}

    def begin(self, batch: dict[str, Observation]) -> None:
        """Begin a batch; what a pass that was broken off left of the one before is forgotten."""
        self._seen = batch
        self._calls.clear()
        self.followers = Followers()

    def end(self, told: Told) -> dict[str, Tally]:
        """Return what is known of each layer with this batch, and with what is told of its inputs.

        Raises:
            InvalidArgumentError: A layer put out something other than one tensor per call.
        """
        for name, calls in self._calls.items():
            if self._seen[name].calls != calls:
                raise _no_one_tensor(name, f"{self._seen[name].calls} in {calls} calls")
        found = {name: seen.finish(told) for name, seen in self._seen.items() if name not in self._aliases}
        return {name: found[self._aliases.get(name, name)] for name in self._seen}

    @property
    def is_on_graph(self) -> bool:
        """Whether gradients of what layers put out are taken."""
        return self._gradients is not None

    def open(self, layers: Sequence[str]) -> None:
        """Begin; what comes before the first batch is not looked at."""

    def keep(self, tensor: torch.Tensor | torch.fx.Proxy, layer: str) -> torch.Tensor | Taken | None:
        """Take in what a layer put out; of it is kept what a gradient of it takes, if any."""
        given, seen = real_tensor(tensor, layer), self._seen[layer]
        if seen.calls > self._calls[layer]:
            raise _no_one_tensor(layer, "several in one call")
        values = given.detach()
        dim = self._layout.found(values, layer)
        if dim is None:
            dim = self._layout.channel_dim(values, layer) if seen.channel_dim is None else seen.channel_dim
        inputs = self._layout.input_dim(values, layer)
        self._dims[layer] = inputs, dim
        values, dim = _inputs_first(values, inputs, dim)
        if self._gradients is not None:
            with self.followers.unseen():
                seen.see(values, dim)
                return self._gradients.take(given, layer)
        with self.followers.put_out(given, layer):
            seen.see(values, dim)
        return None

    def successor(self, tensor: torch.Tensor, kept: Any, layer: str) -> torch.Tensor:
        """Return what the network goes on from: the tensor, or one in memory of its own, on the graph."""
        with self.followers.unseen():
            given = tensor if kept is None or kept.leaf is None else kept.leaf.clone()
        with self.followers.put_out(given, layer):
            return given

    def weigh(self, name: Name, call: Taken, gradient: torch.Tensor | None, is_only: bool) -> None:
        """Take in how much what one call of a layer put out mattered."""
        seen, (inputs, channels) = self._seen[call.layer], self._dims[call.layer]
        values, dim = _inputs_first(call.values, inputs, channels)
        if gradient is not None:
            gradient, _ = _inputs_first(gradient, inputs, channels)
        if name == "loss":
            seen.learn(values, gradient, dim)
        else:
            seen.weigh(values, gradient, dim, is_only=is_only)

    def record(self, names: Sequence[str], kept: Any) -> None:
        """Count a call, and note that what is known of one name is known of all."""
        first, *others = names
        self._calls[first] += 1
        self._aliases.update(dict.fromkeys(others, first))


def _no_one_tensor(layer: str, got: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"`{layer}` cannot be surveyed: it must put out one tensor, got {got}; choose a layer inside "
        "or behind it, and of attention ask for no weights, with `need_weights=False`"
    )


def _inputs_first(tensor: torch.Tensor, inputs: int, channels: int) -> tuple[torch.Tensor, int]:
    """Return a tensor with the dimension of inputs as its first, and where its channels are then."""
    if inputs == 0 or inputs == channels:
        return tensor, channels
    return tensor.movedim(inputs, 0), channels + (channels < inputs)


def _refuse_repeated(tallies: Mapping[str, Tally]) -> None:
    """Refuse indices of which one was given to two inputs, so far as the top inputs show it."""
    for tally in tallies.values():
        top = tally.settled().top
        samples = None if top is None or not tally.inputs else top.compute().samples
        if samples is None or samples.shape[1] < 2:
            continue
        ordered = samples.sort(dim=1).values
        repeated = ordered[:, 1:][(ordered.diff(dim=1) == 0) & (ordered[:, 1:] >= 0)]
        if len(repeated):
            raise InvalidArgumentError(
                f"`indices` must name each input once, got {int(repeated[0])} in two batches"
            )
