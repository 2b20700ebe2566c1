"""`top_projections`: what drives channels hardest, beside the pattern in it that does."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from math import ceil, sqrt
from typing import Any, get_args

import torch
from PIL import Image
from torch import nn

from torchlens_viz.arguments import integer, one_of
from torchlens_viz.attribution.project import project_units
from torchlens_viz.attribution.projection import as_picture
from torchlens_viz.attribution.units import Unit
from torchlens_viz.backprop.rules import Rule
from torchlens_viz.dataset.patches import Gallery, Sight, Source
from torchlens_viz.dataset.record import By
from torchlens_viz.dataset.result import Survey
from torchlens_viz.draw.rows import draw_rows
from torchlens_viz.draw.style import Style
from torchlens_viz.errors import InvalidTypeError
from torchlens_viz.models.inputs import InputOf


def top_projections(
    found: Survey,
    layer: str,
    channels: int | Sequence[int] | None,
    source: Any,
    *,
    rule: Rule = "deconvnet",
    by: By = "activation",
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
    """Draw what drives channels hardest beside the pattern in it that does: a block of each per channel.

    On the left stand the patches of the channel's top inputs, the highest first, as `Survey.grid` shows
    them; on the right, in the same order, the projection of each peak to the pixels of that patch, as
    `project` makes it from the whole input, each with a range of its own in which zero is the middle gray.

    Args:
        found: What `survey` found, with top inputs.
        layer: The layer's name.
        channels: Channels, by index from 0; None for all.
        source: The inputs that were surveyed, as in `Survey.patches`.
        rule: What passes a ReLU on the way back, as in `project`: `"deconvnet"`, `"guided"` or `"gradient"`.
        by: `"activation"`, or `"relevance"`, as in `Survey.patches`.
        preprocess: As in `Survey.patches`.
        invert: As in `Survey.patches`.
        input_of: As in `Survey.patches`.
        model: The model, for a survey from a file.
        tile: The longer side in pixels to which larger patches are shrunk.
        upscale: Enlarge each tile by this whole factor; None brings its longer side to at least 32.
        padding: Pixels between tiles.
        labels: Write the channel, the peak and the index of the input above each patch, and beside them the
            rule, or that a unit did not fire.
        title: A line above the sheet.

    Returns:
        An image of mode "RGB": for nine top inputs, three rows of three patches and three projections each.

    Raises:
        InvalidArgumentError: As in `Survey.patches` and `project`.
        InvalidTypeError: An argument has another type.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torchlens_viz import survey
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 5), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
        >>> images = torch.rand(40, 3, 32, 32)
        >>> found = survey(net, images.split(10), "2", progress=False)
        >>> top_projections(found, "2", [0, 3], images, labels=False, padding=0).size
        (210, 210)

    Source:
        Zeiler & Fergus, "Visualizing and Understanding Convolutional Networks", ECCV 2014, figure 2.
    """
    if not isinstance(found, Survey):
        raise InvalidTypeError(f"`found` must be a Survey, got {type(found).__name__}")
    one_of(rule, "rule", get_args(Rule))
    tile = integer(tile, "tile", least=1)
    style = Style(normalize=False, upscale=upscale, padding=padding, labels=labels, title=title)
    gallery = found.gallery(layer, channels, Source(source, preprocess, invert, input_of), by=by, model=model)
    sights = {channel: gallery.sights(channel) for channel in gallery.channels}
    gallery.require_some(list(sights.values()))
    projections = _projected(gallery, sights, rule)
    most = max(map(len, sights.values()))
    columns = ceil(sqrt(most))
    rows, words = [], []
    for channel, own in sights.items():
        for start in range(0, len(own), columns):
            part = own[start : start + columns]
            missing = columns - len(part)
            blank = torch.ones(3, 1, 1, device="cpu")
            patches = [sight.patch.pixels for sight in part] + [blank] * missing
            rows.append([*patches, *(projections[channel, sight.sample] for sight in part)])
            told = [f"{channel}: {sight.value:.3g} #{sight.sample}" for sight in part]
            words.append([*told, *[""] * missing, *_beside(part, rule, is_first=start == 0, by=by)])
    return draw_rows(rows, words, tile=tile, style=replace(style, nrow=2 * columns))


def _beside(part: Sequence[Sight], rule: Rule, *, is_first: bool, by: By) -> list[str]:
    """Return what stands above projections: their rule, and which of the units were off."""
    words = [rule if is_first and place == 0 else "" for place in range(len(part))]
    if by == "activation":
        words = [
            "did not fire" if sight.value <= 0 else word for word, sight in zip(words, part, strict=True)
        ]
    return words


def _projected(
    gallery: Gallery, sights: dict[int, list[Sight]], rule: Rule
) -> dict[tuple[int, int], torch.Tensor]:
    """Return the picture of each peak's projection, (3, h, w) in [0, 1], by channel and input."""
    by_sample: dict[int, list[tuple[int, Sight]]] = defaultdict(list)
    for channel, own in sights.items():
        for sight in own:
            by_sample[sight.sample].append((channel, sight))

    def images() -> Iterator[tuple[torch.Tensor, list[Unit]]]:
        for sample, wanted in by_sample.items():
            units = [Unit(channel, (sight.position[0], sight.position[1])) for channel, sight in wanted]
            yield gallery.whole(sample), units

    view = gallery.view
    made = project_units(view.model, view.layer, images(), rule=rule, channel_dim=view.channel_dim)
    found = {}
    for (sample, wanted), values in zip(by_sample.items(), made, strict=True):
        colours = gallery.colours(sample)
        for (channel, sight), own in zip(wanted, values, strict=True):
            found[channel, sample] = as_picture(own[:, *sight.patch.box], colours)
    return found
