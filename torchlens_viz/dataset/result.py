"""`Survey`: what a data set makes of the layers of a network, channel by channel."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, final

import torch
from PIL import Image
from torch import nn

from torchlens_viz.arguments import indices_of
from torchlens_viz.dataset.checkpoint import read_ledger, write_ledger
from torchlens_viz.dataset.findings import (
    Duplicate,
    frame_of,
    kernel_cosine,
    lists_of,
    near_duplicates,
    rows_of,
)
from torchlens_viz.dataset.loader import InputOf
from torchlens_viz.dataset.patches import Cutter, Patch, draw_rows, pick
from torchlens_viz.dataset.tally import Tally, correlation
from torchlens_viz.draw.style import Style
from torchlens_viz.errors import (
    InvalidArgumentError,
    InvalidTypeError,
    LayerNotCapturedError,
)
from torchlens_viz.models.layers import nearest
from torchlens_viz.stats.channels import ChannelStats
from torchlens_viz.stats.topk import Top

V = TypeVar("V")


class ByLayer(dict[str, V]):
    """A value for each layer that ran, by name."""

    def __missing__(self, name: str) -> V:
        raise LayerNotCapturedError(
            f"the survey knows nothing of `{name}`: it was not selected, or did not run; "
            f"{nearest(name, list(self))}"
        )


@final
class Survey:
    """What `survey` found: statistics of every channel, and the inputs that drive it hardest.

    Attributes:
        samples_seen: How many inputs there were.
        not_called: The selected layers that never ran.
        top_k: How many inputs were to be kept per channel.
        is_complete: False where the survey was broken off by Ctrl-C; figures are of the inputs before.
        input_shape: (C, H, W) of the inputs; None where they differed.
    """

    def __init__(
        self, tallies: Mapping[str, Tally], about: Mapping[str, Any], model: nn.Module | None
    ) -> None:
        self._tallies = {name: tally.settled() for name, tally in tallies.items()}
        self._model = model
        self.samples_seen: int = about["samples_seen"]
        self.top_k: int = about["top_k"]
        self.is_complete: bool = about["is_complete"]
        self.input_shape: tuple[int, ...] | None = (
            None if about["input_shape"] is None else tuple(about["input_shape"])
        )
        self.not_called = tuple(name for name, tally in self._tallies.items() if tally.inputs == 0)

    @cached_property
    def stats(self) -> ByLayer[ChannelStats]:
        """The statistics of each layer that ran, over all values; `torchlens_viz.testing` takes them too."""
        return ByLayer({name: tally.stats.compute().to("cpu") for name, tally in self._seen().items()})

    @cached_property
    def top(self) -> ByLayer[Top]:
        """The inputs that drive each channel hardest, for each layer that ran."""
        tops = {name: tally.top for name, tally in self._seen().items()}
        return ByLayer({name: top.compute() for name, top in tops.items() if top is not None})

    @cached_property
    def inputs_seen(self) -> ByLayer[int]:
        """How many inputs went through each layer; fewer than `samples_seen` where it did not always run."""
        return ByLayer({name: tally.inputs for name, tally in self._seen().items()})

    @cached_property
    def correlation(self) -> ByLayer[torch.Tensor]:
        """The correlation of every two channels' peaks over the inputs, (C, C), where it was asked for."""
        alike = {name: tally.alike for name, tally in self._seen().items()}
        return ByLayer({name: correlation(sums).cpu() for name, sums in alike.items() if sums is not None})

    def dead(self, layer: str, eps: float = 0.0) -> torch.Tensor:
        """Return the channels whose maximum never exceeded `eps` on the inputs seen: (D,) int64, increasing.

        A channel without any finite value is not among them; see `stats[layer].nonfinite`.

        Raises:
            LayerNotCapturedError: The layer was not selected, or did not run.
        """
        found = self.stats[layer].dead(eps)
        if self.top_k == 0:
            return found
        highest = self.top[layer].values[:, 0]  # may be Inf, which the statistics leave out
        return found[~(highest[found] > eps)] if self.top[layer].values.shape[1] else found

    def saturated(self, layer: str, *, share: float = 0.5) -> torch.Tensor:
        """Return the channels that peak at their bound: (S,) int64, increasing.

        Those whose peak is the same, their largest value, on more than one input and on at least this share
        of the inputs: a ReLU6 at 6, a sigmoid at 1, or a channel that does not depend on the input.
        Channels that are zero everywhere are dead and not among them.

        Args:
            layer: The layer's name.
            share: Of the inputs, above 0 and at most 1.

        Raises:
            InvalidArgumentError: The share is out of range, or no top inputs were kept.
        """
        if not 0 < share <= 1:
            raise InvalidArgumentError(f"`share` must be above 0 and at most 1, got {share}")
        top = self._tally(layer).top
        if top is None:
            raise InvalidArgumentError(
                "`saturated` needs the peaks; make the survey with `top_k` of 1 or more"
            )
        highest, count = (part.cpu() for part in top.best())
        is_saturated = (count >= share * self.inputs_seen[layer]) & (count > 1) & highest.isfinite()
        is_dead = torch.zeros_like(is_saturated)
        is_dead[(self.stats[layer].max == 0) & (self.stats[layer].min == 0)] = True
        return (is_saturated & ~is_dead).nonzero().flatten()

    def duplicates(
        self, layer: str, *, threshold: float = 0.98, model: nn.Module | None = None
    ) -> list[Duplicate]:
        """List the pairs of channels that are nearly the same, the most alike first.

        By the cosine of their kernels, and by the correlation of their peaks over the inputs where the survey
        was made with `correlations=True`.

        Args:
            layer: The layer's name.
            threshold: What either figure must reach, above 0 and at most 1.
            model: The model, for a survey from a file.

        Raises:
            InvalidArgumentError: There is neither a kernel nor a correlation to go by.
        """
        tally, owner = self._tally(layer), model or self._model
        cosine = None if owner is None else kernel_cosine(owner, layer)
        if cosine is not None and len(cosine) != self.stats[layer].channels:
            cosine = None
        if cosine is None and tally.alike is None:
            raise InvalidArgumentError(
                f"there is nothing to compare the channels of `{layer}` by: make the survey with "
                "`correlations=True`, or pass the `model` and the name of a convolution"
            )
        return near_duplicates(cosine, tally.alike, threshold=threshold)

    def patches(
        self,
        layer: str,
        channel: int,
        source: Any,
        *,
        preprocess: Callable[[Any], torch.Tensor] | None = None,
        invert: Callable[[torch.Tensor], torch.Tensor] | None = None,
        input_of: InputOf = None,
        model: nn.Module | None = None,
    ) -> list[Patch]:
        """Cut from the top inputs of a channel what the peak sees: its receptive field.

        Args:
            layer: The layer's name.
            channel: The channel.
            source: The inputs that were surveyed: a dataset, a tensor, a DataLoader (its dataset is used),
                anything else with `source[index]`, or an iterable in the order of the indices.
            preprocess: Makes of an item of `source` what the model takes, (C, H, W), if it is not that yet.
            invert: Makes of the model's input, (1, C, H, W), the pixels in [0, 1] to show. Without it, they
                are found as in `torchlens_viz.overlay_grid`.
            input_of: Which part of an item is the input, as in `survey`.
            model: The model, for a survey from a file.

        Returns:
            A patch per top input, the highest peak first: the `values` that the model took, the `pixels` to
            show, and the `box` they were cut from. At the border they end with the input.

        Raises:
            InvalidArgumentError: `source` holds other inputs, or the layer ran several times for one batch.
        """
        (found,) = self._cut(layer, [channel], source, preprocess, invert, input_of, model)
        return found

    def grid(
        self,
        layer: str,
        source: Any,
        *,
        channels: int | Sequence[int] | None = None,
        preprocess: Callable[[Any], torch.Tensor] | None = None,
        invert: Callable[[torch.Tensor], torch.Tensor] | None = None,
        input_of: InputOf = None,
        model: nn.Module | None = None,
        tile: int = 96,
        upscale: int | None = None,
        padding: int = 2,
        labels: bool = True,
        title: str | None = None,
    ) -> Image.Image:
        """Draw the patches that drive channels hardest: a row per channel, the highest peak first.

        Args:
            layer: The layer's name.
            source: The inputs that were surveyed, as in `patches`.
            channels: Draw these channels, by index from 0; None for all.
            preprocess: As in `patches`.
            invert: As in `patches`.
            input_of: As in `patches`.
            model: As in `patches`.
            tile: The longer side in pixels to which a larger patch is shrunk.
            upscale: Enlarge each tile by this whole factor; None brings its longer side to at least 32.
            padding: Pixels between tiles.
            labels: Write the channel, the peak and the index of the input above each.
            title: A line above the sheet.

        Returns:
            An image of mode "RGB".

        Raises:
            InvalidArgumentError: As in `patches`, an index is out of range, or the sheet would be too large.
        """
        if tile < 1:
            raise InvalidArgumentError(f"`tile` must be at least 1, got {tile}")
        top = self._top(layer)
        chosen = list(indices_of(channels, len(top.values), "channels"))
        columns = int((top.samples[chosen] >= 0).sum(1).amax()) if chosen and top.samples.shape[1] else 0
        if columns == 0:
            raise InvalidArgumentError(
                f"these channels of `{layer}` have no top inputs, because they put out nothing but NaN"
            )
        style = Style(
            normalize=False, nrow=columns, upscale=upscale, padding=padding, labels=labels, title=title
        )
        rows = self._cut(layer, chosen, source, preprocess, invert, input_of, model)
        words = [
            [
                f"{channel}: {value:.3g} #{sample}"
                for value, sample in zip(
                    top.values[channel].tolist(), top.samples[channel].tolist(), strict=True
                )
                if sample >= 0
            ]
            for channel in chosen
        ]
        return draw_rows([[patch.pixels for patch in row] for row in rows], words, tile=tile, style=style)

    def merge(self, other: Survey) -> Survey:
        """Return what both surveys found together, for data that was surveyed in parts.

        Args:
            other: A survey of the same layers with the same options over inputs with other indices.

        Raises:
            InvalidArgumentError: It is of other layers or options.
            InvalidTypeError: It is no survey.
        """
        if not isinstance(other, Survey):
            raise InvalidTypeError(f"`other` must be a Survey, got {type(other).__name__}")
        if list(self._tallies) != list(other._tallies) or self.top_k != other.top_k:
            raise InvalidArgumentError(
                "`other` must be a survey of the same layers with the same `top_k`, got "
                f"{list(other._tallies)} with {other.top_k} for {list(self._tallies)} with {self.top_k}"
            )
        about = {
            "samples_seen": self.samples_seen + other.samples_seen,
            "top_k": self.top_k,
            "is_complete": self.is_complete and other.is_complete,
            "input_shape": self.input_shape if self.input_shape == other.input_shape else None,
        }
        tallies = {name: tally.union(other._tallies[name]) for name, tally in self._tallies.items()}
        return Survey(tallies, about, self._model or other._model)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the survey to a safetensors file, which holds no code; the model is not in it.

        Raises:
            ArchiveError: The file cannot be written.
            MissingDependencyError: safetensors is not installed.
        """
        return write_ledger(path, self._tallies, self._about())

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, model: nn.Module | None = None) -> Survey:
        """Read what `save` wrote.

        Args:
            path: The file.
            model: The model, for patches and duplicates.

        Raises:
            ArchiveError: The file is missing, damaged, or holds something else.
        """
        tallies, about = read_ledger(path)
        return cls(tallies, about, model)

    def to_dict(self) -> dict[str, Any]:
        """Return everything in plain numbers and lists, as JSON takes them; NaN stays NaN."""
        layers = {
            name: {"inputs_seen": self.inputs_seen[name], **lists_of(stats, self.top.get(name))}
            for name, stats in self.stats.items()
        }
        return {**self._about(), "not_called": list(self.not_called), "layers": layers}

    def rows(self) -> list[dict[str, Any]]:
        """Return a row per channel: layer, channel, its statistics, and its highest peak with its input."""
        return rows_of(self.stats, self.top)

    def to_frame(self) -> Any:
        """Return `rows` as a pandas DataFrame.

        Raises:
            MissingDependencyError: pandas is not installed.
        """
        return frame_of(self.rows())

    def __repr__(self) -> str:
        ended = "" if self.is_complete else ", broken off"
        lines = [f"Survey of {len(self.stats)} layers over {self.samples_seen:,} inputs{ended}"]
        for name, stats in self.stats.items():
            dead = len(self.dead(name))
            spoilt = int(stats.nonfinite.sum())
            more = f", {spoilt:,} values NaN or Inf" if spoilt else ""
            lines.append(f"  {name or '(the model)'}: {stats.channels} channels, {dead} dead{more}")
        if self.not_called:
            lines.append(f"  not called: {', '.join(self.not_called)}")
        return "\n".join(lines)

    def _about(self) -> dict[str, Any]:
        return {
            "samples_seen": self.samples_seen,
            "top_k": self.top_k,
            "is_complete": self.is_complete,
            "input_shape": None if self.input_shape is None else list(self.input_shape),
        }

    def _seen(self) -> dict[str, Tally]:
        return {name: tally for name, tally in self._tallies.items() if tally.inputs}

    def _tally(self, layer: str) -> Tally:
        return ByLayer(self._seen())[layer]

    def _top(self, layer: str) -> Top:
        self._tally(layer)
        if layer not in self.top:
            raise InvalidArgumentError("there are no top inputs; make the survey with `top_k` of 1 or more")
        return self.top[layer]

    def _cut(
        self,
        layer: str,
        channels: Sequence[int],
        source: Any,
        preprocess: Callable[[Any], torch.Tensor] | None,
        invert: Callable[[torch.Tensor], torch.Tensor] | None,
        rule: InputOf,
        model: nn.Module | None,
    ) -> list[list[Patch]]:
        top, owner = self._top(layer), model or self._model
        if owner is None:
            raise InvalidArgumentError("`model` must be given, since a survey from a file comes without one")
        if self._tally(layer).most_calls > 1:
            raise InvalidArgumentError(
                f"`{layer}` ran {self._tally(layer).most_calls} times for one batch, so that it cannot be "
                "told what a peak of it sees; survey a layer that runs once"
            )
        chosen = list(indices_of(list(channels), len(top.values), "channels"))
        samples, positions = top.samples[chosen], top.positions[chosen].tolist()
        inputs = pick(source, [sample for sample in samples.flatten().tolist() if sample >= 0], rule)
        cutter = Cutter(owner, layer, inputs, preprocess=preprocess, invert=invert, shape=self.input_shape)
        return [
            [cutter.cut(sample, place) for sample, place in zip(row, places, strict=True) if sample >= 0]
            for row, places in zip(samples.tolist(), positions, strict=True)
        ]
