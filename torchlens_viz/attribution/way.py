"""How heatmaps are made: of which layers, by which formula, and where their values stand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias, final

import torch

from torchlens_viz.attribution import cam, pixels
from torchlens_viz.attribution.goal import Goal
from torchlens_viz.attribution.layers import maps_to_explain, tokens_to_explain
from torchlens_viz.attribution.twin import Maps, Twin
from torchlens_viz.draw.blend import placed
from torchlens_viz.errors import InvalidArgumentError, TorchlensVizError, one_line
from torchlens_viz.models.images import AXES
from torchlens_viz.models.layers import select
from torchlens_viz.receptive.everywhere import receptive_fields
from torchlens_viz.receptive.field import ReceptiveField
from torchlens_viz.receptive.find import receptive_field

Method: TypeAlias = Literal[
    "gradcam", "gradcam++", "hirescam", "layercam", "eigencam", "ablationcam",
    "gradient", "smoothgrad", "integrated_gradients", "guided",
]  # fmt: skip

AT_PIXELS: Final = ("gradient", "smoothgrad", "integrated_gradients", "guided")
_EVENLY: Final = float("nan"), 0.0  # of an axis: where the first position stands, and the pixels to the next


@final
@dataclass(kw_only=True, eq=False)
class Way:
    """How heatmaps are made; what the first network decides, layers and places, holds for others too.

    Attributes:
        method: How.
        layers: Of which layers; None until they are chosen.
        samples: How often each image is shown.
        noise: How much noise is on it.
        seed: What that follows from.
        notes: What is to be said of it.
        places: For each layer the pixel of its first position, and the pixels from one to the next.
    """

    method: str
    layers: list[str] | None
    samples: int
    noise: float
    seed: int
    notes: list[str] = field(default_factory=list)
    places: dict[str, tuple[Sequence[float], Sequence[float]]] = field(default_factory=dict)

    def explained(self, twin: Twin, batch: torch.Tensor, goal: Goal) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the scores (N,) and the heatmaps (N, ...), on the CPU."""
        if self.method in AT_PIXELS:
            scores, heatmaps = self._at_pixels(twin, batch, goal)
        else:
            scores, heatmaps = self._of_layers(twin, batch, goal)
        return scores.detach().float().cpu(), heatmaps.detach().float().cpu()

    def _at_pixels(self, twin: Twin, batch: torch.Tensor, goal: Goal) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            scores = twin.scores(batch, goal)  # first, so that noise does not change which output counts
        if self.method == "integrated_gradients":
            parts = pixels.integrated_gradients(twin, batch, goal, samples=self.samples)
            return scores, parts.sum(1)
        if self.method == "smoothgrad":
            taken = pixels.smoothgrad(
                twin, batch, goal, samples=self.samples, noise=self.noise, seed=self.seed
            )
            return scores, pixels.strength(taken)
        if self.method == "guided" and not self.notes:
            self.notes.append(
                "guided rules show edges whatever a network has learnt: see the rank correlation of `trust`"
            )
        taken = (pixels.guided if self.method == "guided" else pixels.gradient)(twin, batch, goal)
        return scores, pixels.strength(taken)

    def _of_layers(self, twin: Twin, batch: torch.Tensor, goal: Goal) -> tuple[torch.Tensor, torch.Tensor]:
        is_ours = self.layers is None
        if self.layers is None:
            self.layers = _chosen(twin, batch, goal, self.method)
        needs_gradients = self.method in cam.BY_GRADIENT
        scores, found = twin.maps(batch, self.layers, goal, gradients=needs_gradients)
        if needs_gradients and not self.places:
            found = self._connected(found, is_ours=is_ours)
        new = [maps for maps in found if maps.layer not in self.places]
        fields = _fields_of_several(twin, batch, new) if len(new) > 1 else {}
        heatmaps = []
        for maps in found:
            if maps.layer not in self.places:
                self.places[maps.layer] = self._place(twin, batch, maps, fields.get(maps.layer))
            values = self._combined(twin, batch, maps, goal, scores)
            heatmaps.append(_placed(values, batch.shape[2:], *self.places[maps.layer]))
        if len(heatmaps) > 1 and not any("maximum" in note for note in self.notes):
            self.notes.append("the maximum of these layers, each divided by its own largest value")
        return scores, cam.fused(heatmaps)

    def _combined(
        self, twin: Twin, batch: torch.Tensor, maps: Maps, goal: Goal, scores: torch.Tensor
    ) -> torch.Tensor:
        if self.method == "eigencam":
            if not self.notes:
                self.notes.append("eigencam does not look at the target")
            return cam.eigencam(maps.values)
        if self.method == "ablationcam":
            return cam.ablationcam(twin, batch, maps, goal, scores)
        return cam.BY_GRADIENT[self.method](maps.values, maps.gradients)

    def _connected(self, found: list[Maps], *, is_ours: bool) -> list[Maps]:
        """Return what the score depends on; refuse what it does not, where the caller named it."""
        beside = [maps.layer for maps in found if not maps.is_connected]
        if beside and not is_ours:
            raise InvalidArgumentError(
                f"`layer` must lie on the way to the score, but no gradient leads from it to `{beside[0]}`; "
                "leave that out"
            )
        kept = [maps for maps in found if maps.is_connected]
        self.layers = [maps.layer for maps in kept]
        return kept

    def _place(
        self, twin: Twin, batch: torch.Tensor, maps: Maps, seen: ReceptiveField | None
    ) -> tuple[Sequence[float], Sequence[float]]:
        """Return the pixel under the first position and the pixels from one to the next."""
        size = tuple(maps.values.shape[2:])
        if len(size) != batch.ndim - 2:
            raise InvalidArgumentError(
                f"`layer` must put out maps (N, {AXES[batch.ndim - 2]}) for such an input, but "
                f"`{maps.layer}` puts out maps of {' x '.join(map(str, size))}; choose another layer"
            )
        reason = ""
        try:
            seen = seen or receptive_field(twin.model, maps.layer, batch.shape, channel_dim=maps.channel_dim)
            if seen.map_shape == size:
                first = seen.center((0,) * len(size))
                is_told = all(seen.stride) and seen.is_exact  # far in the padding of some networks
                if is_told or _is_within(first, seen.stride, size, batch.shape[2:]):
                    return first, seen.stride
        except TorchlensVizError as error:
            reason = f" ({one_line(error)})"
        if twin.grid is None:  # whose tokens are those of patches that lie side by side
            self.notes.append(
                f"`{maps.layer}` is spread evenly over the image, since where its positions stand cannot be "
                f"told{reason}"
            )
        origin, step = _EVENLY
        return [origin] * len(size), [step] * len(size)


def _fields_of_several(twin: Twin, batch: torch.Tensor, found: Sequence[Maps]) -> dict[str, ReceptiveField]:
    """Return what can be told of several layers in one pass."""
    dims = {maps.layer: maps.channel_dim for maps in found}
    return receptive_fields(twin.model, select(twin.model, list(dims)), [batch[:1]], {}, dims)


def _chosen(twin: Twin, batch: torch.Tensor, goal: Goal, method: str) -> list[str]:
    if twin.grid is not None:
        return tokens_to_explain(twin, batch, goal)
    return maps_to_explain(twin, batch, of_each_resolution=method == "layercam")


def _is_within(
    origin: Sequence[float], step: Sequence[float], count: Sequence[int], size: Sequence[int]
) -> bool:
    """Tell whether positions stand over the image, or at most one step beside it."""
    return all(
        each != 0  # below zero where the map is mirrored
        and all(-abs(each) <= end <= side - 1 + abs(each) for end in (first, first + each * (number_of - 1)))
        for first, each, number_of, side in zip(origin, step, count, size, strict=True)
    )


def _placed(
    maps: torch.Tensor, size: Sequence[int], origins: Sequence[float], steps: Sequence[float]
) -> torch.Tensor:
    """Return maps (N, ...) in pixels, (N, *size); near a value that is not finite stands NaN."""
    heatmaps = placed(maps, size, origins=origins, steps=steps, interpolation="bilinear")
    if not bool(maps.isfinite().all()):
        lost = (~maps.isfinite()).float()
        heatmaps[placed(lost, size, origins=origins, steps=steps, interpolation="nearest") > 0.5] = torch.nan
    return heatmaps
