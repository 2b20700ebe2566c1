"""`torchlens-viz report`: pictures through a model, and one page that shows what becomes of them."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from PIL import Image

from torchlens_viz.ascent.maximize import maximize
from torchlens_viz.ascent.result import Maximization
from torchlens_viz.atlas.page import require_engine
from torchlens_viz.atlas.report import report
from torchlens_viz.cli.commands import Outcome, own_gpu, prepared_by, told_as_model_error
from torchlens_viz.cli.survey import Files, Pictures, inverse_of
from torchlens_viz.dataset.result import Survey
from torchlens_viz.dataset.survey import survey
from torchlens_viz.errors import ArchiveError, InvalidArgumentError, PictureError
from torchlens_viz.files.paths import is_there
from torchlens_viz.files.pictures import pictures_in, read_image
from torchlens_viz.hooks.capture import capture
from torchlens_viz.models.colours import colours_of
from torchlens_viz.models.kernels import convolutions
from torchlens_viz.models.layers import select
from torchlens_viz.models.state import device_of, usable_device
from torchlens_viz.zoo.load import load_model
from torchlens_viz.zoo.loaded import LoadedModel

_MAXIMIZED: Final = 8  # channels of each layer
_LONGEST: Final = 128  # pixels a side of what is maximised
_BATCH: Final = 32
_SURVEY, _TABLE = "survey.safetensors", "pictures.csv"


def report_on(
    model: str,
    images: Sequence[Path],
    out: Path,
    *,
    layers: Sequence[str] | None,
    weights: str,
    device: str | None,
    folder: Path | None,
    maximized: bool,
    max_channels: int | None,
    assets: Path | None,
    title: str | None,
    command: str,
) -> Outcome:
    """Write a page that shows a network.

    Args:
        model: What `torchlens_viz.zoo.load.load_model` takes.
        images: The picture files.
        out: The page to write.
        layers: Names and globs; every convolution where it is None.
        weights: What `load_model` takes.
        device: Where to run; None is a GPU where there is one.
        folder: Pictures to survey, or what `torchlens-viz survey` wrote.
        maximized: Whether to find the images that drive the strongest channels hardest.
        max_channels: How many channels of each layer to show.
        assets: A folder for its pictures; None keeps them in the page.
        title: What the page is called; None is the name of the model.
        command: The command that makes the page again.

    Returns:
        The page, and which weights it shows.
    """
    require_engine()
    pictures = _named([(path, read_image(path)) for path in images])
    if is_there(out, PictureError) and out.is_dir():
        raise PictureError(f"`--out` must name a file, got the folder {str(out)!r}; add report.html to it")
    loaded = load_model(model, weights=weights)
    selected = convolutions(loaded.model) if layers is None else select(loaded.model, list(layers))
    names = [layer.name for layer in selected]
    loaded.model.to(usable_device(device or own_gpu() or "cpu", "--device"))
    for name, picture in pictures.items():
        prepared_by(loaded, picture, repr(name))  # what is wrong with the preprocessing is said at once
    found, source, surveyed = (None, None, "") if folder is None else _surveyed(loaded, names, folder)
    weights_of, _, preprocessing = loaded.weights_note.partition(", preprocessing")
    about = {
        "weights": weights_of,
        "preprocessing": preprocessing.lstrip(": ").replace("of ", "that of ", 1),
        "seed": "0",
        "command": command,
    }
    if surveyed:
        about["survey"] = surveyed
    with told_as_model_error(loaded, "these pictures"):
        driven = _driven(loaded, names, next(iter(pictures.values()))) if maximized else {}
        path = report(
            loaded.model,
            pictures,
            out,
            layers=names,
            survey=found,
            source=source,
            maximized=driven,
            preprocess=loaded.preprocess,
            inputs=loaded.inputs,
            invert=inverse_of(loaded),
            names=loaded.names or None,
            max_channels=max_channels,
            assets=assets,
            title=title or loaded.name,
            about=about,
        )
    return Outcome(paths=[path], notes=[f"{loaded.name}: {loaded.weights_note}"])


def _named(read: Sequence[tuple[Path, Image.Image]]) -> dict[str, Image.Image]:
    """Return pictures by the names of their files, or by their paths where two files have one name."""
    names = [path.name for path, _ in read]
    return {
        path.name if names.count(path.name) == 1 else f"{path} ({place})": picture
        for place, (path, picture) in enumerate(read)
    }


def _surveyed(loaded: LoadedModel, names: Sequence[str], folder: Path) -> tuple[Survey, Any, str]:
    """Return a survey, the pictures that were surveyed, and what is to be said of it."""
    if (folder / _SURVEY).is_file():
        found = Survey.load(folder / _SURVEY, model=loaded.on_images)
        files = _listed(folder / _TABLE)
        return found, Files(files), f"{found.samples_seen:,} pictures, read from {folder}"
    files = pictures_in(folder, but_not_in=folder / "top")
    own = Pictures(files, loaded, _BATCH, skip_bad=True, share=(0, 1))
    with told_as_model_error(loaded, "these pictures"):
        found = survey(loaded.on_images, own, list(names), indices=lambda batch: batch[1], correlations=True)
    if not found.is_complete:
        raise KeyboardInterrupt
    spoilt = f", {len(own.bad):,} that cannot be read left out" if own.bad else ""
    return found, Files(files), f"{found.samples_seen:,} pictures of {folder}{spoilt}"


def _listed(table: Path) -> list[Path]:
    """Return the pictures that a survey lists, by their index."""
    try:
        with table.open(encoding="utf-8", newline="") as file:
            return [Path(row["file"]) for row in csv.DictReader(file)]
    except (OSError, KeyError, UnicodeError, csv.Error) as error:
        raise ArchiveError(
            f"cannot read {str(table)!r}, the list of the pictures that were surveyed; give a folder that "
            "`torchlens-viz survey` wrote"
        ) from error


def _driven(loaded: LoadedModel, names: Sequence[str], picture: Image.Image) -> Mapping[str, Maximization]:
    """Return the images that drive the channels hardest which a picture drives most."""
    try:
        colours = colours_of(loaded.preprocess)
    except InvalidArgumentError as error:
        raise InvalidArgumentError(f"{error}; leave `--maximize` out") from error
    prepared = prepared_by(loaded, picture).to(device_of(loaded.model))
    with torch.inference_mode(), capture(loaded.model, list(names), device="cpu") as acts:
        loaded.on_images(prepared)
    size = tuple(min(side, _LONGEST) for side in colours.size)
    found = {}
    for name in acts:
        output = acts.calls(name)[0]
        if not isinstance(output, torch.Tensor) or output.ndim != 4:
            continue
        best = output[0].float().flatten(1).amax(1).nan_to_num(-torch.inf)
        channels: list[int] = best.topk(min(_MAXIMIZED, len(best))).indices.tolist()
        result = maximize(
            loaded.model,
            name,
            channels,
            size=(size[0], size[1]),
            preprocess=colours.apply,
            inputs=loaded.inputs,
            parametrization="fourier",
            transforms="robust",
        )
        if not result.is_complete:
            raise KeyboardInterrupt
        found[name] = result
    return found
