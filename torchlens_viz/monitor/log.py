"""What is written of a step, under which tags."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, final

import torch
from torch import nn

from torchlens_viz.hooks.followers import Follower
from torchlens_viz.monitor import pictures as portraits
from torchlens_viz.monitor.health import Figures, Trouble
from torchlens_viz.monitor.observe import Observed, Update, finite
from torchlens_viz.monitor.pictures import Scales
from torchlens_viz.monitor.remarks import Remarks
from torchlens_viz.monitor.writer import Board

_FIGURES: Final = ("mean", "std", "zero_fraction", "dead", "dead_fraction", "nonfinite")
_NORMS: Final = ("weight_norm", "update_norm", "update_ratio")


@final
class Log:
    """Pictures, numbers and words of a model's layers, step by step.

    Args:
        writer: A folder or a writer, as `Board` takes it.
        name: What the model is called in tags; "" leaves that out.
        layers: The names of the layers that are watched, which are not none.
        remarks: Excuses what cannot be written.
        scales: The scale (low, high) by tag or glob of tags.
        headroom: How many times as far as the values of the first picture its scale reaches.
        max_tiles: The most filters in a picture.
        norms: Whether norms will be written.

    Attributes:
        scales: The scale of every picture.
    """

    def __init__(
        self,
        writer: Any,
        name: str,
        layers: Iterable[str],
        remarks: Remarks,
        *,
        scales: Mapping[str, Sequence[float]] | None,
        headroom: float,
        max_tiles: int,
        norms: bool,
    ) -> None:
        self._whose = f"{name}/" if name else ""
        tags = [self.tag(kind, layer) for kind in ("kernels", "maps") for layer in layers]
        self.scales = Scales(scales, headroom=headroom, tags=tags)
        self._remarks = remarks
        self._max_tiles = max_tiles
        self._board = Board(writer)
        self._charts = (*_FIGURES, *(_NORMS if norms else ()))
        self._has_charts = False

    def tag(self, kind: str, layer: str) -> str:
        """Return the tag under which something of a layer stands, which figures have a name below."""
        return f"{kind}/{self._whose}{layer or 'model'}"  # a model that is one layer has no name in itself

    def inputs(self, batch: torch.Tensor, step: int) -> None:
        """Write the inputs whose maps are drawn, (N, C, H, W)."""
        with self._remarks.attempt(step):
            self._board.picture(f"probe/{self._whose}inputs", portraits.inputs(batch), step)

    def kernels(self, layers: Mapping[str, nn.Module], step: int) -> None:
        """Write the kernels of layers that have any."""
        for layer, module in layers.items():
            with self._remarks.attempt(step):
                tag = self.tag("kernels", layer)
                image = portraits.kernels(tag, module, self.scales, step, max_tiles=self._max_tiles)
                self._board.picture(tag, image, step)

    def health(
        self, seen: Mapping[str, Observed], followers: Mapping[str, Follower], step: int
    ) -> dict[str, Figures]:
        """Write how layers are, and return it, of those of which it could be told."""
        found: dict[str, Figures] = {}
        for layer, observed in seen.items():
            with self._remarks.attempt(step):
                parts = [stats.compute() for stats in observed.stats.values()]
                found[layer] = figures = Figures.of(parts, followers.get(layer, ""))
                self._numbers(layer, {what: getattr(figures, what) for what in _FIGURES}, step)
                self._values(layer, observed, step)
                if observed.maps is not None:
                    tag = self.tag("maps", layer)
                    self._board.picture(tag, portraits.maps(tag, observed.maps, self.scales, step), step)
        return found

    def weights(self, norms: Mapping[str, float], step: int) -> None:
        """Write the norm of the parameters of each layer."""
        for layer, norm in norms.items():
            self._numbers(layer, {"weight_norm": norm}, step)

    def updates(self, updates: Mapping[str, Update], step: int) -> None:
        """Write what a step added to the parameters of each layer."""
        for layer, update in updates.items():
            self._numbers(layer, {"update_norm": update.norm, "update_ratio": update.ratio}, step)

    def troubles(self, found: Sequence[Trouble], step: int) -> None:
        """Write what an alarm says."""
        if found:
            with self._remarks.attempt(step):
                words = "\n\n".join(f"**{trouble.cause}**: {trouble.message}" for trouble in found)
                self._board.text(f"alarms/{self._whose}{found[0].kind}", words, step)

    def close(self) -> None:
        """Write everything to disk."""
        self._board.close()

    def _numbers(self, layer: str, figures: Mapping[str, float | None], step: int) -> None:
        if not self._has_charts:
            self._has_charts = True
            self._board.charts({what: rf"^health/.*/{what}$" for what in self._charts})
        for what, value in figures.items():
            if value is not None:
                self._board.number(f"{self.tag('health', layer)}/{what}", value, step)

    def _values(self, layer: str, observed: Observed, step: int) -> None:
        with self._remarks.attempt(step):
            values = finite(observed.sample)
            if len(values):
                self._board.values(f"{self.tag('health', layer)}/values", values, step)
