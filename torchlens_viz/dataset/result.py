"""`Survey`: what a data set makes of the layers of a network, channel by channel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from PIL import Image
from torch import nn

from torchlens_viz.arguments import integer, number
from torchlens_viz.dataset import findings
from torchlens_viz.dataset.findings import Duplicate, Finding
from torchlens_viz.dataset.patches import Gallery, Patch, Source, View, view_of
from torchlens_viz.dataset.record import By, Record
from torchlens_viz.draw.style import Style
from torchlens_viz.errors import InvalidArgumentError
from torchlens_viz.hooks.followers import dead_channels
from torchlens_viz.models.colours import Bands
from torchlens_viz.models.inputs import InputOf
from torchlens_viz.models.layers import require_module


@final
class Survey(Record):
    """What `survey` found: statistics of every channel, and the inputs that drive it hardest.

    Attributes:
        samples_seen: How many inputs there were.
        not_called: The selected layers that never ran.
        top_k: How many inputs were to be kept per channel.
        is_complete: False where the survey was broken off by Ctrl-C; figures are of the inputs before.
        input_shape: (C, ...) of the inputs; None where they differed.
    """

    def dead(self, layer: str, eps: float = 0.0) -> torch.Tensor:
        """Return the channels that never fired on the inputs seen: (D,) int64, increasing.

        Those whose maximum never exceeded `eps`; before a normalisation, an activation that is no ReLU, a sum
        or another layer without a ReLU between, and in the network's answer (N, C), those that stayed within
        `eps` of zero or never changed.

        Raises:
            LayerNotCapturedError: The layer was not selected, or did not run.
        """
        eps = number(eps, "eps")
        found = dead_channels(self.stats[layer], self._tallies[layer].follower, eps).nonzero().flatten()
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
        share = number(share, "share", above=0, most=1)
        top = self._tally(layer).top
        if top is None:
            raise InvalidArgumentError("`saturated` needs the peaks; make the survey with `top_k` above 0")
        return findings.saturated_in(self.stats[layer], top.best(), least=share * self.inputs_seen[layer])

    def duplicates(
        self, layer: str, *, threshold: float = 0.98, model: nn.Module | None = None
    ) -> list[Duplicate]:
        """List the pairs of channels that are nearly the same, the most alike first.

        By the cosine of their kernels, and with `correlations=True` by the correlation of peaks: over at
        least 20 inputs, or 5 where they are equal, and so many that with 95 % confidence no pair of the layer
        reached the threshold by chance.

        Args:
            layer: The layer's name.
            threshold: What either figure must reach, above 0 and at most 1.
            model: The model, for a survey from a file.

        Raises:
            InvalidArgumentError: There is neither a kernel nor a correlation to go by.
        """
        owner = self._owner(model)
        if not self._is_comparable(layer, owner):
            raise InvalidArgumentError(
                f"there is nothing to compare the channels of `{layer}` by: make the survey with "
                "`correlations=True`, or pass the `model` and the name of a convolution"
            )
        threshold = number(threshold, "threshold", above=0, most=1)
        alike = self._tally(layer).alike
        return findings.near_duplicates(self._cosine(layer, owner), alike, threshold=threshold)

    def patches(
        self,
        layer: str,
        channel: int,
        source: Any,
        *,
        by: By = "activation",
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
            by: `"activation"`, what drives the channel hardest, or `"relevance"`, where it mattered for the
                score that `survey` was given as `target`; the patch is then what the largest part of that
                relevance sees.
            preprocess: Makes of an item of `source` what the model takes, (C, ...), if it is not that yet.
            invert: Makes of the model's input, (1, C, H, W), the pixels in [0, 1] to show. Without it, they
                are found as in `torchlens_viz.overlay_grid`.
            input_of: Which part of an item is the input, as in `survey`.
            model: The model, for a survey from a file.

        Returns:
            A patch per top input, the highest peak first: the `values` that the model took, the `pixels` to
            show, and the `box` they were cut from. At the border they end with the input. Of signals (C, L)
            `pixels` are the values themselves, and patches of volumes (C, D, H, W) are volumes.

        Raises:
            InvalidArgumentError: `source` holds other inputs, or the layer ran several times for one batch.
        """
        inputs = Source(source, preprocess, invert, input_of)
        gallery = self.gallery(layer, [channel], inputs, by=by, model=model)
        return [sight.patch for sight in gallery.sights(gallery.channels[0])]

    def grid(
        self,
        layer: str,
        source: Any,
        *,
        by: By = "activation",
        channels: int | Sequence[int] | None = None,
        preprocess: Callable[[Any], torch.Tensor] | None = None,
        invert: Callable[[torch.Tensor], torch.Tensor] | None = None,
        input_of: InputOf = None,
        model: nn.Module | None = None,
        bands: Bands = None,
        tile: int = 96,
        upscale: int | None = None,
        padding: int = 2,
        labels: bool = True,
        title: str | None = None,
    ) -> Image.Image:
        """Draw the patches that drive channels hardest: a row per channel, the highest peak first.

        Patches of volumes are drawn as up to nine slices, from left to right and from top to bottom, and
        those of signals as curves, one channel below the other, in one range for all.

        Args:
            layer: The layer's name.
            source: The inputs that were surveyed, as in `patches`.
            by: As in `patches`.
            channels: Draw these channels, by index from 0; None for all.
            preprocess: As in `patches`.
            invert: As in `patches`.
            input_of: As in `patches`.
            model: As in `patches`.
            bands: The channels of the inputs to show as red, green and blue, or the one to show in gray; of
                signals, one or three. None is all channels of signals, and of images all of 3, else their
                mean in gray.
            tile: The longer side in pixels to which a larger patch is shrunk; of signals, the width.
            upscale: Enlarge each tile by this whole factor; None brings its longer side to at least 64, or
                to `tile` where that is less.
            padding: Pixels between tiles.
            labels: Write the channel, the peak and the index of the input above each.
            title: A line above the sheet.

        Returns:
            An image of mode "RGB".

        Raises:
            InvalidArgumentError: As in `patches`, an index is out of range, or the sheet would be too large.
        """
        tile = integer(tile, "tile", least=1)
        style = Style(normalize=False, upscale=upscale, padding=padding, labels=labels, title=title)
        inputs = Source(source, preprocess, invert, input_of, bands)
        return self.gallery(layer, channels, inputs, by=by, model=model).draw(tile=tile, style=style)

    def gallery(
        self,
        layer: str,
        channels: int | Sequence[int] | None,
        source: Source,
        *,
        by: By = "activation",
        model: nn.Module | None = None,
    ) -> Gallery:
        """Return the top inputs of channels as pictures, as `patches` and `grid` show them.

        Args:
            layer: The layer's name.
            channels: Channels, by index from 0; None for all.
            source: The inputs that were surveyed, and how pictures are made of them.
            by: As in `patches`.
            model: As in `patches`.

        Raises:
            InvalidArgumentError: As in `patches`, or an index is out of range.
        """
        return Gallery(self._top(layer, by), channels, source, self._view(layer, model))

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

    def to_dict(self) -> dict[str, Any]:
        """Return everything in plain numbers and lists, as JSON takes them; NaN stays NaN."""
        layers = findings.layers_of(
            self.stats, self.top, self.inputs_seen, self.top_by_relevance, self._worth()
        )
        return {**self._about(), "not_called": list(self.not_called), "layers": layers}

    def rows(self) -> list[dict[str, Any]]:
        """Return a row per channel: layer, channel, its statistics, and its highest peak with its input.

        Where they were gathered, its `effect` on the loss with the `effect_error`, its `selectivity` and its
        `monosemanticity` too.
        """
        return findings.rows_of(self.stats, self.top, self._worth())

    def to_frame(self) -> Any:
        """Return `rows` as a pandas DataFrame.

        Raises:
            MissingDependencyError: pandas is not installed.
        """
        return findings.frame_of(self.rows())

    def __repr__(self) -> str:
        about = findings.described(self.stats, self.dead, self.not_called)
        return "\n".join([self._title(), *about])

    def _repr_html_(self) -> str:
        return findings.show(self._title(), self.stats, self.dead, self.findings())

    def _title(self) -> str:
        ended = "" if self.is_complete else ", broken off"
        return f"Survey of {len(self.stats)} layers over {self.samples_seen:,} inputs{ended}"

    def _cosine(self, layer: str, model: nn.Module | None) -> torch.Tensor | None:
        """Return the cosine of every two kernels, where there is one for each channel."""
        cosine = None if model is None else findings.kernel_cosine(model, layer)
        return cosine if cosine is not None and len(cosine) == self.stats[layer].channels else None

    def _is_comparable(self, layer: str, model: nn.Module | None) -> bool:
        return self._tally(layer).alike is not None or self._cosine(layer, model) is not None

    def _owner(self, model: nn.Module | None) -> nn.Module | None:
        if model is not None:
            require_module(model)
        return self._model if model is None else model

    def _view(self, layer: str, model: nn.Module | None) -> View:
        return view_of(self._tally(layer), layer, self._owner(model), self.input_shape)
