"""Both networks on the same inputs, batch by batch: what one puts out is kept until the other does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, final

import torch

from torchlens_viz.comparison.channels import CoMoments
from torchlens_viz.comparison.gap import Gap
from torchlens_viz.comparison.matching import Call, by_name, has_place, is_layer
from torchlens_viz.comparison.rounding import Rounding, Shaken
from torchlens_viz.comparison.side import OUTPUT, Other, Reference, Row, Side
from torchlens_viz.errors import InvalidArgumentError, InvalidTypeError
from torchlens_viz.models.calls import Arguments, arguments_of
from torchlens_viz.models.inputs import InputOf, input_of
from torchlens_viz.nested import tensors


class Found(NamedTuple):
    """What is known of a row.

    Attributes:
        other: The layer's name in the other network.
        gap: How far both are apart.
        alike: How their channels vary together, where that was asked for.
    """

    other: str
    gap: Gap
    alike: CoMoments | None


@final
class Run:
    """A comparison that is under way.

    Args:
        a: The one network.
        b: The other.
        pairs: The names in `b` of layers of `a`, where the caller says them; `"name"` and `"order"` find
            them.
        chosen: The layers of `a` that are to be compared; None is all that are hooked.
        rtol: The tolerance, in parts of the value; None measures what rounding may do.
        atol: The tolerance besides.
        maps: How many channels of each layer to keep for pictures.
        correlations: Whether to find out which channels vary together.
        isolates: Whether each layer of `b` is to be given what those of `a` before it put out.

    Attributes:
        found: What is known of each row.
        folded: Layers of `a` that are part of another in `b`, and the layer of `a` where they are looked at.
        inputs: How many inputs both have seen.
    """

    def __init__(
        self,
        a: Side,
        b: Side,
        pairs: Mapping[str, str] | Literal["name", "order"],
        chosen: frozenset[str] | None,
        *,
        rtol: float | None,
        atol: float,
        maps: int,
        correlations: bool,
        isolates: bool,
    ) -> None:
        self._a, self._b, self._pairs, self._chosen = a, b, pairs, chosen
        self._rtol, self._atol, self._maps = rtol, atol, maps
        self._correlations, self._isolates = correlations, isolates
        self._counts = is_layer if chosen is None else has_place
        self._first = Reference(a, self._counts, chosen)
        self._second = Other(b, self._counts, isolates=isolates)
        self._rounding = Rounding()
        self._batch = 0
        self._ran: tuple[dict[str, None], dict[str, None]] = ({}, {})
        self._places: dict[Call, int] = {}
        self.found: dict[Row, Found] = {}
        self.folded: dict[str, str] = {}
        self.inputs = 0

    def add(self, batch: Any, rule: InputOf) -> None:
        """Show both networks a batch.

        Raises:
            InvalidArgumentError: They are matched by order and ran unlike numbers of layers.
        """
        args, kwargs = _arguments(batch, rule)
        rows = next(iter(tensors((args, kwargs))), None)
        self._batch = 0 if rows is None or rows.ndim == 0 else len(rows)
        self._first.kept.clear()
        self._first.begin()
        with self._a.capture(self._first):
            self._a.run(args, kwargs)
        self._places |= {call: place for place, call in enumerate(self._first.order)}
        for kept in self._first.kept.values():
            self._rounding.see(kept.tensor)
        if self._rtol is None and not self._isolates:  # of one layer alone, rounding does not grow
            shaken = Shaken(self._a, self._counts, self._first.kept, self._rounding)
            with self._a.capture(shaken):
                self._a.run(args, kwargs)
        self._second.begin()
        with self._second.held_against(self._plan(), self._hold), self._b.capture(self._second):
            self._b.run(args, kwargs)
        self._first.kept.clear()
        self.inputs += self._batch
        for ran, sink in zip(self._ran, (self._first, self._second), strict=True):
            ran.update(dict.fromkeys(call.layer for call in sink.order))
        if self._pairs == "order":
            self._require_same_number()

    def only_in(self) -> tuple[list[str], list[str]]:
        """Return the layers of `a`, and of `b`, that ran and were held against nothing."""
        found = {row.call.layer for row in self.found} | self.folded.keys()
        others = {each.other for each in self.found.values()}
        if self._chosen is not None:
            return [name for name in self._ran[0] if name in self._chosen - found], []
        known = self._a.modules

        def is_new(name: str) -> bool:
            """Tell whether `a` has no such layer, nor one of which this is a part."""
            parent = known.get(name.rpartition(".")[0])
            return name not in others and name not in known and (parent is None or bool(parent._modules))

        return [name for name in self._ran[0] if name not in found], [*filter(is_new, self._ran[1])]

    def in_order(self) -> list[tuple[Row, Found]]:
        """Return what was found in the order in which `a` ran."""
        return sorted(self.found.items(), key=lambda each: (self._places[each[0].call], each[0].part))

    def _plan(self) -> Callable[[Call], Call | None]:
        """Return what finds the counterpart in `a` of a call in `b` that is ending."""
        order, second = self._first.order, self._second
        if self._pairs == "name":
            found, folded = by_name(order, self._a.modules, self._b.modules)
            self.folded |= folded
            return found.get
        if isinstance(self._pairs, Mapping):
            sides = {theirs: ours for ours, theirs in self._pairs.items()}
            return lambda call: Call(sides[call.layer], call.number) if call.layer in sides else None

        def same_place(call: Call) -> Call | None:
            if call.layer == OUTPUT:
                return call
            place = len(second.counted)
            is_there = second.counts(call) and place < len(self._first.counted)
            return self._first.counted[place] if is_there else None

        return same_place

    def _require_same_number(self) -> None:
        ours, theirs = len(self._first.counted), len(self._second.counted)
        if ours != theirs:
            raise InvalidArgumentError(
                f'`match="order"` must have as many layers to compare in both, got {ours} in `a` '
                f"and {theirs} in `b`; choose them with `layers`, or say which belong together with "
                "`match={name in a: name in b}`"
            )

    def _hold(self, tensor: torch.Tensor, dim: int | None, theirs: Row, ours: Row) -> torch.Tensor | None:
        """Measure the gap between a tensor of `b` and what was kept of `a`, and return that."""
        kept = self._first.kept.get(ours)
        if kept is None:
            return None
        found = self.found.get(ours)
        if found is None:
            alike = CoMoments() if self._correlations else None
            found = self.found[ours] = Found(theirs.call.layer, Gap(self._maps), alike)
        self._rounding.see(tensor)
        a = kept.tensor
        channels = kept.dim if kept.dim is not None else dim if a.ndim == tensor.ndim else None
        if channels is None and a.ndim > 1:
            channels = 1  # (N, C, ...), where nothing says otherwise
        with torch.no_grad():
            found.gap.add(
                a,
                tensor,
                channels,
                rtol=self._rounding.allowed(ours) if self._rtol is None else self._rtol,
                atol=self._atol,
                inputs=self._batch,
                before=self.inputs,
            )
            if found.alike is not None and channels is not None and _same_places(a, tensor, channels):
                found.alike.add(a, tensor, channels)
        return a


def batches_of(inputs: Any) -> Iterator[Any]:
    """Yield the batches of what the caller gave: one tensor or mapping is one batch."""
    if isinstance(inputs, torch.Tensor | Mapping):
        yield inputs
    elif isinstance(inputs, Iterable) and not isinstance(inputs, str | bytes):
        yield from inputs
    else:
        raise InvalidTypeError(
            "`inputs` must be a tensor (N, ...), a mapping of keyword arguments, or an iterable of batches, "
            f"got {type(inputs).__name__}"
        )


def _arguments(batch: Any, rule: InputOf) -> Arguments:
    found = batch if rule is None and isinstance(batch, Mapping) else input_of(batch, rule)
    return arguments_of(found)


def _same_places(a: torch.Tensor, b: torch.Tensor, dim: int) -> bool:
    """Tell whether two tensors differ in the number of channels at most."""
    if a.ndim != b.ndim or a.ndim < 2:
        return False
    return all(
        ours == theirs or place == dim
        for place, (ours, theirs) in enumerate(zip(a.shape, b.shape, strict=True))
    )
