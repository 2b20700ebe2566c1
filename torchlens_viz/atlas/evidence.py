"""What a network makes of the images of a page: maps, statistics, answers, and what made units fire."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from torch import nn

from torchlens_viz.album.pictures import Picture
from torchlens_viz.arguments import plain
from torchlens_viz.attribution.explain import explain
from torchlens_viz.attribution.explanation import Explanation
from torchlens_viz.attribution.project import project
from torchlens_viz.attribution.projection import Projection
from torchlens_viz.backprop.rules import Rule
from torchlens_viz.dataset.result import Survey
from torchlens_viz.dataset.survey import survey
from torchlens_viz.draw.maps import maps_of
from torchlens_viz.errors import InvalidArgumentError, TorchlensVizError, one_line
from torchlens_viz.hooks.capture import capture
from torchlens_viz.hooks.layout import marked_dim
from torchlens_viz.models.inputs import shown_to
from torchlens_viz.models.state import inference
from torchlens_viz.receptive.field import ReceptiveField
from torchlens_viz.receptive.find import followed_field

_RULES: Final[tuple[Rule, ...]] = ("guided", "gradient")


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class LayerEvidence:
    """What one layer makes of the images.

    Attributes:
        name: The layer's name.
        maps: For each image (C, h, w) float32 on the CPU; rows and columns may differ between images.
        calls: How often it ran for an image; the first call is shown.
    """

    name: str
    maps: tuple[torch.Tensor, ...]
    calls: int

    @property
    def channels(self) -> int:
        """How many channels it has."""
        return len(self.maps[0])

    def peaks(self) -> torch.Tensor:
        """(N, C): the highest value of each channel on each image; -Inf where there is none."""
        highest = [
            each.flatten(1).nan_to_num(-torch.inf, torch.inf, -torch.inf).amax(1) for each in self.maps
        ]
        return torch.stack(highest)

    def likeness(self) -> torch.Tensor:
        """(C, C): the correlation of every two channels' maps over all positions of all images; 0 if none."""
        values = torch.cat([each.flatten(1) for each in self.maps], 1).nan_to_num(0.0, 0.0, 0.0)
        values = values - values.mean(1, keepdim=True)
        lengths = torch.linalg.vector_norm(values, dim=1, keepdim=True)
        values = values / torch.where(lengths > 0, lengths, 1.0)
        found: torch.Tensor = (values @ values.T).clamp(-1, 1)
        return found


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Evidence:
    """What the network makes of the images.

    Attributes:
        layers: By name, in the order in which they ran.
        outputs: What the network puts out for each image, on the CPU; None where it is no tensor.
        without_maps: Layers that did not run, or put out nothing that can be drawn as maps.
    """

    layers: Mapping[str, LayerEvidence]
    outputs: tuple[torch.Tensor | None, ...]
    without_maps: tuple[str, ...]


def look(model: nn.Module, pictures: Sequence[Picture], names: Sequence[str]) -> Evidence:
    """Run the network once for each image, and keep what the layers put out.

    Raises:
        InvalidArgumentError: The network does not take an image, or no layer puts out maps.
    """
    found: dict[str, list[torch.Tensor]] = {}
    calls: dict[str, int] = {}
    failed: set[str] = set()
    outputs: list[torch.Tensor | None] = []
    for picture in pictures:
        with inference(model), capture(model, list(names), device="cpu") as acts:
            with shown_to(model, picture.batch, "images"):
                output = model(picture.batch.clone())  # it may work in place on what it gets
        outputs.append(output.detach().float().cpu() if isinstance(output, torch.Tensor) else None)
        failed |= set(acts.not_called)
        for name in acts:
            ran = acts.calls(name)
            calls[name] = max(calls.get(name, 0), len(ran))
            maps = _maps(ran[0])
            if maps is None:
                failed.add(name)
            else:
                found.setdefault(name, []).append(maps)
    layers = {
        name: LayerEvidence(name=name, maps=tuple(maps), calls=calls[name])
        for name, maps in found.items()
        if name not in failed and len({len(each) for each in maps}) == 1
    }
    if not layers:
        raise InvalidArgumentError(
            f"`layers` must select layers that put out maps (N, C, H, W), got {', '.join(names) or 'none'}; "
            "choose convolutions"
        )
    rest = tuple(name for name in names if name not in layers)
    return Evidence(layers=layers, outputs=tuple(outputs), without_maps=rest)


def _maps(output: object) -> torch.Tensor | None:
    """Return the maps (C, h, w) of what a layer put out for one image; of (1, C) maps of one pixel."""
    if not isinstance(output, torch.Tensor) or output.numel() == 0 or output.is_complex():
        return None
    values = plain(output)
    if values.ndim == 2 and len(values) == 1:
        return values[0, :, None, None].float()
    try:
        return maps_of(values, 0, channel_dim=marked_dim(output)).float()
    except TorchlensVizError:
        return None


def surveyed(model: nn.Module, pictures: Sequence[Picture], names: Sequence[str]) -> Survey:
    """Return the statistics of the layers over the images of the page."""
    batches = [picture.batch for picture in pictures]
    return survey(model, batches, list(names), top_k=1, progress=False, distributed=False)


def explained(model: nn.Module, picture: Picture, views: Mapping[str, Any]) -> tuple[Explanation | None, str]:
    """Return where the evidence for the network's answer lies; or None, and why there is none."""
    try:
        return explain(model, picture.given, **views), ""
    except TorchlensVizError as error:
        return None, one_line(error).partition(": ")[2] or str(error)


def projected(
    model: nn.Module, picture: Picture, layer: str, channels: Sequence[int], views: Mapping[str, Any]
) -> Projection | None:
    """Return what in an image made units fire, by the first rule that the network allows, if any."""
    for rule in _RULES:
        try:
            return project(model, layer, picture.given, list(channels), rule=rule, **views)
        except TorchlensVizError:
            continue
    return None


def field_of(model: nn.Module, layer: str, shape: Sequence[int]) -> ReceptiveField | None:
    """Return which pixels positions of a layer see; None where one pass does not tell it."""
    try:
        return followed_field(model, layer, shape)
    except TorchlensVizError:
        return None


def name_of(function: Callable[..., Any] | None) -> str:
    """Return what a preprocessing is called, without addresses of memory."""
    if function is None:
        return "none: pixels in [0, 1]"
    inner = getattr(function, "func", function)
    named = inner if hasattr(inner, "__qualname__") else type(inner)
    return f"{named.__module__}.{named.__qualname__}"
