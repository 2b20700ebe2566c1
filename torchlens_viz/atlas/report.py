"""`report`: one HTML file that shows a network."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from torchlens_viz.album.pictures import Given, pictures_of
from torchlens_viz.album.shelf import Shelf
from torchlens_viz.arguments import flag, integer, shown
from torchlens_viz.ascent.result import Maximization
from torchlens_viz.atlas.book import Wishes, written
from torchlens_viz.atlas.page import require_engine
from torchlens_viz.comparison.result import Comparison
from torchlens_viz.dataset.patches import Source
from torchlens_viz.dataset.result import Survey
from torchlens_viz.errors import InvalidArgumentError, InvalidTypeError, PictureError
from torchlens_viz.files.paths import as_path, require_writable, write_together
from torchlens_viz.models.calls import ModelInputs, called_with
from torchlens_viz.models.colours import Bands, bands_note, inverted
from torchlens_viz.models.kernels import convolutions
from torchlens_viz.models.layers import Selector, require_module, select, unwrap

_MOST_BYTES: Final = 25_000_000


def report(
    model: nn.Module,
    images: Given | Iterable[Given] | Mapping[str, Given],
    path: str | os.PathLike[str],
    *,
    layers: Selector | None = None,
    survey: Survey | None = None,
    comparison: Comparison | None = None,
    source: Any = None,
    maximized: Maximization | Iterable[Maximization] | Mapping[str, Maximization] | None = None,
    preprocess: Callable[[Any], torch.Tensor] | None = None,
    inputs: ModelInputs = None,
    invert: Callable[[torch.Tensor], torch.Tensor] | None = None,
    bands: Bands = None,
    names: Sequence[str] | None = None,
    targets: Sequence[int] | None = None,
    max_channels: int | None = None,
    projections: int | None = None,
    explain: bool = True,
    title: str | None = None,
    about: Mapping[str, str] | None = None,
    assets: str | os.PathLike[str] | None = None,
    max_bytes: int = _MOST_BYTES,
) -> Path:
    """Write a page that shows a network: one HTML file, to be opened in any browser.

    It holds what the network says of each image and why, the health of its layers, the worst first, and of
    each layer the kernels, the maps of each image, a histogram, and every channel with all that is known of
    it, under an address of its own: `page.html#features.0:7`. Everything is in the file: it loads nothing,
    needs no script to be read, and shows names of layers and files as text, whatever is in them.

    The model runs in eval mode and without gradients; its flags, weights and random numbers stay as they are.

    Args:
        model: A model that takes one image batch, or more, see `inputs`.
        images: A picture, the path of one, a tensor (C, H, W) or a batch (N, C, H, W), or up to 64 of those;
            a mapping says by its keys what the page calls them.
        path: The file, which is replaced in one step.
        layers: Which layers, by any selector; None is every convolution.
        survey: What `torchlens_viz.survey` found over a data set: the health of the layers in it rests on it.
            That of others, and of all without it, rests on the images. Of a survey with a `loss`, the page
            also shows the effect of each channel.
        comparison: What `torchlens_viz.compare` found between this network and another one.
        source: The inputs that were surveyed, as in `Survey.patches`: with it the page shows for each channel
            what drives it hardest.
        maximized: What `torchlens_viz.maximize` found, for one layer or several. A mapping says by its keys
            under which layer each is shown, such as that of a ReLU under its convolution.
        preprocess: Makes of an image what the model takes, as in `torchlens_viz.overlay_grid`.
        inputs: What the model takes beside the image, as in `torchlens_viz.maximize`.
        invert: Makes of the model's input the pixels in [0, 1] to show, as in `torchlens_viz.overlay_grid`.
        bands: The channels of the images to show as red, green and blue, or the one to show in gray. None is
            all of 1 or 3, and of other numbers their mean, which the page says.
        names: What the model's outputs are called, by index.
        targets: The class of each input of the survey, by its index, or without a survey of each image: every
            channel is then filed under the class of the input that drives it hardest.
        max_channels: How many channels of each layer to show with an entry of their own, those with the
            highest value on the images first; of the others the page shows small pictures and figures. None
            is all of them, or 64 of each layer where the layers have more than 4,096 together, and fewer
            where so many images are shown that the entries would hold more than 20,000 pictures.
        projections: For how many channels of each layer to show which pattern in the images made them fire,
            from 0, and of the first two images. None is 8, of 16 layers from the first to the last at equal
            distances where there are more, so that it takes seconds; a number holds for every layer.
        explain: Show where in the images the evidence for the network's answer lies.
        title: What the page is called; None is the class of the model.
        about: More lines for the head of the page, by name, such as `{"weights": "epoch 12"}`.
        assets: A folder for the pictures of a page that would be too large with them: files beside it, which
            it finds by relative addresses, so that page and folder move together. Names hold a checksum of
            the picture; what else is in the folder stays.
        max_bytes: The most the page may have, with the pictures in it.

    Returns:
        The path.

    Raises:
        LayerNotFoundError: The model has no such layer, or no convolution.
        InvalidArgumentError: The model does not take an image, no layer puts out maps, an argument does not
            fit, or the file would be larger than `max_bytes`.
        InvalidTypeError: An argument has another type.
        PictureError: An image cannot be read, or a file cannot be written; then none is, and a page that was
            there before stays.
        MissingDependencyError: jinja2 is not installed.

    Example:
        >>> import tempfile, torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 5), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3)).eval()
        >>> folder = tempfile.mkdtemp()
        >>> page = report(net, torch.rand(3, 16, 16), f"{folder}/net.html", names=["ant", "bee", "cow"])
        >>> page.read_text("utf-8").count('<article class="channel"')
        4
    """
    require_module(model)
    require_engine()
    given = as_path(path)
    require_writable(given, "path", "file", PictureError)
    if max_channels is not None:
        max_channels = integer(max_channels, "max_channels", least=1)
    if projections is not None:
        projections = integer(projections, "projections", least=0)
    max_bytes = integer(max_bytes, "max_bytes", least=1)
    folder = None if assets is None else as_path(assets, "assets")
    if folder is not None:
        require_writable(folder, "assets", "folder", PictureError)
    shelf = Shelf(given, folder)
    explain = flag(explain, "explain")
    if survey is not None and not isinstance(survey, Survey):
        raise InvalidTypeError(f"`survey` must be a Survey or None, got {shown(survey)}")
    if comparison is not None and not isinstance(comparison, Comparison):
        raise InvalidTypeError(f"`comparison` must be a Comparison or None, got {shown(comparison)}")
    if source is not None and survey is None:
        raise InvalidArgumentError("`source` has no effect without a `survey`; leave it out, or pass both")
    model = called_with(model, inputs)
    pictures = pictures_of(model, images, preprocess, invert, bands)
    said = bands_note(inverted(pictures[0].batch, invert).shape[1], bands)
    selected = convolutions(model) if layers is None else select(model, layers)
    first_names = {id(layer.module): layer.name for layer in reversed(selected)}
    wanted = [layer.name for layer in selected if first_names[id(layer.module)] == layer.name]
    wishes = Wishes(
        survey=survey,
        source=None if source is None else Source(source, preprocess, invert, None, bands),
        comparison=comparison,
        maximized=_by_layer(maximized),
        preprocess=preprocess,
        invert=invert,
        bands=bands,
        names=None if names is None else [str(name) for name in names],
        targets=None if targets is None else [int(target) for target in targets],
        max_channels=max_channels,
        projections=projections,
        explain=explain,
        title=title or type(unwrap(model)).__name__,
        about={**({"pictures": said[0]} if said else {}), **(about or {})},
    )
    page = written(model, pictures, wanted, wishes, shelf).encode("utf-8", "backslashreplace")
    if len(page) > max_bytes:
        beside = "" if folder else "keep its pictures beside it with `assets` (`--assets DIR`), or "
        raise InvalidArgumentError(
            f"the page would have {len(page) / 1e6:.1f} MB, and `max_bytes` allows {max_bytes / 1e6:.1f} MB; "
            f"{beside}show fewer images, fewer `layers`, or fewer channels of each with `max_channels`"
        )
    write_together({**shelf.files, given: page}, PictureError)
    return given


def _by_layer(maximized: Any) -> dict[str, Maximization]:
    """Return what was maximised by the layer under which it is shown."""
    if maximized is None:
        return {}
    if isinstance(maximized, Maximization):
        found: dict[Any, Any] = {maximized.layer: maximized}
    elif isinstance(maximized, Mapping):
        found = dict(maximized)
    elif isinstance(maximized, Iterable):
        given = list(maximized)
        found = {getattr(each, "layer", place): each for place, each in enumerate(given)}
    else:
        found = {"": maximized}
    wrong = [each for each in found.values() if not isinstance(each, Maximization)]
    if wrong:
        raise InvalidTypeError(
            "`maximized` must be a Maximization, a list of them or a mapping from layers, got "
            f"{shown(wrong[0])}"
        )
    return found
