"""`Survey`: what a data set makes of the layers of a network, channel by channel."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, final

import torch
from PIL import Image
from torch import nn

from torchlens_viz.arguments import indices_of, integer
from torchlens_viz.dataset import findings
from torchlens_viz.dataset.checkpoint import read_ledger, write_ledger
from torchlens_viz.dataset.findings import Duplicate, Finding
from torchlens_viz.dataset.loader import InputOf
from torchlens_viz.dataset.patches import Patch, Source, View, cut_patches, draw_patches
from torchlens_viz.dataset.tally import ByLayer, Tally, correlation
from torchlens_viz.draw.style import Style
from torchlens_viz.errors import InvalidArgumentError, InvalidTypeError
from torchlens_viz.stats.channels import ChannelStats
from torchlens_viz.stats.topk import Top


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
        shape = about["input_shape"]
        self.input_shape: tuple[int, ...] | None = None if shape is None else tuple(shape)
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
        return findings.saturated_in(self.stats[layer], top.best(), least=share * self.inputs_seen[layer])

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
        owner = model or self._model
        if not self._is_comparable(layer, owner):
            raise InvalidArgumentError(
                f"there is nothing to compare the channels of `{layer}` by: make the survey with "
                "`correlations=True`, or pass the `model` and the name of a convolution"
            )
        return findings.near_duplicates(
            self._cosine(layer, owner), self._tally(layer).alike, threshold=threshold
        )

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
        inputs = Source(source, preprocess, invert, input_of)
        return cut_patches(self._top(layer), [channel], inputs, self._view(layer, model))[0]

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
        integer(tile, "tile", least=1)
        top = self._top(layer)
        chosen = indices_of(channels, len(top.values), "channels")
        style = Style(normalize=False, upscale=upscale, padding=padding, labels=labels, title=title)
        inputs = Source(source, preprocess, invert, input_of)
        return draw_patches(top, chosen, inputs, self._view(layer, model), tile=tile, style=style)

    def findings(self) -> list[Finding]:
        """List what is wrong with the layers, the worst first.

        NaN and Inf come first, then dead channels, saturated ones and duplicates; among each kind what
        concerns the largest share of a layer. Of what the survey did not gather nothing is said: without top
        inputs of saturated channels, without a model or correlations of duplicates.
        """
        found: list[Finding] = []
        for name, stats in self.stats.items():
            saturated = self.saturated(name).tolist() if self.top_k else []
            alike = self.duplicates(name) if self._is_comparable(name, self._model) else []
            found += findings.findings_in(name, stats, self.dead(name).tolist(), saturated, alike)
        return sorted(found, key=lambda each: -each.severity)

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
            **self._about(),
            "samples_seen": self.samples_seen + other.samples_seen,
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
            name: {"inputs_seen": self.inputs_seen[name], **findings.lists_of(stats, self.top.get(name))}
            for name, stats in self.stats.items()
        }
        return {**self._about(), "not_called": list(self.not_called), "layers": layers}

    def rows(self) -> list[dict[str, Any]]:
        """Return a row per channel: layer, channel, its statistics, and its highest peak with its input."""
        return findings.rows_of(self.stats, self.top)

    def to_frame(self) -> Any:
        """Return `rows` as a pandas DataFrame.

        Raises:
            MissingDependencyError: pandas is not installed.
        """
        return findings.frame_of(self.rows())

    def __repr__(self) -> str:
        ended = "" if self.is_complete else ", broken off"
        lines = [f"Survey of {len(self.stats)} layers over {self.samples_seen:,} inputs{ended}"]
        lines += findings.described(self.stats, {name: len(self.dead(name)) for name in self.stats})
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

    def _cosine(self, layer: str, model: nn.Module | None) -> torch.Tensor | None:
        """Return the cosine of every two kernels, where there is one for each channel."""
        cosine = None if model is None else findings.kernel_cosine(model, layer)
        return cosine if cosine is not None and len(cosine) == self.stats[layer].channels else None

    def _is_comparable(self, layer: str, model: nn.Module | None) -> bool:
        return self._tally(layer).alike is not None or self._cosine(layer, model) is not None

    def _view(self, layer: str, model: nn.Module | None) -> View:
        owner = model or self._model
        if owner is None:
            raise InvalidArgumentError("`model` must be given, since a survey from a file comes without one")
        if self._tally(layer).most_calls > 1:
            raise InvalidArgumentError(
                f"`{layer}` ran {self._tally(layer).most_calls} times for one batch, so that it cannot be "
                "told what a peak of it sees; survey a layer that runs once"
            )
        return View(owner, layer, self.input_shape)
