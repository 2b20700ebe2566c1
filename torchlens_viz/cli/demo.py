"""The demo: a trained network and a real photograph in, every kind of picture out, and no download."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from torchlens_viz.ascent.maximize import maximize
from torchlens_viz.ascent.result import Maximization
from torchlens_viz.atlas.page import require_engine
from torchlens_viz.atlas.report import report
from torchlens_viz.attribution.explain import explain
from torchlens_viz.attribution.project import project
from torchlens_viz.dataset.survey import survey
from torchlens_viz.errors import MissingDependencyError, PictureError, needed
from torchlens_viz.files.paths import safe_names
from torchlens_viz.files.pictures import read_image, save_picture
from torchlens_viz.grids.features import feature_sheet
from torchlens_viz.grids.kernels import kernel_grid
from torchlens_viz.grids.pairs import pair_grid
from torchlens_viz.hooks.capture import capture
from torchlens_viz.models.colours import colours_of
from torchlens_viz.models.demo_net import DEMO_CLASSES, DEMO_PHOTOGRAPHS, load_demo_net, normalize, preprocess

_NEXT_COMMAND = "torchlens-viz report resnet18 photo.jpg -o report.html"
_FIRST_LAYER = "features.0"
_LONGEST_SIDE = 512
_SHORTEST_SIDE = 31  # the least that reaches the network's last layer
_KERNEL_UPSCALE = 6  # 11 pixels become 66
_MAP_PIXELS = 96  # at least, for the longer side of a map
_PAIRS = 16
_MAXIMIZED = 8
_MAXIMIZED_SIZE = 96
_MAXIMIZED_STEPS = 48
_TOP = 9
_VIEW_SIDE = 256  # pixels, of the longer side of the photographs that are surveyed
_MAXIMIZED_RATE = 0.1  # half the usual: milder colours


def run_demo(*, image: str | os.PathLike[str] | None, out: str | os.PathLike[str]) -> list[Path]:
    """Draw the demo network's kernels and what they make of a photograph, and print where.

    Args:
        image: A picture file, drawn at no more than 512 pixels a side; None for a photograph of a cat that
            comes with scikit-image.
        out: The folder to write to: `report.html`, a page with all of it; `kernels.png`, `maps/LAYER.png` for
            each convolution, `kernels_beside_maps.png`, `maximized/LAYER.png`, images made to drive some
            channels of each, `projected/LAYER.png`, what drives some of them in the photograph, and
            `explained.png`, where the evidence for the network's answer lies.

    Returns:
        The files written, in that order.

    Raises:
        MissingDependencyError: If scikit-image or safetensors is needed and not installed.
        PictureError: If the picture cannot be read or is too small, or the folder cannot be written.
    """
    require_engine()
    picture = _photograph() if image is None else read_image(image)
    picture = _at_screen_size(picture, "the photograph" if image is None else repr(os.fspath(image)))
    network = load_demo_net()
    with torch.inference_mode(), capture(network, nn.Conv2d) as acts:
        network(preprocess(picture))

    # Everything is drawn before anything is written, so that a failure leaves nothing behind.
    sheets = {
        "kernels.png": kernel_grid(network, _FIRST_LAYER, upscale=_KERNEL_UPSCALE, value_range="robust")
    }
    for layer, name in zip(acts, safe_names(list(acts)), strict=True):
        sheets[f"maps/{name}.png"] = feature_sheet(
            acts[layer], upscale=_enlargement(acts[layer]), value_range="robust", legend=True
        )
    sheets["kernels_beside_maps.png"] = pair_grid(
        network,
        _FIRST_LAYER,
        picture,
        channels=_telling_channels(network.get_parameter(f"{_FIRST_LAYER}.weight"), acts[_FIRST_LAYER]),
        preprocess=preprocess,
        scale_each=True,
        nrow=_PAIRS // 4,
    )
    driven = {layer: _maximized(network, layer, acts[layer]) for layer in acts}
    for layer, name in zip(acts, safe_names(list(acts)), strict=True):
        sheets[f"maximized/{name}.png"] = driven[layer].grid(
            nrow=_MAXIMIZED // 2, title=f"what drives channels of {layer}"
        )
    for layer, name in zip(acts, safe_names(list(acts)), strict=True):
        seen = project(network, _relu_after(layer), picture, rule="guided", preprocess=preprocess)
        sheets[f"projected/{name}.png"] = seen.grid(
            title=f"what drives channels of {layer} in the photograph"
        )
    explained = explain(network, picture, preprocess=preprocess)
    sheets["explained.png"] = explained.grid(names=DEMO_CLASSES, title="which photograph is this, and why?")
    page = _page(network, picture, "chelsea" if image is None else Path(image).name, driven, Path(out))
    paths = [page, *(save_picture(sheet, Path(out) / name) for name, sheet in sheets.items())]
    for path in paths:
        print(path.absolute())
    print(f"\nNow your own model and picture:\n  {_NEXT_COMMAND}")
    return paths


def _photograph() -> Image.Image:
    what = "the demo's photograph comes with scikit-image"
    data = needed("skimage.data", what, "demo", otherwise="or give a picture of yours with --image")
    return Image.fromarray(data.chelsea())


def _at_screen_size(picture: Image.Image, shown: str) -> Image.Image:
    smaller = picture.copy()
    smaller.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
    if min(smaller.size) < _SHORTEST_SIDE:
        raise PictureError(
            f"the demo's picture must be at least {_SHORTEST_SIDE} pixels a side when its longer side is "
            f"{_LONGEST_SIDE} or less, got {shown} with {picture.width} x {picture.height}; use another"
        )
    return smaller


def _enlargement(maps: Tensor) -> int:
    return -(-_MAP_PIXELS // max(maps.shape[-2:]))


def _page(
    network: nn.Module, picture: Image.Image, name: str, driven: Mapping[str, Maximization], out: Path
) -> Path:
    """Write the page: the health of the network over the photographs it knows, and the picture through it."""
    views, found = _views(), None
    if views:
        batches = (preprocess(view) for view in views)
        found = survey(network, batches, list(driven), top_k=_TOP, correlations=True, progress=False)
    about = {
        "weights": "trained on the photographs of scikit-image; they come with torchlens_viz",
        "seed": "0",
        "command": "torchlens-viz demo" + ("" if name == "chelsea" else f" --image {name}"),
    }
    if views:
        about["survey"] = f"{len(views)} inputs: the photographs, each in four quarter turns"
    return report(
        network,
        {name: picture},
        out / "report.html",
        survey=found,
        source=views or None,
        targets=range(len(views)) if views else None,
        maximized=driven,
        preprocess=preprocess,
        invert=colours_of(preprocess).undo,
        names=DEMO_CLASSES,
        title="The demo network",
        about=about,
    )


def _views() -> list[Image.Image]:
    """Return the photographs that the network knows, one for each class; none without scikit-image."""
    try:
        data = needed("skimage.data", "the demo's photographs come with scikit-image", "demo")
    except MissingDependencyError:
        return []
    views = []
    for name in DEMO_PHOTOGRAPHS:
        photograph = Image.fromarray(getattr(data, name)()).convert("RGB")
        photograph.thumbnail((_VIEW_SIDE, _VIEW_SIDE))
        views += [photograph.rotate(90 * turn, expand=True) for turn in range(4)]
    return views


def _maximized(network: nn.Module, layer: str, maps: Tensor) -> Maximization:
    """Find the images that drive those channels hardest, after the ReLU, which the photograph drives most."""
    channels: list[int] = maps[0].relu().flatten(1).mean(1).topk(_MAXIMIZED).indices.tolist()
    return maximize(
        network,
        _relu_after(layer),
        channels,
        size=_MAXIMIZED_SIZE,
        steps=_MAXIMIZED_STEPS,
        lr=_MAXIMIZED_RATE,
        preprocess=normalize,
        parametrization="fourier",
        transforms="robust",
    )


def _relu_after(layer: str) -> str:
    container, _, number = layer.rpartition(".")
    return f"{container}.{int(number) + 1}"


def _telling_channels(kernels: Tensor, maps: Tensor) -> list[int]:
    """Choose half the pairs for the pattern in the kernel, and of the others those with the liveliest maps.

    The first are edges, which leave little of the picture but its outlines; the others are mostly colours,
    in whose maps the picture is still clear.
    """
    pattern = kernels.flatten(2).std(dim=2).sum(dim=1)
    edges: list[int] = pattern.topk(_PAIRS // 2).indices.tolist()
    liveliness = maps[0].flatten(1).std(dim=1)
    liveliness[edges] = -1.0
    colours: list[int] = liveliness.topk(_PAIRS - len(edges)).indices.tolist()
    return [*edges, *colours]
