"""A model by name: one of torchvision's, or whatever a `package.module:factory` of yours builds."""

from __future__ import annotations

import contextlib
import difflib
import functools
import http.client
import importlib
import inspect
import io
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from torchlens_viz.errors import MissingDependencyError, ModelLoadError, TorchlensVizError, one_line
from torchlens_viz.models.weights import load_weights, read_weights

Preprocess: TypeAlias = Callable[[Image.Image], Tensor]

_DEFAULT_NOTE = "shorter side to 256, centre crop to 224, ImageNet mean and deviation"
_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)

# These warn unless they are told how to initialise, and do part of the preprocessing of their published
# weights inside the network, where `transform_input` says so.
_INCEPTIONS = ("googlenet", "inception_v3", "quantized_googlenet", "quantized_inception_v3")
# The families of torchvision that do not take one picture, by the package their builders live in.
_NO_PICTURE = {"optical_flow": "two pictures", "video": "a clip of several frames"}


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model that is ready to look at one picture.

    Attributes:
        model: The network in eval mode.
        preprocess: From a PIL image to the network's input (1, C, H, W).
        name: What was asked for.
        weights_note: Which weights and which preprocessing these are, in one line.
    """

    model: nn.Module
    preprocess: Preprocess
    name: str
    weights_note: str


def load_model(spec: str, *, weights: str | os.PathLike[str] = "DEFAULT") -> LoadedModel:
    """Build a model by name and load its weights.

    The random number generator of the caller is left as it was; what the model draws is the same each time.

    Args:
        spec: A torchvision name such as "alexnet", or `package.module:factory`, found from the current folder
            as with `python -m`. The factory is an `nn.Module` or takes no arguments and returns one; a
            function `preprocess(image)` beside it in its module is used for pictures.
        weights: "DEFAULT" for torchvision's best weights, or for those that the factory has set; "none" for
            random ones (torchvision names only); or a file, see `torchlens_viz.models.weights.read_weights`.

    Returns:
        The model in eval mode, with its preprocessing: that of torchvision's default weights for the name,
        whichever weights are loaded, or the factory's own, or the usual one for ImageNet.

    Raises:
        ModelLoadError: If the name is unknown, the factory fails, or the weights cannot be had.
        MissingDependencyError: If torchvision or safetensors is needed and cannot be imported.
    """
    wanted = os.fspath(weights)
    choice = wanted.lower() if wanted.lower() in ("default", "none") else "file"
    state = read_weights(wanted) if choice == "file" else None  # before the model, which takes longer
    with _seeded():
        if ":" in spec:
            model, preprocess, note = _from_factory(spec, choice)
        else:
            model, preprocess, note = _from_torchvision(spec, choice, state or ())
    if state is not None:
        load_weights(model, state, wanted)
        note = f"weights of {wanted!r}, {note}"
    return LoadedModel(model=model.eval(), preprocess=preprocess, name=spec, weights_note=note)


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    # torch.manual_seed would reseed the accelerators too, which fork_rng does not restore without a warning.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        yield


def _from_torchvision(name: str, choice: str, keys: Iterable[str]) -> tuple[nn.Module, Preprocess, str]:
    models = _import_torchvision_models()
    known = models.list_models()
    if name.lower() not in known:
        close = difflib.get_close_matches(name.lower(), known, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "`alexnet` is one."
        raise ModelLoadError(
            f"no torchvision model is named {name!r}; {hint} Your own model is package.module:factory"
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
    preprocess, how = _preprocess_of(name, builder, default)
    return model, preprocess, origin + how


def _import_torchvision_models() -> ModuleType:
    try:
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
        if isinstance(error, RuntimeError) and "invalid hash" in str(error):
            raise ModelLoadError(f"the weights of {name} arrived damaged ({error}); try again") from error
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


def _preprocess_of(name: str, builder: Callable[..., nn.Module], default: Any) -> tuple[Preprocess, str]:
    family = builder.__module__.rpartition(".")[0].rpartition(".")[2]
    if family in _NO_PICTURE:
        return functools.partial(_refuse_picture, name, _NO_PICTURE[family]), "no preprocessing"
    if default is None:
        return _default_preprocess, f"preprocessing: {_DEFAULT_NOTE}"
    transforms = default.transforms()
    return lambda image: transforms(image).unsqueeze(0), f"preprocessing of {default!r}"


def _refuse_picture(name: str, needs: str, image: Image.Image) -> Tensor:
    raise ModelLoadError(
        f"{name} takes {needs}, not one picture; draw its kernels instead, or use `capture` from Python"
    )


def _default_preprocess(image: Image.Image) -> Tensor:
    """Prepare a picture as nearly every ImageNet classifier expects it, without torchvision."""
    # The centre crop is a box of the original, so that a long, thin picture is not enlarged as a whole.
    half = min(image.size) * 224 / 256 / 2
    x, y = image.width / 2, image.height / 2
    cropped = image.convert("RGB").resize(
        (224, 224), Image.Resampling.BILINEAR, box=(x - half, y - half, x + half, y + half)
    )
    pixels = torch.from_numpy(np.array(cropped)).permute(2, 0, 1) / 255
    normalized = (pixels - torch.tensor(_MEAN).view(3, 1, 1)) / torch.tensor(_STD).view(3, 1, 1)
    return normalized.unsqueeze(0)


def _from_factory(spec: str, choice: str) -> tuple[nn.Module, Preprocess, str]:
    if choice == "none":
        raise ModelLoadError(
            f"`weights` must be left out or a file for a factory, which sets its own, got 'none' for {spec!r}"
            "; let the factory build the model without weights"
        )
    module_name, _, factory_name = spec.partition(":")
    with _current_folder_first():
        module = _import_module(spec, module_name)
        model = _build(spec, module, factory_name)
    own = getattr(module, "preprocess", None)
    origin = "weights as its factory sets them, " if choice == "default" else ""
    if callable(own):
        return (
            model,
            functools.partial(_own_preprocess, f"{module_name}:preprocess", own),
            (f"{origin}preprocessing of {module_name}:preprocess"),
        )
    return model, _default_preprocess, f"{origin}preprocessing: {_DEFAULT_NOTE}"


@contextlib.contextmanager
def _current_folder_first() -> Iterator[None]:
    folder = str(Path.cwd())
    importlib.invalidate_caches()  # the module may be newer than the last look into the folder
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(folder)


def _import_module(spec: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:  # a module of someone else's may do anything
        if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
            reason = f"there is no module {error.name!r}; run from the folder that holds it, or install it"
        elif not name or name.startswith("."):
            reason = "the part before the colon must be a full module name, such as package.module"
        else:
            reason = f"importing {name} raised {one_line(error)}; see `python -c 'import {name}'`"
        raise ModelLoadError(f"cannot load the model {spec!r}: {reason}") from error


def _build(spec: str, module: ModuleType, name: str) -> nn.Module:
    factory: object = module
    for part in name.split("."):
        if not hasattr(factory, part):
            public = [key for key in dir(factory) if key[0] != "_" and callable(getattr(factory, key, None))]
            close = difflib.get_close_matches(part, public, n=3) or sorted(public)[:3]
            hint = f"did you mean {' or '.join(close)}?" if close else "it defines none"
            raise ModelLoadError(f"`{module.__name__}` has no factory {name!r}; {hint}")
        factory = getattr(factory, part)
    if isinstance(factory, nn.Module):
        return factory
    if not callable(factory):
        raise ModelLoadError(
            f"{spec!r} must be an nn.Module or a function that returns one, got {type(factory).__name__}"
        )
    try:
        model = factory()
    except TorchlensVizError:
        raise
    except Exception as error:
        raise ModelLoadError(
            f"the factory {spec!r} raised {one_line(error)}; it must build the model without arguments"
        ) from error
    if not isinstance(model, nn.Module):
        raise ModelLoadError(f"the factory {spec!r} must return an nn.Module, got {type(model).__name__}")
    return model


def _own_preprocess(name: str, preprocess: Callable[[Image.Image], object], image: Image.Image) -> Tensor:
    try:
        prepared = preprocess(image)
    except TorchlensVizError:
        raise
    except Exception as error:
        raise ModelLoadError(
            f"`{name}` raised {one_line(error)}; it must take a PIL.Image and return a tensor (1, C, H, W)"
        ) from error
    if not isinstance(prepared, Tensor) or prepared.ndim not in (3, 4):
        shape = f" (shape {tuple(prepared.shape)})" if isinstance(prepared, Tensor) else ""
        raise ModelLoadError(
            f"`{name}` must return a tensor (1, C, H, W) or (C, H, W), got {type(prepared).__name__}{shape}"
        )
    return prepared if prepared.ndim == 4 else prepared.unsqueeze(0)
