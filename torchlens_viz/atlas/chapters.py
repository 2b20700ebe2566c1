"""What stands in the chapters of a page: images, health, layers and channels, in words and numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, final
from urllib.parse import quote

import torch

from torchlens_viz.album.album import View
from torchlens_viz.atlas.evidence import LayerEvidence
from torchlens_viz.atlas.health import Trouble, figure, percent
from torchlens_viz.atlas.layers import LayerPictures
from torchlens_viz.atlas.worth import Ranking, Ranks, Worth
from torchlens_viz.stats.channels import ChannelStats

AT_ONCE: Final = 64  # tiles of a sheet that stand open
_NEIGHBOURS: Final = 4
_LIKELIEST: Final = 5


@final
class Anchors:
    """Gives out the ids of a page, each once, whatever layers are called.

    Args:
        own: Ids that the page itself uses.
    """

    def __init__(self, own: Sequence[str]) -> None:
        self._taken = set(own)

    def take(self, wanted: str) -> str:
        """Return an id: what is wanted, or where that is taken, with a number."""
        name, number = wanted, 1
        while name in self._taken:
            number += 1
            name = f"{wanted}~{number}"
        self._taken.add(name)
        return name


def link(anchor: str) -> str:
    """Return the address of an id within the page."""
    return "#" + quote(anchor.encode("utf-8", "backslashreplace"), safe=":._-~()/")


class Place(NamedTuple):
    """Where a layer and its channels stand in the page: their ids, channels in the order of the page.

    Attributes:
        anchor: Of the layer.
        channels: Of the channels with an entry of their own.
        rest: Of the others: of a row with their figures, or of where all of them are shown.
        folded: Of where the others are shown.
    """

    anchor: str
    channels: Mapping[int, str]
    rest: Mapping[int, str]
    folded: str

    @property
    def order(self) -> list[int]:
        """The channels with an entry, the first ones first."""
        return list(self.channels)

    @property
    def hrefs(self) -> dict[int, str]:
        """The addresses of all channels within the page."""
        return {channel: link(anchor) for channel, anchor in {**self.channels, **self.rest}.items()}


@final
@dataclass(frozen=True, kw_only=True)
class Tile:
    """A small picture: the classes that show it, what it is, where it leads, its troubles and its ranks."""

    classes: str
    label: str
    href: str = ""
    keys: str = ""
    ranks: Ranks = ()


@final
@dataclass(frozen=True, kw_only=True)
class Sheet:
    """Tiles of all channels of a layer: those that stand open, and the rest one click away."""

    title: str
    note: str
    shown: tuple[Tile, ...]
    rest: tuple[Tile, ...]
    view: View


@final
@dataclass(frozen=True, kw_only=True)
class Figure:
    """A picture of one channel, with what it is. `over` is the picture of the image it lies upon, if any."""

    classes: str
    alt: str
    caption: str
    over: str = ""


@final
@dataclass(frozen=True, kw_only=True)
class Curve:
    """A line: its path in a box of 100 by 30, and what it says."""

    path: str
    alt: str


@final
@dataclass(frozen=True, kw_only=True)
class Neighbour:
    """A channel that is like another one."""

    channel: int
    href: str
    likeness: str


@final
@dataclass(frozen=True, kw_only=True)
class Channel:
    """All that the page says of one channel."""

    anchor: str
    href: str
    name: str
    keys: str
    ranks: Ranks
    badges: tuple[str, ...]
    figures: tuple[Figure, ...]
    patches: tuple[Figure, ...]
    relevant: tuple[Figure, ...]
    facts: tuple[tuple[str, str], ...]
    peaks: str
    verdict: str
    curve: Curve | None
    neighbours: tuple[Neighbour, ...]


@final
@dataclass(frozen=True, kw_only=True)
class Row:
    """The figures of a channel without an entry; `keys` are the troubles it has."""

    anchor: str
    cells: tuple[str, ...]
    keys: str
    ranks: Ranks


@final
@dataclass(frozen=True, kw_only=True)
class Rest:
    """The channels without an entry: pictures of eight each with their numbers below, and their figures."""

    anchor: str
    href: str
    count: int
    note: str
    classes: str
    strips: tuple[Tile, ...]
    heads: tuple[str, ...]
    rows: tuple[Row, ...]


@final
@dataclass(frozen=True, kw_only=True)
class Layer:
    """All that the page says of one layer."""

    anchor: str
    href: str
    name: str
    kind: str
    lines: tuple[str, ...]
    bars: str
    limits: tuple[str, str, str]
    sheets: tuple[Sheet, ...]
    channels: tuple[Channel, ...]
    rest: Rest | None
    rankings: tuple[Ranking, ...]
    troubles: tuple[Trouble, ...]
    total: int


@final
@dataclass(frozen=True, kw_only=True)
class Answer:
    """One output of the network for an image: what it is called, its share, and its value."""

    name: str
    share: float
    value: str


@final
@dataclass(frozen=True, kw_only=True)
class ImageChapter:
    """What the network says of an image, and why."""

    name: str
    size: tuple[int, int]
    photograph: str
    heatmap: str
    answers: tuple[Answer, ...]
    says: str
    why: str


def ranked(evidence: LayerEvidence) -> list[int]:
    """Return the channels of a layer, those with the highest value on any of the images first."""
    order: list[int] = evidence.peaks().amax(0).sort(descending=True, stable=True).indices.tolist()
    return order


def answers_of(output: torch.Tensor | None, names: Sequence[str] | None) -> tuple[tuple[Answer, ...], str]:
    """Return the highest outputs of a classifier, and what is to be said of them.

    Args:
        output: (1, K) of one image; of all else the shape is told.
        names: What the outputs are called, by index.
    """
    if output is None:
        return (), "The network puts out something else than one tensor."
    if output.ndim != 2 or len(output) != 1 or output.shape[1] < 2 or not bool(output.isfinite().all()):
        odd = "" if bool(output.isfinite().all()) else ", with NaN or Inf in it"
        return (), f"The network puts out a tensor of shape {tuple(output.shape)}{odd}."
    values = output[0].double()
    sums_to_one = bool((values >= 0).all()) and abs(values.sum().item() - 1) < 1e-3
    shares = values if sums_to_one else values.softmax(0)
    best = shares.topk(min(_LIKELIEST, len(shares)))
    rows = [
        Answer(
            name=names[place] if names is not None and place < len(names) else f"output {place}",
            share=share,
            value=figure(values[place].item()),
        )
        for share, place in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]
    what = "probabilities as the network gives them" if sums_to_one else "softmax of the outputs"
    return tuple(rows), f"The {len(rows)} highest of {len(values):,} outputs; {what}."


def facts_of(stats: ChannelStats, channel: int, inputs: int) -> tuple[tuple[str, str], ...]:
    """Return the figures of a channel, by name."""
    spoilt = int(stats.nonfinite[channel])
    rows = [
        ("mean", figure(stats.mean[channel].item())),
        ("std", figure(stats.std[channel].item())),
        ("least", figure(stats.min[channel].item())),
        ("most", figure(stats.max[channel].item())),
        ("zeros", percent(stats.zero_fraction[channel].item())),
    ]
    rows += [("NaN or Inf", f"{spoilt:,} values")] if spoilt else []
    return (*rows, ("inputs", f"{inputs:,}"))


def sheets_of(
    pictures: LayerPictures,
    order: Sequence[int],
    hrefs: Mapping[int, str],
    keys: Mapping[int, str],
    worth: Worth,
    names: Sequence[str],
) -> tuple[Sheet, ...]:
    """Return the sheets of a layer: its kernels, and its maps of each image."""
    views = [] if pictures.kernels is None else [("Kernels", pictures.kernels)]
    views += [(f"Maps of {name}", view) for name, view in zip(names, pictures.maps, strict=True)]
    found = []
    for title, view in views:
        tiles = [
            Tile(
                classes=view.block.tile(place),
                label=str(channel),
                href=hrefs[channel],
                keys=keys[channel],
                ranks=worth.ranks(channel),
            )
            for place, channel in enumerate(order)
        ]
        sheet = Sheet(
            title=title, note=view.note, shown=tuple(tiles[:AT_ONCE]), rest=tuple(tiles[AT_ONCE:]), view=view
        )
        found.append(sheet)
    return tuple(found)


def neighbours_of(
    likeness: torch.Tensor, shown: Sequence[int], hrefs: Mapping[int, str]
) -> dict[int, tuple[Neighbour, ...]]:
    """Return for each channel with an entry the channels whose maps are most like its own.

    Args:
        likeness: (C, C), how much the maps of every two channels are alike; only what is above 0 counts.
        shown: The channels with an entry.
        hrefs: The addresses of all channels.
    """
    among = likeness[list(shown)]
    among[range(len(shown)), list(shown)] = -2.0
    best = among.topk(min(_NEIGHBOURS, len(likeness)), dim=1)
    return {
        channel: tuple(
            Neighbour(channel=place, href=hrefs[place], likeness=f"{value:.2f}")
            for value, place in zip(values, places, strict=True)
            if value > 0
        )
        for channel, values, places in zip(shown, best.values.tolist(), best.indices.tolist(), strict=True)
    }


def peaks_of(evidence: LayerEvidence, channel: int, names: Sequence[str]) -> str:
    """Say where in the images a channel responds most."""
    parts = []
    for name, maps in zip(names, evidence.maps, strict=True):
        own = maps[channel].nan_to_num(-torch.inf, torch.inf, -torch.inf)
        row, column = divmod(int(own.argmax()), own.shape[1])
        parts.append(f"{figure(own[row, column].item())} at ({row}, {column}) on {name}")
    return "; ".join(parts)


def bars(heights: Sequence[float], height: int = 40) -> str:
    """Return a histogram as one path in a box that is as wide as there are bars."""
    steps = [f"H{place}V{height * (1 - each):.4g}H{place + 1}" for place, each in enumerate(heights)]
    return f"M0 {height}{''.join(steps)}V{height}Z" if heights else ""


def curve_of(history: torch.Tensor, layer: str) -> Curve | None:
    """Return a score's way through an ascent as a line."""
    values = history[history.isfinite()].double()
    if len(values) < 2:
        return None
    low, high = values.min().item(), values.max().item()
    width = high - low or 1.0
    points = [
        f"{100 * place / (len(values) - 1):.4g} {30 - 30 * (value - low) / width:.4g}"
        for place, value in enumerate(values.tolist())
    ]
    alt = f"score in {len(values)} steps: from {figure(values[0].item())} to {figure(values[-1].item())}"
    return Curve(path="M" + "L".join(points), alt=f"{alt} at {layer}")
