"""A page from its evidence: what the network is shown and asked, chapter by chapter."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from torch import nn

from torchlens_viz import __version__
from torchlens_viz.album.album import Album
from torchlens_viz.album.pictures import Picture
from torchlens_viz.album.shelf import Shelf
from torchlens_viz.album.sprite import as_bytes, photograph
from torchlens_viz.ascent.result import Maximization
from torchlens_viz.atlas import chapters, evidence, page
from torchlens_viz.atlas.chapters import Anchors, ImageChapter, Place, link
from torchlens_viz.atlas.contrast import Contrast, contrast_of
from torchlens_viz.atlas.entries import Voice, entry_of
from torchlens_viz.atlas.evidence import Evidence, LayerEvidence
from torchlens_viz.atlas.health import health_of
from torchlens_viz.atlas.layers import LayerPictures, draw_layer
from torchlens_viz.atlas.units import draw_units
from torchlens_viz.atlas.worth import columns_of
from torchlens_viz.attribution.projection import Projection
from torchlens_viz.comparison.result import Comparison
from torchlens_viz.dataset.patches import Source
from torchlens_viz.dataset.result import Survey
from torchlens_viz.files.tensors import checksum
from torchlens_viz.models.colours import Bands
from torchlens_viz.models.layers import select_one, unwrap

_MANY: Final = 4096  # channels, above which only the first of each layer have an entry of their own
_SOME: Final = (64, 48, 32, 24, 16, 12, 8)  # of each layer
_MOST_FIGURES: Final = 20_000  # pictures in these entries
_MOST_ROWS: Final = 50_000  # channels without an entry, above which their figures are left out
_MOST_SMALL: Final = 3_000_000  # pixels of those in all
_SMALL: Final = ((12, 64), (8, 64), (8, 1), (6, 1), (4, 1))  # a side, and of how many images
_MOST_PIXELS: Final = 2_500_000  # of maps in all
_SIDES: Final = (128, 112, 96, 80, 64, 56, 48, 40, 32, 28, 24, 16, 14, 8)
_MOST_PATCHES: Final = 24  # channels of each layer with patches of the data set
_PROJECTED: Final = 8  # channels of each layer
_MOST_LAYERS: Final = 16  # with projections; of more, so many are chosen
_PROJECTED_IMAGES: Final = 2


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Wishes:
    """What `report` was asked for, checked; its options say what each is."""

    survey: Survey | None
    comparison: Comparison | None
    source: Source | None
    maximized: Mapping[str, Maximization]
    preprocess: Callable[[Any], torch.Tensor] | None
    invert: Callable[[torch.Tensor], torch.Tensor] | None
    bands: Bands
    names: Sequence[str] | None
    targets: Sequence[int] | None
    max_channels: int | None
    projections: int | None
    explain: bool
    title: str
    about: Mapping[str, str]

    @property
    def views(self) -> dict[str, Any]:
        """How the model, and how a person, sees an image: what `explain` and `project` take by keyword."""
        return {"preprocess": self.preprocess, "invert": self.invert, "bands": self.bands}


def written(
    model: nn.Module, pictures: Sequence[Picture], wanted: Sequence[str], wishes: Wishes, shelf: Shelf
) -> str:
    """Return the page as text.

    Args:
        model: The network.
        pictures: The images to show it.
        wanted: The names of the layers to show.
        wishes: Everything else.
        shelf: Where the pictures of the page are kept.

    Raises:
        InvalidArgumentError: The model does not take an image, or no layer puts out maps.
    """
    seen = evidence.look(model, pictures, wanted)
    surveys = _surveys(model, pictures, seen, wishes.survey)
    health = health_of(surveys, {name: _shape(layer) for name, layer in seen.layers.items()})
    places = _places(seen, wishes.max_channels)
    side, small = _side(seen, places), _small(places, len(pictures))
    voice = Voice([picture.name for picture in pictures], wishes.names, wishes.targets)
    album, overlays = Album(shelf=shelf), page.Overlays()
    projected = _projected(list(seen.layers), wishes.projections)
    layers = []
    for name, layer in seen.layers.items():
        place, survey = places[name], surveys[name]
        order = place.order
        drawn = draw_layer(album, model, layer, order, list(place.rest), side=side, small=small)
        units = draw_units(
            album,
            layer,
            model,
            order,
            maximized=wishes.maximized.get(name),
            projections=_projections(model, pictures, name, order[: projected.get(name, 0)], wishes),
            survey=survey,
            source=wishes.source if survey is wishes.survey else None,
            most=_MOST_PATCHES,
        )
        if name not in projected:
            units.notes.append(
                f"Projections are made for {_MOST_LAYERS} layers from first to last, without this."
            )
        _lay(overlays, model, name, layer, drawn, pictures)
        kind = select_one(model, name).module
        layers.append(entry_of(layer, kind, place, drawn, units, survey, health, voice))
    images = [
        _image(model, picture, output, wishes, shelf)
        for picture, output in zip(pictures, seen.outputs, strict=True)
    ]
    return page.rendered(
        title=wishes.title,
        head=_head(model, pictures, wishes, seen),
        images=images,
        health=health,
        layers=layers,
        places=places,
        contrast=_contrast(wishes.comparison, places, shelf),
        orders={
            column.key: column.name for name in seen.layers for column in columns_of(surveys[name], name)
        },
        classes=[(target, voice.name_of(target)) for target in sorted(set(wishes.targets or ()))],
        album=album,
        overlays=overlays,
    )


def _surveys(
    model: nn.Module, pictures: Sequence[Picture], seen: Evidence, survey: Survey | None
) -> dict[str, Survey]:
    """Return for each layer the survey that speaks of it: the given one, or else one of the images."""
    given = set() if survey is None else set(survey.stats)
    rest = [name for name, layer in seen.layers.items() if name not in given or _differs(survey, layer)]
    own = evidence.surveyed(model, pictures, rest) if rest else None
    found: dict[str, Survey] = {}
    for name in seen.layers:
        chosen = own if name in rest else survey
        assert chosen is not None
        found[name] = chosen
    return found


def _differs(survey: Survey | None, layer: LayerEvidence) -> bool:
    return survey is not None and survey.stats[layer.name].channels != layer.channels


def _contrast(comparison: Comparison | None, places: Mapping[str, Place], shelf: Shelf) -> Contrast | None:
    if comparison is None:
        return None
    return contrast_of(comparison, {name: link(place.anchor) for name, place in places.items()}, shelf)


def _places(seen: Evidence, max_channels: int | None) -> dict[str, Place]:
    """Give layers and channels their ids, and say which channels have an entry of their own."""
    counts = [layer.channels for layer in seen.layers.values()]
    most = max_channels or _entries(counts, len(seen.outputs))
    without = sum(max(0, count - most) for count in counts)
    anchors, places = Anchors(page.OWN_ANCHORS), {}
    for name, layer in seen.layers.items():
        own, order = anchors.take(name or "(model)"), chapters.ranked(layer)
        ids = {channel: anchors.take(f"{own}:{channel}") for channel in order[:most]}
        folded = anchors.take(f"{own}:rest")
        rest = {
            channel: anchors.take(f"{own}:{channel}") if without <= _MOST_ROWS else folded
            for channel in order[most:]
        }
        places[name] = Place(own, ids, rest, folded)
    return places


def _entries(counts: Sequence[int], images: int) -> int:
    """Return how many channels of each layer have an entry of their own, of layers with so many channels."""
    pictures = 2 * images + 1
    if sum(counts) <= _MANY and sum(counts) * pictures <= _MOST_FIGURES:
        return max(counts)
    fitting = (
        most for most in _SOME if sum(min(count, most) for count in counts) * pictures <= _MOST_FIGURES
    )
    return next(fitting, _SOME[-1])


def _small(places: Mapping[str, Place], images: int) -> tuple[int, int]:
    """Return how large channels without an entry are shown: pixels a side, and of how many images."""
    count = sum(len(place.rest) for place in places.values())
    for side, most in _SMALL:
        if count * side**2 * (min(images, most) + 1) <= _MOST_SMALL:
            break
    return side, min(images, most)


def _side(seen: Evidence, places: Mapping[str, Place]) -> int:
    """Return the longest side of maps at which the page stays small."""
    for side in _SIDES:
        pixels = 0
        for name, layer in seen.layers.items():
            for maps in layer.maps:
                factor = -(-max(maps.shape[1:]) // side)
                pixels += len(places[name].order) * maps[0].numel() // factor**2
        if pixels <= _MOST_PIXELS:
            return side
    return _SIDES[-1]


def _shape(layer: LayerEvidence) -> str:
    shapes = {tuple(each.shape[1:]) for each in layer.maps}
    height, width = layer.maps[0].shape[1:]
    return f"{layer.channels} × {height} × {width}" if len(shapes) == 1 else f"{layer.channels} × various"


def _projected(names: Sequence[str], wanted: int | None) -> dict[str, int]:
    """Return for how many channels of which layers projections are made.

    Args:
        names: The layers, in the order in which they ran.
        wanted: For how many channels of each; None chooses, from the first layer to the last, so many layers
            at equal distances that it takes no longer in a deep network than in one with as many layers.
    """
    if wanted is not None:
        return dict.fromkeys(names, wanted)
    last, count = len(names) - 1, min(len(names), _MOST_LAYERS)
    return {names[round(place * last / max(1, count - 1))]: _PROJECTED for place in range(count)}


def _projections(
    model: nn.Module, pictures: Sequence[Picture], layer: str, channels: Sequence[int], wishes: Wishes
) -> dict[str, Projection]:
    """Return what in the first images made channels fire, by the image's name."""
    found = {}
    for picture in pictures[:_PROJECTED_IMAGES] if channels else ():
        one = evidence.projected(model, picture, layer, channels, wishes.views)
        if one is not None:
            found[picture.name] = one
    return found


def _lay(
    overlays: page.Overlays,
    model: nn.Module,
    name: str,
    layer: LayerEvidence,
    drawn: LayerPictures,
    pictures: Sequence[Picture],
) -> None:
    """Note where the maps of a layer stand over each image."""
    fields: dict[tuple[int, ...], Any] = {}
    for place, picture in enumerate(pictures):
        shape = tuple(picture.batch.shape)
        if shape not in fields:
            fields[shape] = evidence.field_of(model, name, shape)
        overlays.add(
            drawn.maps[place].block.number,
            place,
            fields[shape],
            map_shape=tuple(layer.maps[place].shape[1:]),
            shrink=drawn.shrink[place],
            image_shape=tuple(picture.pixels.shape[1:]),
            signed=drawn.limits.signed,
        )


def _head(
    model: nn.Module, pictures: Sequence[Picture], wishes: Wishes, seen: Evidence
) -> list[tuple[str, str]]:
    parameters, kind = sum(each.numel() for each in model.parameters()), type(unwrap(model))
    shapes = dict.fromkeys(" × ".join(map(str, picture.batch.shape[1:])) for picture in pictures)
    versions = {"torchlens_viz": __version__, "torch": torch.__version__, "Python": platform.python_version()}
    rows = {
        "model": f"{kind.__module__}.{kind.__qualname__}, {parameters:,} parameters",
        page.CHECKSUM: f"{checksum(unwrap(model)):08x}",
        "input": ", ".join(shapes),
        page.PREPROCESSING: evidence.name_of(wishes.preprocess),
        "made by": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }
    rows |= {str(name): str(value) for name, value in wishes.about.items()}
    if seen.without_maps:
        rows["not shown"] = f"did not run, or puts out no maps: {', '.join(seen.without_maps)}"
    return list(rows.items())


def _image(
    model: nn.Module, picture: Picture, output: torch.Tensor | None, wishes: Wishes, shelf: Shelf
) -> ImageChapter:
    answers, says = chapters.answers_of(output, wishes.names)
    heatmap, why = "", ""
    if wishes.explain:
        found, reason = evidence.explained(model, picture, wishes.views)
        why = f"No explanation: {reason}."
        if found is not None:
            heatmap = shelf.address(photograph(found.overlay(0, upscale=1)), f"{picture.name}-evidence")
            what = answers[0].name if answers else found.label(0, wishes.names)
            why = f"Where the evidence for “{what}” lies: {'; '.join(found.legend())}."
    height, width = picture.pixels.shape[1:]
    return ImageChapter(
        name=picture.name,
        size=(width, height),
        photograph=shelf.address(photograph(as_bytes(picture.pixels)), picture.name),
        heatmap=heatmap,
        answers=answers,
        says=says,
        why=why,
    )
