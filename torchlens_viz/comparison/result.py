"""`Comparison`: what sets two networks apart, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from math import ceil
from typing import Any, Final, Unpack, final

import torch
from PIL import Image

from torchlens_viz.arguments import integer, number
from torchlens_viz.comparison.channels import Alike, ChannelMatch, matched
from torchlens_viz.comparison.gap import Exhibit
from torchlens_viz.draw.canvas import draw_chosen, in_colour
from torchlens_viz.draw.style import Style, StyleOptions, choose, in_rows
from torchlens_viz.errors import InvalidArgumentError, LayerNotCapturedError
from torchlens_viz.models.layers import nearest

_TILE: Final = 96


@dataclass(frozen=True, slots=True)
class LayerDifference:
    """How far apart two networks are at one call of one layer.

    Attributes:
        layer: Its name in `a`; `"(output)"` is what the network puts out.
        other: Its name in `b`.
        call: Which of its calls in the forward pass of a batch, from 0.
        part: Which tensor of several that it puts out, from 0.
        shapes: What both put out; where shapes differ, all errors are inf.
        max_abs: The largest distance of two values; inf where one of them alone is NaN or Inf.
        relative: The root mean square of the distance, in parts of that of what `a` puts out.
        cosine: Of the angle between both, -1 to 1; 1 for two that are zero everywhere.
        excess: The largest distance in parts of what the tolerance allows: above 1 it is beyond.
        channel: The channel where that is; None where nothing counts channels.
        sample: The input where that is, in order of iteration; None where rows are no inputs.
        by_channel: (C,) float64, the largest distance in each channel; None where nothing counts channels.
        rtol: The tolerance that held for it.
        atol: The tolerance that held for it.
    """

    layer: str
    other: str
    call: int
    part: int
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    max_abs: float
    relative: float
    cosine: float
    excess: float
    channel: int | None
    sample: int | None
    by_channel: torch.Tensor | None
    rtol: float
    atol: float

    @property
    def is_beyond(self) -> bool:
        """Whether some value is beyond the tolerance."""
        return self.excess > 1

    @property
    def label(self) -> str:
        """The layer's name, with the number of the call and of the tensor where there are several."""
        call = f" [call {self.call}]" if self.call else ""
        return f"{self.layer}{call}" + (f" [tensor {self.part}]" if self.part else "")


@final
class Comparison:
    """What `compare` found.

    Attributes:
        layers: A `LayerDifference` per layer in the order in which the layers of `a` ran; of a layer that ran
            several times one per call, where it ran.
        only_in_a: Layers of `a` that ran and have no counterpart: they are missing in `b`, or did not run
            there.
        only_in_b: Layers of `b` that ran and that `a` does not have.
        folded: Layers of `a` that are part of another one in `b`, and the layer of `a` that was compared
            instead.
        samples_seen: How many inputs both were shown.
    """

    def __init__(
        self,
        layers: Sequence[LayerDifference],
        exhibits: Sequence[Exhibit | None],
        alike: Sequence[Alike | None],
        *,
        only_in_a: Sequence[str],
        only_in_b: Sequence[str],
        folded: Mapping[str, str],
        samples_seen: int,
    ) -> None:
        self.layers: tuple[LayerDifference, ...] = tuple(layers)
        self.only_in_a: tuple[str, ...] = tuple(only_in_a)
        self.only_in_b: tuple[str, ...] = tuple(only_in_b)
        self.folded: dict[str, str] = dict(folded)
        self.samples_seen = samples_seen
        self._exhibits = tuple(exhibits)
        self._alike = tuple(alike)

    @property
    def beyond(self) -> tuple[LayerDifference, ...]:
        """Those that are beyond the tolerance, in order."""
        return tuple(each for each in self.layers if each.is_beyond)

    @property
    def first(self) -> str | None:
        """The name of the first layer that is beyond the tolerance, in the order in which they ran, or None.

        What comes after it inherits its error: the fault is there, or in what `a` and `b` do without a layer
        between it and the one before.
        """
        return next((each.layer for each in self.layers if each.is_beyond), None)

    def __getitem__(self, layer: str) -> LayerDifference:
        """Return the row of a layer; of several calls the first that is beyond the tolerance, else the first.

        Raises:
            LayerNotCapturedError: The layer was not compared.
        """
        return self.layers[self._place(layer, None)]

    def channels(self, layer: str, *, call: int | None = None, threshold: float = 0.7) -> ChannelMatch:
        """Match the channels of a layer by the correlation of what they put out.

        One to one: a channel whose like has the same place in `b` is kept; of the others the most alike are
        matched first. A channel that is constant has no like, and counts neither as died nor as born.

        Args:
            layer: The layer's name in `a`.
            call: Which of its calls; None is the first beyond the tolerance, else the first.
            threshold: The correlation that two channels need to be alike, above 0 and at most 1.

        Raises:
            InvalidArgumentError: The comparison was made without `correlations=True`, or the layer has no
                channels, or the two differ in more than their number.
            LayerNotCapturedError: The layer was not compared.
        """
        threshold = number(threshold, "threshold", above=0, most=1)
        alike = self._alike[self._place(layer, call)]
        if alike is None:
            raise InvalidArgumentError(
                f"`layer` must have been compared with `correlations=True` and have channels at the same "
                f"positions in both networks, got `{layer}`; compare again with `correlations=True`"
            )
        return matched(alike, threshold)

    def grid(
        self, layer: str | None = None, *, call: int | None = None, **options: Unpack[StyleOptions]
    ) -> Image.Image:
        """Draw the worst channels of a layer: what `a` puts out, what `b` does, and the difference `b - a`.

        A row per channel, the worst first, of the input where the worst value is. Both networks share one
        range; the difference has its own, symmetric about zero: red where `b` is larger, blue where it is
        smaller.

        Args:
            layer: The layer's name in `a`; None is the first beyond the tolerance, and where there is none,
                the one that is nearest to it.
            call: Which of its calls; None is the first beyond the tolerance, else the first.
            options: How to draw, as in `kernel_grid`; `cmap`, `value_range` and `scale_each` concern `a` and
                `b`.

        Returns:
            An image of mode "RGB", three columns wide.

        Raises:
            InvalidArgumentError: Nothing of the layer can be drawn, or an option has no effect.
            LayerNotCapturedError: The layer was not compared.
        """
        if layer is None:
            if call is not None:
                raise InvalidArgumentError("`call` has no effect without `layer`; name the layer too")
            place = max(range(len(self.layers)), key=lambda each: self.layers[each].excess)
            place = next((each for each, row in enumerate(self.layers) if row.is_beyond), place)
        else:
            place = self._place(layer, call)
        row, exhibit = self.layers[place], self._exhibits[place]
        if exhibit is None:
            raise InvalidArgumentError(
                f"`layer` must put out one shape (N, C, ...) in both networks, got `{row.label}` with "
                f"{row.shapes[0]} and {row.shapes[1]}; choose another layer"
            )
        return _drawn(row, exhibit, options)

    def rows(self) -> list[dict[str, Any]]:
        """Return a dict of plain numbers per row of `layers`, such as a CSV file or pandas takes."""
        plain = [each.name for each in fields(LayerDifference) if each.name not in ("shapes", "by_channel")]
        return [
            {**{name: getattr(row, name) for name in plain}, "is_beyond": row.is_beyond}
            for row in self.layers
        ]

    def __repr__(self) -> str:
        inputs = f"{self.samples_seen:,} input{'' if self.samples_seen == 1 else 's'}"
        head = f"Comparison of {len(self.layers)} layers on {inputs}: "
        first = next((row for row in self.layers if row.is_beyond), None)
        if first is None:
            head += "none beyond the tolerance"
        else:
            head += f"{len(self.beyond)} beyond the tolerance, the first is `{first.label}`"
        table = [("layer", "max abs", "relative", "cosine", "excess", "channel", "")]
        for row in self.layers:
            figures = (f"{row.max_abs:.3g}", f"{row.relative:.3g}", f"{row.cosine:.6f}", f"{row.excess:.3g}")
            channel = "-" if row.channel is None else str(row.channel)
            mark = "<- first" if row is first else "beyond" if row.is_beyond else ""
            table.append((row.label, *figures, channel, mark))
        widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
        lines = [head]
        for line in table:
            name, *rest, mark = line
            cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=False)]
            lines.append(f"  {name.ljust(widths[0])}  {'  '.join(cells)}  {mark}".rstrip())
        apart = (("only in a", self.only_in_a), ("only in b", self.only_in_b), ("folded", tuple(self.folded)))
        for what, names in apart:
            if names:
                more = f" and {len(names) - 6} more" if len(names) > 6 else ""
                lines.append(f"  {what}: {', '.join(names[:6])}{more}")
        return "\n".join(lines)

    def _place(self, layer: str, call: int | None) -> int:
        rows = [(place, row) for place, row in enumerate(self.layers) if row.layer == layer]
        if not rows:
            names = list(dict.fromkeys(row.layer for row in self.layers))
            raise LayerNotCapturedError(f"`{layer}` was not compared; {nearest(str(layer), names)}")
        if call is None:
            return next((place for place, row in rows if row.is_beyond), rows[0][0])
        call = integer(call, "call", least=0)
        found = next((place for place, row in rows if row.call == call), None)
        if found is None:
            raise InvalidArgumentError(
                f"`call` must be a call of `{layer}` that was compared, {rows[0][1].call} to "
                f"{rows[-1][1].call}, got {call}"
            )
        return found


def _drawn(row: LayerDifference, exhibit: Exhibit, options: StyleOptions) -> Image.Image:
    given = Style(**options)
    if given.sort_by is not None:
        raise InvalidArgumentError("`sort_by` has no effect: the worst channel comes first; leave it out")
    style = in_rows(given, 3)
    gap = exhibit.b - exhibit.a
    finite = gap[gap.isfinite()].abs()
    largest = finite.max().item() if len(finite) else 0.0
    upscale = given.upscale or max(1, ceil(_TILE / max(gap.shape[1:])))
    choice = choose(style, 3 * len(gap))
    sides = in_colour(torch.cat([exhibit.a, exhibit.b])[:, None], given, upscale=upscale)
    of_gap = replace(
        given, normalize=True, scale_each=False, value_range=(-largest or -1.0, largest or 1.0), cmap="RdBu_r"
    )
    gaps = in_colour(gap[:, None], of_gap, upscale=upscale)
    tiles = torch.stack([sides[: len(gap)], sides[len(gap) :], gaps], dim=1).flatten(0, 1)
    names = [f"channel {channel}" for channel in exhibit.channels] or ["all channels"]
    labels = [label for name in names for label in (f"a, {name}", f"b, {name}", "b - a")]
    lines = []
    if given.legend:
        sample = "" if row.sample is None else f", input {row.sample}"
        lines = [f"{row.label}{sample}: b - a from {-largest:.3g} (blue) to {largest:.3g} (red)"]
    return draw_chosen(tiles[choice.places], choice, style, labels=labels, lines=lines)
