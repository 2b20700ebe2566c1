"""What the commands of the command line do, apart from reading arguments and printing."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from PIL import Image
from torch import Tensor, nn

from torchlens_viz.ascent.maximize import maximize
from torchlens_viz.distributed import joined
from torchlens_viz.errors import (
    InvalidArgumentError,
    ModelFailedError,
    ModelLoadError,
    TorchlensVizError,
    one_line,
)
from torchlens_viz.files.paths import safe_names
from torchlens_viz.files.pictures import read_image, save_picture
from torchlens_viz.grids.features import feature_sheet
from torchlens_viz.grids.kernels import save_kernel_grid
from torchlens_viz.hooks.capture import capture
from torchlens_viz.models.colours import Colours, colours_of
from torchlens_viz.models.images import AXES, as_batch
from torchlens_viz.models.kernels import image_axes
from torchlens_viz.models.layers import select
from torchlens_viz.models.state import device_of, usable_device
from torchlens_viz.zoo.load import load_model
from torchlens_viz.zoo.loaded import LoadedModel, is_usual

_CONVOLUTIONS: Final = {4: nn.Conv2d, 5: nn.Conv3d}  # by the dimensions of what the network takes


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a command did.

    Attributes:
        paths: The files it wrote, in the order of the layers.
        notes: What the user may want to know about them, one line each.
        text: What it has to say itself.
    """

    paths: list[Path]
    notes: list[str]
    text: str = ""


def draw_kernels(
    model: str, out: Path, *, layer: str | None, weights: str, options: Mapping[str, Any]
) -> Outcome:
    """Write the kernels of one layer as one sheet.

    Args:
        model: What `torchlens_viz.zoo.load.load_model` takes.
        out: The picture to write.
        layer: A layer; the first convolution where it is None.
        weights: What `load_model` takes.
        options: What `kernel_grid` takes by keyword.

    Returns:
        The file, and which weights it shows.
    """
    loaded = load_model(model, weights=weights)
    path = save_kernel_grid(loaded.model, out, layer, **options)
    return Outcome(paths=[path], notes=[f"{loaded.name}: {loaded.weights_note}"])


def draw_maps(
    model: str,
    image: Path,
    out: Path,
    *,
    layers: Sequence[str] | None,
    weights: str,
    options: Mapping[str, Any],
) -> Outcome:
    """Write one sheet of feature maps per layer, for one picture.

    Nothing is written unless every sheet can be drawn.

    Args:
        model: What `torchlens_viz.zoo.load.load_model` takes.
        image: The picture file.
        out: The folder for the sheets, each named after its layer.
        layers: Names and globs; every convolution where it is None.
        weights: What `load_model` takes.
        options: What `feature_sheet` takes by keyword.

    Returns:
        The files in the order in which the layers ran, the weights used, and the layers without maps.
    """
    picture = read_image(image)
    loaded = load_model(model, weights=weights)
    prepared = prepared_by(loaded, picture).to(device_of(loaded.model))
    rank = prepared.ndim
    selected = _CONVOLUTIONS[rank] if layers is None else list(layers)
    with torch.inference_mode(), capture(loaded.model, selected) as acts:
        with told_as_model_error(loaded, f"this picture as an input of shape {tuple(prepared.shape)}"):
            loaded.on_images(prepared)

    grid = options.get("grid")
    ranks = {rank} if grid is None else {3, rank}
    maps = {name: list(_maps(name, acts.calls(name), ranks)) for name in (*acts, *acts.not_called)}
    without = ", ".join(name for name, found in maps.items() if not found)
    labelled = [pair for found in maps.values() for pair in found]
    if not labelled:
        raise InvalidArgumentError(
            f"`--layer` must select layers that put out maps (N, {AXES[rank - 2]}), got {without}; "
            "leave it out for every convolution, or give the rows and columns of tokens (N, L, C) with --grid"
        )
    sheets = [
        feature_sheet(values, **{**options, "grid": grid if values.ndim == 3 else None})
        for _, values in labelled
    ]
    names = safe_names([label for label, _ in labelled])
    paths = [save_picture(sheet, out / f"{name}.png") for sheet, name in zip(sheets, names, strict=True)]
    notes = [f"{loaded.name}: {loaded.weights_note}"]
    if without:
        notes.append(
            f"not drawn, because they did not run or put out no maps (N, {AXES[rank - 2]}): {without}"
        )
    return Outcome(paths=paths, notes=notes)


# Without these an image drives a channel harder still, by noise that nobody can read.
_TO_LOOK_AT: Final = {"parametrization": "fourier", "transforms": "robust"}


def maximize_layers(
    model: str,
    out: Path,
    *,
    layers: Sequence[str],
    weights: str,
    device: str | None,
    options: Mapping[str, Any],
) -> Outcome:
    """Find the images that drive the channels of some layers hardest.

    A run that was broken off goes on where it was, when it is started again with the same options. Under
    torchrun the channels are shared among the processes, of which the first writes.

    Args:
        model: What `torchlens_viz.zoo.load.load_model` takes.
        out: The folder; each layer gets one of its own in it.
        layers: Names and globs.
        weights: What `load_model` takes.
        device: Where to run; None is a GPU where there is one.
        options: What `maximize` takes by keyword; `size` is by default what the model's preprocessing makes,
            and the images are by default such as one likes to look at, built of waves and robust. A network
            over signals or volumes that brings no preprocessing gets them as they are.

    Returns:
        The sheets, one per layer, and which weights they show; nothing in the other processes of a torchrun.
    """
    loaded = load_model(model, weights=weights)
    colours = _colours(loaded)
    names = [layer.name for layer in select(loaded.model, list(layers))]
    paths = []
    notes = [f"{loaded.name}: {loaded.weights_note}"]
    if colours is None:
        notes.append("no preprocessing, which is for pictures alone: inputs are as they are")
    with joined() as rank:
        loaded.model.to(usable_device(device or own_gpu() or "cpu", "--device"))
        for name, file_name in zip(names, safe_names(names), strict=True):
            folder = out / file_name
            unfinished = folder / "unfinished"
            result = maximize(
                loaded.model,
                name,
                preprocess=None if colours is None else colours.apply,
                inputs=loaded.inputs,
                checkpoint=unfinished,
                **{
                    "size": None if colours is None else colours.size,
                    **({} if options.get("method") == "classic" else _TO_LOOK_AT),
                    **options,
                },
            )
            if not result.is_complete:
                raise KeyboardInterrupt  # what is finished stays where the next run finds it
            if rank == 0:
                paths.append(result.save(folder) / "grid.png")
                shutil.rmtree(unfinished)  # all of it is in what was saved
                notes.append(f"{name}: {_counted(result.status)}")
    return Outcome(paths=paths, notes=notes if paths else [])


def _colours(loaded: LoadedModel) -> Colours | None:
    """Return what preprocessing does to colours; None where a network takes no pictures and brings none."""
    axes = image_axes(loaded.model)
    if axes != 2 and is_usual(loaded.preprocess):
        return None
    try:
        return colours_of(loaded.preprocess, axes=axes)
    except InvalidArgumentError as error:
        raise InvalidArgumentError(
            f"{error}; call `maximize` from Python with a differentiable `preprocess`"
        ) from error


def own_gpu() -> str | None:
    """Return the GPU of this process: of several on one machine, the one that torchrun numbers it by."""
    if not torch.cuda.is_available():
        return None
    return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"


def _counted(status: Sequence[str]) -> str:
    words = {"steps": "made all steps", "threshold": "passed the threshold", "nonfinite": "not finite"}
    return ", ".join(f"{count} {words.get(kind, kind)}" for kind, count in Counter(status).most_common())


def prepared_by(loaded: LoadedModel, picture: Image.Image, what: str = "this picture") -> Tensor:
    """Return what the model's preprocessing makes of a picture: (1, C, H, W), or a clip (1, C, T, H, W).

    Raises:
        ModelLoadError: It fails, or makes something else.
    """
    try:
        prepared = loaded.preprocess(picture)
        is_clip = isinstance(prepared, Tensor) and prepared.ndim == 5 and len(prepared) == 1
        return prepared if is_clip else as_batch(prepared)
    except Exception as error:
        raise ModelLoadError(
            f"the preprocessing of {loaded.name} fails for {what} ({one_line(error)}); it must make a tensor "
            "(1, C, H, W) of a picture"
        ) from error


@contextmanager
def told_as_model_error(loaded: LoadedModel, what: str) -> Iterator[None]:
    """Say of whatever a model raises that the model did."""
    try:
        yield
    except (Exception, SystemExit) as error:
        if isinstance(error, TorchlensVizError) and not isinstance(error, ModelFailedError):
            raise
        own = error.__cause__ if isinstance(error, ModelFailedError) and error.__cause__ else error
        raise ModelLoadError(
            f"{loaded.name} cannot run on {what} ({one_line(own)}); use other pictures, or put a function "
            "preprocess(image) that fits beside the factory"
        ) from error


def _maps(name: str, calls: Sequence[object], ranks: set[int]) -> Iterator[tuple[str, Tensor]]:
    """Yield every output that can be drawn as maps, numbered where the layer ran several times."""
    for index, values in enumerate(calls):
        if isinstance(values, Tensor) and values.ndim in ranks and values.numel() > 0:
            yield (name if len(calls) == 1 else f"{name}-call{index}"), values
