"""What is told of single channels beyond their maps: ascents, projections and patches, as photographs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, final

import numpy as np
import torch
from torch import nn

from torchlens_viz.album.album import Album
from torchlens_viz.album.album import View as Tiles
from torchlens_viz.album.sprite import fitted
from torchlens_viz.ascent.result import Maximization
from torchlens_viz.atlas.chapters import Curve, Figure, curve_of
from torchlens_viz.atlas.evidence import LayerEvidence
from torchlens_viz.atlas.health import figure
from torchlens_viz.attribution.projection import Projection
from torchlens_viz.dataset.patches import Gallery, Source, View
from torchlens_viz.dataset.result import Survey
from torchlens_viz.errors import InvalidArgumentError
from torchlens_viz.stats.topk import Top

_IMAGE: Final = 128  # the longest side of an ascent's image
_CROP: Final = 64  # and of a projection
_PATCH: Final = 48  # and of a patch
_EXACT: Final = 24  # the longest side of tiles that are kept without loss
_UNIT: Final = 16  # sides are multiples of it, so that lossy encoding mixes no two tiles
_LEAST: Final = 96
_UNCLIPPED: Final = 0.995
_VERDICTS: Final = {
    "threshold": "passed the threshold",
    "steps": "all steps were made",
    "stalled": "gained nothing over the last quarter of its steps",
    "dead": "dead: no gradient from any start, so that no image drives it",
    "nonfinite": "a score or gradient was NaN or infinite",
}


@final
@dataclass(kw_only=True)
class Units:
    """What is told of the channels of one layer.

    Attributes:
        figures: Pictures of each channel: ascents and projections.
        patches: What its peaks saw.
        relevant: What it saw of the inputs for whose score it mattered most, where the survey had a target.
        verdicts: How its ascent ended, in words.
        curves: The score on its way.
        notes: What is to be said of the layer.
    """

    figures: dict[int, list[Figure]] = field(default_factory=dict)
    patches: dict[int, list[Figure]] = field(default_factory=dict)
    relevant: dict[int, list[Figure]] = field(default_factory=dict)
    verdicts: dict[int, str] = field(default_factory=dict)
    curves: dict[int, Curve | None] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def draw_units(
    album: Album,
    layer: LayerEvidence,
    model: nn.Module,
    shown: Sequence[int],
    *,
    maximized: Maximization | None,
    projections: Mapping[str, Projection],
    survey: Survey | None,
    source: Source | None,
    most: int,
) -> Units:
    """Draw what is told of the channels of a layer into a sprite of its own.

    Args:
        album: Where the sprite goes.
        layer: What the layer makes of the images.
        model: The network.
        shown: The channels that the page shows, the first ones first.
        maximized: The images that drive some channels hardest.
        projections: For an image, by name, what in it made some channels fire.
        survey: What a data set made of the layer.
        source: The inputs of the survey.
        most: Of how many channels patches are drawn.
    """
    units, sprites = Units(), _Sprites(album, layer.name)
    if maximized is not None:
        _add_images(sprites, units, maximized, shown)
    for name, projection in projections.items():
        _add_projections(sprites, units, projection, name, shown)
    if survey is not None and source is not None and layer.name in survey.top and layer.calls == 1:
        view = View(model, layer.name, survey.input_shape, None)
        _add_patches(sprites, units, units.patches, survey.top[layer.name], shown[:most], source, view)
        if layer.name in survey.top_by_relevance:
            top = survey.top_by_relevance[layer.name]
            _add_patches(sprites, units, units.relevant, top, shown[:most], source, view)
        if len(shown) > most:
            units.notes.append(f"Patches of the data set are shown for the first {most} channels.")
    sprites.close()
    return units


@final
class _Sprites:
    """Two sprites of one layer: in one, small tiles stay exact; in the other, larger ones are photographs."""

    def __init__(self, album: Album, layer: str) -> None:
        self._album, self._layer = album, layer
        self._exact, self._lossy = (album.sprite(gap=gap) for gap in (1, 0))

    def add(self, pictures: Sequence[torch.Tensor], most: int, *, least: int) -> Tiles:
        """Add pictures (3, h, w) in [0, 1] as tiles of one size, of which no side is longer than `most`."""
        longest = max(max(each.shape[1:]) for each in pictures)
        is_small = longest <= _EXACT
        side = max(1, longest) if is_small else min(most, -(-longest // _UNIT) * _UNIT)
        tiles = np.stack([fitted(each, side) for each in pictures])
        return self._album.add(self._exact if is_small else self._lossy, tiles, None, "", least=least)

    def close(self) -> None:
        """Make pictures of both."""
        if self._exact.blocks:
            self._album.close(self._exact, self._exact.as_colours(), f"{self._layer}-units")
        if self._lossy.blocks:
            self._album.close(self._lossy, self._lossy.as_photographs(), f"{self._layer}-photographs")


def _add_images(sprites: _Sprites, units: Units, found: Maximization, shown: Sequence[int]) -> None:
    low, high = found.limits
    images = (
        found.images
        if found.images.shape[1] == 3
        else found.images.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    )
    places = [place for place, channel in enumerate(found.channels.tolist()) if channel in set(shown)]
    if not places or not found.names_channels:
        return
    view = sprites.add([(images[place] - low) / (high - low) for place in places], _IMAGE, least=_LEAST)
    for tile, place in enumerate(places):
        channel, score = int(found.channels[place]), figure(found.scores[place].item())
        rank = int(found.ranks[place])
        among = "drives no channel of the layer more" if rank == 0 else f"drives {rank} other channels more"
        alt = f"image that drives channel {channel} of {found.layer} hardest, score {score}"
        caption = f"maximised at {found.layer}: {score}"
        units.figures.setdefault(channel, []).append(
            Figure(classes=view.block.tile(tile), alt=alt, caption=caption)
        )
        if channel not in units.verdicts:
            status = found.status[place]
            units.verdicts[channel] = (
                f"Ascent at {found.layer} ({found.objective}): score {score}, {_VERDICTS[status]}; "
                f"{found.evidence[place]}; the image {among}."
            )
            units.curves[channel] = curve_of(found.history[place], found.layer)


def _add_projections(
    sprites: _Sprites, units: Units, found: Projection, name: str, shown: Sequence[int]
) -> None:
    places = [place for place, channel in enumerate(found.channels.tolist()) if channel in set(shown)]
    if not places:
        return
    parts = [found.images[place][:, *found.regions[place]] for place in places]
    view = sprites.add([_in_gray_and_colour(part, found.colours) for part in parts], _CROP, least=_LEAST)
    beside = sprites.add([found.pixels[:, *found.regions[place]] for place in places], _CROP, least=_LEAST)
    for tile, place in enumerate(places):
        channel = int(found.channels[place])
        row, column = found.positions[place].tolist()
        units.figures.setdefault(channel, []).extend(
            [
                Figure(
                    classes=view.block.tile(tile),
                    alt=f"projection of channel {channel} at ({row}, {column}) to the pixels of {name}",
                    caption=f"{found.rule} projection, {name}",
                ),
                Figure(
                    classes=beside.block.tile(tile),
                    alt=f"the part of {name} that the highest unit of channel {channel} sees",
                    caption="what that unit sees",
                ),
            ]
        )


def _in_gray_and_colour(values: torch.Tensor, colours: torch.Tensor | None) -> torch.Tensor:
    """Return a projection (C, h, w) as pixels (3, h, w): middle gray is zero."""
    if len(values) != 3:
        values = values.mean(0, keepdim=True).expand(3, -1, -1)
    elif colours is not None:
        values = torch.einsum("ck,chw->khw", colours, values)
    sizes = values.nan_to_num(0.0, 0.0, 0.0).abs().flatten()
    if not len(sizes):
        return values
    reach = float(sizes.kthvalue(max(1, round(_UNCLIPPED * len(sizes)))).values) or float(sizes.max()) or 1.0
    return 0.5 + values / (2 * reach)


def _add_patches(
    sprites: _Sprites,
    units: Units,
    kept: dict[int, list[Figure]],
    top: Top,
    shown: Sequence[int],
    source: Source,
    view_of_layer: View,
) -> None:
    try:
        gallery = Gallery(top, shown, source, view_of_layer)
        cut = [[sight.patch for sight in gallery.sights(channel)] for channel in shown]
    except InvalidArgumentError as error:
        units.notes.append(f"No patches of the data set: {error}.")
        return
    cut_of = [
        (channel, place, patch.pixels)
        for channel, patches in zip(shown, cut, strict=True)
        for place, patch in enumerate(patches)
    ]
    if not cut_of:
        return
    view = sprites.add([pixels for _, _, pixels in cut_of], _PATCH, least=_CROP)
    for tile, (channel, place, _) in enumerate(cut_of):
        value, sample = figure(top.values[channel, place].item()), int(top.samples[channel, place])
        kept.setdefault(channel, []).append(
            Figure(
                classes=view.block.tile(tile),
                alt=f"what channel {channel} sees of input {sample}: {value}",
                caption=f"{value}, input {sample}",
            )
        )
