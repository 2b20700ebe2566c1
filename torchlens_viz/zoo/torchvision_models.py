"""torchvision's models by name, each with the input that its family takes."""

from __future__ import annotations

import contextlib
import difflib
import http.client
import importlib
import inspect
import io
import re
from collections.abc import Callable, Iterable, Set
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from torchlens_viz.errors import MissingDependencyError, ModelLoadError, message_of, one_line
from torchlens_viz.files.pictures import as_rgb
from torchlens_viz.zoo.loaded import (
    USUAL_NOTE,
    LoadedModel,
    Preprocess,
    multiple_of,
    names_of,
    not_too_long,
    off_meta,
    usual,
)

# These warn unless they are told how to initialise, and do part of the preprocessing of their published
# weights inside the network, where `transform_input` says so.
_INCEPTIONS: Final = ("googlenet", "inception_v3", "quantized_googlenet", "quantized_inception_v3")
_FRAMES: Final = 16  # of the still clip that a network for video is shown
_FLOW_STEP, _FLOW_LEAST = 8, 128  # of the sides of pictures that RAFT takes


def from_torchvision(name: str, choice: str, keys: Iterable[str]) -> LoadedModel:
    """Build one of torchvision's models.

    Args:
        name: Its name there.
        choice: `"default"` for its best weights; `"none"` or `"file"` for random ones.
        keys: The names of the tensors that are to be loaded; which optional heads it has follows from them.

    Raises:
        ModelLoadError: The name is unknown, or the weights cannot be had.
        MissingDependencyError: torchvision cannot be imported.
    """
    models = _import_models()
    known = models.list_models()
    if name.lower() not in known:
        close = difflib.get_close_matches(name.lower(), known, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "`alexnet` is one."
        raise ModelLoadError(
            f"no torchvision model is named {name!r}; {hint} Others are timm/NAME, hf/NAME, and your own "
            "package.module:factory"
        )
    builder = models.get_model_builder(name)
    # Built without `quantize=True`, these are float networks and have the weights of those.
    float_name = name.lower().removeprefix("quantized_")
    default = getattr(models.get_model_weights(float_name), "DEFAULT", None)
    if choice == "default":
        if default is None:
            raise ModelLoadError(f"torchvision has no weights for {name}; use `--weights none` or a file")
        model, origin = _pretrained(name, builder, default), f"weights {default!r}, "
    else:
        model = _untrained(name, builder, set(keys))
        origin = "random weights (seed 0), " if choice == "none" else ""
    family = builder.__module__.rpartition(".")[0].rpartition(".")[2]
    preprocess, how = _preprocess_of(family, default)
    return LoadedModel(
        model=model,
        preprocess=preprocess,
        name=name,
        weights_note=origin + how,
        names=names_of(default.meta.get("categories")) if default is not None else (),
        inputs=_twice if family == "optical_flow" else None,
    )


def _import_models() -> ModuleType:
    try:
        with off_meta():
            return importlib.import_module("torchvision.models")
    except Exception as error:  # beside a torch it was not built for, any kind: RuntimeError, OSError, ...
        if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == "torchvision":
            fix = "torchvision is not installed; run `python -m pip install torchvision`"
        else:
            fix = (
                f"torchvision cannot be imported beside torch {torch.__version__} ({one_line(error)}); "
                "install a matching pair with `python -m pip install --force-reinstall torch torchvision`"
            )
        raise MissingDependencyError(fix) from error


def _pretrained(name: str, builder: Callable[..., nn.Module], default: Any) -> nn.Module:
    cached = Path(torch.hub.get_dir()) / "checkpoints" / default.url.rpartition("/")[2]
    try:
        # torch.hub announces a download on stdout, which belongs to the program; its progress is on stderr.
        with contextlib.redirect_stdout(io.StringIO()):
            return builder(weights="DEFAULT")
    except (OSError, http.client.HTTPException) as error:  # URLError included
        raise ModelLoadError(
            f"cannot get the weights of {name} from {default.url} ({one_line(error)}); "
            "use `--weights none` for random ones, or fetch that file elsewhere and give it as "
            f"`--weights FILE` or put it at {cached}"
        ) from error
    except Exception as error:  # what unpickling a damaged file raises is anyone's guess
        if isinstance(error, RuntimeError) and "invalid hash" in message_of(error):
            raise ModelLoadError(
                f"the weights of {name} arrived damaged ({one_line(error)}); try again"
            ) from error
        if not cached.exists():  # then no weights were read, and this is a bug to be seen
            raise
        raise ModelLoadError(
            f"the weights of {name} in {cached} are damaged ({one_line(error)}); delete that file so that it "
            "is fetched again, or use `--weights none`"
        ) from error


def _untrained(name: str, builder: Callable[..., nn.Module], keys: Set[str]) -> nn.Module:
    """Build the network that has a place for each of `keys`, whichever of its optional heads they need."""
    options: dict[str, object] = {"weights": None}
    parameters = inspect.signature(builder).parameters
    if "weights_backbone" in parameters:
        options["weights_backbone"] = None  # its default would be downloaded
    if "aux_loss" in parameters:
        options["aux_loss"] = any("aux_classifier." in key for key in keys)
    if name.lower() in _INCEPTIONS:
        options |= {"init_weights": True, "transform_input": True}
        options["aux_logits"] = any(re.search(r"(^|\.)(aux[12]|AuxLogits)\.", key) for key in keys)
    return builder(**options)


def _preprocess_of(family: str, default: Any) -> tuple[Preprocess, str]:
    if default is None:
        return usual, f"preprocessing: {USUAL_NOTE}"
    transforms = default.transforms()
    if family == "video":
        return _still_clip(transforms), f"preprocessing of {default!r}, {_FRAMES} times the same frame"
    if family == "optical_flow":
        return _flow(transforms), f"preprocessing of {default!r}, the picture as both frames"
    return lambda image: transforms(not_too_long(image)).unsqueeze(0), f"preprocessing of {default!r}"


def _still_clip(transforms: Callable[[Tensor], Tensor]) -> Preprocess:
    def clip(image: Image.Image) -> Tensor:
        pixels = torch.from_numpy(np.array(as_rgb(not_too_long(image)))).permute(2, 0, 1)
        return transforms(pixels.expand(_FRAMES, -1, -1, -1)).unsqueeze(0)  # (T, C, H, W) to (1, C, T, H, W)

    return clip


def _flow(transforms: Callable[..., tuple[Tensor, Tensor]]) -> Preprocess:
    def frame(image: Image.Image) -> Tensor:
        fitting = multiple_of(not_too_long(image), _FLOW_STEP, _FLOW_LEAST)
        return transforms(fitting, fitting)[0].unsqueeze(0)

    return frame


def _twice(batch: Tensor) -> tuple[Tensor, Tensor]:
    return batch, batch.clone()
