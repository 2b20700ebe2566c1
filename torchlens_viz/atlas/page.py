"""HTML: the template, its style and script, sprites as style, and a policy that lets nothing else in."""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Final, final

from torchlens_viz.album.album import Album
from torchlens_viz.album.sprite import gradient
from torchlens_viz.atlas.chapters import ImageChapter, Layer, Place, link
from torchlens_viz.atlas.contrast import Contrast
from torchlens_viz.atlas.health import KINDS, Health, figure, percent
from torchlens_viz.atlas.worth import CHOICES
from torchlens_viz.errors import needed
from torchlens_viz.receptive.field import ReceptiveField

OWN_ANCHORS: Final = (
    *("page:top", "page:main", "page:images", "page:health", "page:layers", "page:search"),
    *("page:found", "page:filter", "page:list", "page:tools", "page:count", "page:order", "page:comparison"),
)
CHECKSUM: Final = "checksum of the weights"
PREPROCESSING: Final = "preprocessing"
_OVERLAY: Final = 168  # CSS pixels of the longer side of an image under maps


def require_engine() -> Any:
    """Return jinja2.

    Raises:
        MissingDependencyError: It is not installed.
    """
    return needed("jinja2", "`report` fills its page with jinja2", "report")


@final
class Overlays:
    """Where maps stand over images: rules of style, a rule for each block of maps."""

    def __init__(self) -> None:
        self.rules: list[str] = []

    def add(
        self,
        block: int,
        image: int,
        field: ReceptiveField | None,
        *,
        map_shape: Sequence[int],
        shrink: int,
        image_shape: Sequence[int],
        signed: bool,
    ) -> None:
        """Lay the maps of a block over an image, each value where the layer's receptive field has it.

        Args:
            block: The number of the block.
            image: The number of the image.
            field: The receptive field; None, or one without places, spreads the map over all of the image.
            map_shape: Rows and columns of the maps, before they were shrunk.
            shrink: How many positions a pixel of the block stands for, each way.
            image_shape: Height and width of the image.
            signed: Whether zero is white: then the map colours the image, else it darkens what is near zero.
        """
        scale = _OVERLAY / max(image_shape)
        steps = [side / count for side, count in zip(image_shape, map_shape, strict=True)]
        starts = [0.0, 0.0]
        if field is not None and tuple(field.map_shape[-2:]) == tuple(map_shape) and min(field.stride) > 0:
            steps = list(field.stride)
            starts = [
                origin + 0.5 - step / 2 for origin, step in zip(field.center((0, 0)), steps, strict=True)
            ]
        (top, left), (down, across) = ([scale * each for each in pair] for pair in (starts, steps))
        self.rules.append(
            f".p{image}>.b{block}{{top:{top:.3f}px;left:{left:.3f}px;"
            f"--fy:{down * shrink:.4f};--fx:{across * shrink:.4f};"
            f"mix-blend-mode:{'color' if signed else 'multiply'}}}"
        )


def rendered(
    *,
    title: str,
    head: Sequence[tuple[str, str]],
    images: Sequence[ImageChapter],
    health: Health,
    layers: Sequence[Layer],
    places: Mapping[str, Place],
    contrast: Contrast | None,
    orders: Mapping[str, str],
    classes: Sequence[tuple[int, str]],
    album: Album,
    overlays: Overlays,
) -> str:
    """Return the page.

    Every text is escaped by the template's engine; what is not is the style and the script, which hold none
    of the caller's words, and of which the policy names the hashes.
    """
    told, markup = dict(head), require_engine().utils.markupsafe.Markup
    style, script = _own_file("page.css") + _rules(album, overlays, images), _own_file("page.js")
    policy = (
        f"default-src 'none'; img-src {album.shelf.sources}; style-src '{_hash(style)}'; "
        f"script-src '{_hash(script)}'; base-uri 'none'; form-action 'none'"
    )
    template = _template()
    context = template.new_context(
        {
            "title": title,
            "head": head,
            "weights": f"Weights: {told['weights']}"
            if "weights" in told
            else f"Weights with the checksum {told[CHECKSUM]}",
            "preprocessing": told[PREPROCESSING],
            "images": images,
            "health": health,
            "layers": layers,
            "hrefs": {name: link(place.anchor) for name, place in places.items()},
            "channel_hrefs": {name: place.hrefs for name, place in places.items()},
            "contrast": contrast,
            "orders": orders,
            "choices": {key: name for key, name in CHOICES.items() if key.partition("-")[0] in orders},
            "classes": classes,
            "kinds": KINDS,
            "by_kind": [
                (kind, own)
                for kind in KINDS
                if (own := [each for each in health.troubles if each.kind == kind])
            ],
            "policy": policy,
            "style": markup(style),
            "script": markup(script),
        }
    )
    text = "".join(template.root_render_func(context))
    # The engine leaves a circle of references, and with it the whole page, to the collector: it is emptied.
    context.parent.clear()
    return text


@cache
def _template() -> Any:
    """Return the template, read and compiled once."""
    jinja2 = require_engine()
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FunctionLoader(_own_file),
    )
    environment.filters |= {"figure": figure, "percent": percent}
    return environment.get_template("template.html")


def _own_file(name: str) -> str:
    return importlib.resources.files("torchlens_viz.atlas").joinpath(name).read_text("utf-8")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _rules(album: Album, overlays: Overlays, images: Sequence[ImageChapter]) -> str:
    """Return the style that crops tiles from sprites: a rule per sprite, per block, per row and column."""
    rules, rows, columns = [], 1, 1
    for number, address in album.addresses.items():
        own = [view for view in album.views if view.block.sprite == number]
        width, height = album.sprites[number].size
        selector = ",".join(f".b{view.block.number}" for view in own)
        rules.append(
            f"{selector}{{background-image:url({address});"
            f"--W:{width};--H:{height};--g:{album.sprites[number].gap}}}"
        )
    for view in album.views:
        block = view.block
        rules.append(
            f".b{block.number}{{--w:{block.width};--h:{block.height};--y:{block.y};"
            f"--fx:{view.factor};--fy:{view.factor}}}"
            f".b{block.number}.large{{--fx:{view.large:.5g};--fy:{view.large:.5g}}}"
        )
        if view.pitch:
            rules.append(f".s{block.number}{{tab-size:{view.pitch}px}}")
        columns = max(columns, block.columns)
        rows = max(rows, block.rows)
    rules += [f".c{place}{{--c:{place}}}" for place in range(columns)]
    rules += [f".r{place}{{--r:{place}}}" for place in range(rows)]
    ranges = {view.limits.signed: view.limits for view in album.views if view.limits is not None}
    rules += [
        f".bar{int(signed)}{{background:linear-gradient(90deg,{gradient(limits)})}}"
        for signed, limits in ranges.items()
    ]
    for number, image in enumerate(images):
        width, height = image.size
        scale = _OVERLAY / max(width, height)
        rules.append(
            f".p{number}{{width:{width * scale:.2f}px;height:{height * scale:.2f}px}}"
            f".p{number}::before{{background-image:url({image.photograph})}}"
        )
    return "\n".join([*rules, *overlays.rules, ""])
