"""The entry of a layer: its pictures, figures and findings put together, channel by channel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import nn

from torchlens_viz.atlas import chapters
from torchlens_viz.atlas.chapters import Channel, Figure, Layer, Place, Rest, Row, Tile, link
from torchlens_viz.atlas.evidence import LayerEvidence
from torchlens_viz.atlas.health import Health, figure, histogram, percent
from torchlens_viz.atlas.layers import ACROSS, LayerPictures
from torchlens_viz.atlas.units import Units
from torchlens_viz.atlas.worth import Worth, columns_of
from torchlens_viz.dataset.result import Survey
from torchlens_viz.stats.channels import ChannelStats


class Voice(NamedTuple):
    """What things are called.

    Attributes:
        images: The names of the images.
        outputs: What the network's outputs are called, by index.
        targets: The class of each input of the survey, or of each image.
    """

    images: Sequence[str]
    outputs: Sequence[str] | None
    targets: Sequence[int] | None

    def name_of(self, index: int) -> str:
        """Return what a class is called."""
        names = self.outputs
        return names[index] if names is not None and 0 <= index < len(names) else f"class {index}"


def entry_of(
    layer: LayerEvidence,
    module: nn.Module,
    place: Place,
    drawn: LayerPictures,
    units: Units,
    survey: Survey,
    health: Health,
    voice: Voice,
) -> Layer:
    """Return all that the page says of one layer.

    Args:
        layer: What it makes of the images.
        module: The layer itself.
        place: Where it and its channels stand in the page.
        drawn: Its pictures.
        units: What is told of single channels.
        survey: What its statistics rest on.
        health: The findings.
        voice: What things are called.
    """
    marks, classes = health.marks[layer.name], _classes(layer, survey, voice.targets)
    hrefs = place.hrefs
    worth = Worth(columns_of(survey, layer.name), hrefs)
    badges = {
        channel: (
            *marks.get(channel, ()),
            *([voice.name_of(classes[channel])] if channel in classes else []),
        )
        for channel in range(layer.channels)
    }
    keys = {
        channel: " ".join(
            [
                *marks.get(channel, ()),
                *([f"class-{classes[channel]}"] if channel in classes else []),
                *worth.marks(channel),
            ]
        )
        for channel in range(layer.channels)
    }
    neighbours = chapters.neighbours_of(layer.likeness(), place.order, hrefs)
    stats, inputs = survey.stats[layer.name], survey.inputs_seen[layer.name]
    channels = tuple(
        Channel(
            anchor=place.channels[channel],
            href=hrefs[channel],
            name=f"{layer.name or '(the model)'}:{channel}",
            keys=keys[channel],
            ranks=worth.ranks(channel),
            badges=badges[channel],
            figures=(*_pictures(drawn, number, channel, voice.images), *units.figures.get(channel, ())),
            patches=tuple(units.patches.get(channel, ())),
            relevant=tuple(units.relevant.get(channel, ())),
            facts=(*chapters.facts_of(stats, channel, inputs), *worth.facts(channel)),
            peaks=chapters.peaks_of(layer, channel, voice.images),
            verdict=units.verdicts.get(channel, ""),
            curve=units.curves.get(channel),
            neighbours=neighbours[channel],
        )
        for number, channel in enumerate(place.order)
    )
    low, high = drawn.limits.low, drawn.limits.high
    return Layer(
        anchor=place.anchor,
        href=link(place.anchor),
        name=layer.name or "(the model)",
        kind=type(module).__name__ if module._modules else " ".join(str(module).split()),
        lines=(*_lines(layer, place, drawn), *units.notes),
        bars=chapters.bars(histogram(layer.maps, low, high)),
        limits=(figure(low), "0" if low < 0 < high else "", figure(high)),
        sheets=chapters.sheets_of(drawn, place.order, hrefs, keys, worth, voice.images),
        channels=channels,
        rest=_rest(layer, place, drawn, stats, worth, keys, badges) if place.rest else None,
        rankings=worth.rankings(),
        troubles=tuple(each for each in health.troubles if each.layer == layer.name),
        total=layer.channels,
    )


def _classes(layer: LayerEvidence, survey: Survey, targets: Sequence[int] | None) -> Mapping[int, int]:
    """Return the class of the input that drives each channel hardest, where that is known."""
    if targets is None:
        return {}
    top = survey.top.get(layer.name)
    has_top = top is not None and top.samples.shape[1] > 0
    best = top.samples[:, 0].tolist() if top is not None and has_top else layer.peaks().argmax(0).tolist()
    return {channel: targets[index] for channel, index in enumerate(best) if 0 <= index < len(targets)}


def _lines(layer: LayerEvidence, place: Place, drawn: LayerPictures) -> list[str]:
    limits, count = drawn.limits, len(place.order)
    shown = "all shown" if count == layer.channels else f"{count} of them with an entry"
    lines = [
        f"{layer.channels} channels, {shown}, ranked by their highest value on these images.",
        f"Colours and histogram end at {figure(limits.low)} and {figure(limits.high)}; "
        f"{100 * limits.beyond:.2g} % of the values lie beyond and are drawn as the limit.",
    ]
    return lines + (
        [f"It ran {layer.calls} times for an image; the first is shown."] if layer.calls > 1 else []
    )


def _pictures(drawn: LayerPictures, place: int, channel: int, images: Sequence[str]) -> list[Figure]:
    found = []
    if drawn.kernels is not None:
        classes = f"{drawn.kernels.block.tile(place)} large"
        found.append(Figure(classes=classes, alt=f"kernel of channel {channel}", caption="kernel"))
    for number, (name, view) in enumerate(zip(images, drawn.maps, strict=True)):
        classes = view.block.tile(place)
        found += [
            Figure(
                classes=f"{classes} large", alt=f"map of channel {channel} on {name}", caption=f"map, {name}"
            ),
            Figure(
                classes=classes,
                alt=f"map of channel {channel} over {name}",
                caption="over the image: red is above zero"
                if view.limits and view.limits.signed
                else "over the image",
                over=f"o p{number}",
            ),
        ]
    return found


def _rest(
    layer: LayerEvidence,
    place: Place,
    drawn: LayerPictures,
    stats: ChannelStats,
    worth: Worth,
    keys: Mapping[int, str],
    badges: Mapping[int, Sequence[str]],
) -> Rest:
    """Return what is told of the channels without an entry."""
    assert drawn.strips is not None
    order = list(place.rest)
    strips = [
        Tile(
            classes=drawn.strips.block.tile(number), label="\t".join(map(str, order[first : first + ACROSS]))
        )
        for number, first in enumerate(range(0, len(order), ACROSS))
    ]
    rows: list[Row] = []
    if place.folded not in place.rest.values():
        columns = [layer.peaks().amax(0), stats.mean, stats.std, stats.min, stats.max]
        written = [[figure(value) for value in column[order].tolist()] for column in columns]
        zeros = [percent(share) for share in stats.zero_fraction[order].tolist()]
        rows = [
            Row(
                anchor=place.rest[channel],
                cells=(str(channel), *cells, *worth.cells(channel), ", ".join(badges[channel])),
                keys=keys[channel],
                ranks=worth.ranks(channel),
            )
            for channel, *cells in zip(order, *written, zeros, strict=True)
        ]
    return Rest(
        anchor=place.folded,
        href=link(place.folded),
        count=len(order),
        note=f"Of each channel {drawn.strips.note}, shrunk, in the colours above; the highest value first.",
        classes=f"s{drawn.strips.block.number}",
        strips=tuple(strips),
        heads=("channel", "highest here", "mean", "std", "least", "most", "zeros", *worth.heads, ""),
        rows=tuple(rows),
    )
