"""A model by name, of whichever source: torchvision, timm, transformers, or code of the user's own."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from torchlens_viz.errors import MissingDependencyError, ModelLoadError, TorchlensVizError, one_line
from torchlens_viz.files.paths import is_there
from torchlens_viz.zoo.hubs import from_timm, from_transformers
from torchlens_viz.zoo.loaded import (
    LoadedModel,
    OwnPreprocess,
    Preprocess,
    names_of,
    off_meta,
    usual_preprocess,
)
from torchlens_viz.zoo.torchvision_models import from_torchvision
from torchlens_viz.zoo.weights import is_weights, load_weights, read_weights


def load_model(spec: str, *, weights: str | os.PathLike[str] = "DEFAULT") -> LoadedModel:
    """Build a model by name and load its weights.

    The random number generator of the caller is left as it was; what the model draws is the same each time.

    Args:
        spec: A torchvision name such as "alexnet"; `timm/NAME`; `hf/NAME` or `hf/FOLDER`, of transformers;
            `package.module:factory`, found from the current folder as with `python -m`; or
            `folder/file.py:factory`. A factory is an `nn.Module`, or takes no arguments and returns one, or
            `(model, preprocess)`, or `(model, preprocess, names)`, with the names of classes. A function
            `preprocess(image)` beside it in its module is used where it returns none.
        weights: "DEFAULT" for the best weights of that name, or for those that the factory has set; "none"
            for random ones, or those that a factory sets; or a file, see `torchlens_viz.zoo.weights`.

    Returns:
        The model in eval mode, with its preprocessing: that of the default weights for the name, whichever
        weights are loaded, or the factory's own, or the usual one for ImageNet.

    Raises:
        ModelLoadError: If the name is unknown, the factory fails, or the weights cannot be had.
        MissingDependencyError: If a package is needed and cannot be imported; it names the extra.
    """
    _refuse_file(spec)
    wanted = os.fspath(weights)
    choice = wanted.lower() if wanted.lower() in ("default", "none") else "file"
    read = read_weights(wanted) if choice == "file" else None  # before the model, which takes longer
    with _seeded():
        loaded = _built(spec, choice, () if read is None else tuple(read.tensors))
    note = loaded.weights_note
    if read is not None:
        done = ", ".join([*read.notes, *load_weights(loaded.model, read.tensors, wanted)])
        note = f"weights of {wanted!r}{f' ({done})' if done else ''}, {note}"
    return replace(loaded, model=_in_eval_mode(loaded.model, spec), weights_note=note)


def load_structure(spec: str) -> LoadedModel:
    """Build a model by name without any values: on the meta device, where that is possible.

    Args:
        spec: What `load_model` takes.

    Returns:
        The model in eval mode, without weights.

    Raises:
        ModelLoadError: If the name is unknown, or the factory fails.
        MissingDependencyError: If a package is needed and cannot be imported.
    """
    # A model may compute as it is built, with numbers, or with its weights.
    for place in (torch.device("meta"), _EmptyOnMeta()):
        try:
            with warnings.catch_warnings(), place:
                warnings.simplefilter("ignore")  # of weights that are loaded into nothing, for one
                return load_model(spec, weights="none")
        except MissingDependencyError:
            raise
        except Exception as error:
            if isinstance(error.__cause__, OSError):  # there is no such model, or no way to it
                raise
    return load_model(spec, weights="none")


class _EmptyOnMeta(TorchFunctionMode):
    """Within it, memory that is asked for without values, as layers do for their weights, is none."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*args, **({**(kwargs or {}), "device": "meta"} if func is torch.empty else kwargs or {}))


def _built(spec: str, choice: str, keys: tuple[str, ...]) -> LoadedModel:
    source, _, name = spec.partition("/")
    if source == "timm" and name and not name.endswith(".py"):
        return from_timm(name, choice)
    if source == "hf" and name and ":" not in name:
        return from_transformers(name, choice)
    if ":" in spec:
        loaded = _from_factory(spec)
        origin = "" if choice == "file" else "weights as its factory sets them, "
        return replace(loaded, weights_note=origin + loaded.weights_note)
    return from_torchvision(spec, choice, keys)


def _refuse_file(spec: str) -> None:
    """Say what to do with a file in the place of a model."""
    if is_weights(spec):
        raise ModelLoadError(
            f"the model must be a name or a factory, got the file {spec!r}, which holds weights and not the "
            f"code that they belong to; give both: `resnet18 --weights {spec}`, or package.module:factory "
            "for a model of your own"
        )
    if spec.endswith(".py"):
        raise ModelLoadError(
            f"the model must say which function or class of {spec!r} builds it, such as `{spec}:build`"
        )
    if is_there(Path(spec), ModelLoadError) and (Path(spec) / "config.json").is_file():
        raise ModelLoadError(
            f"the model must be a name or a factory, got the folder {spec!r}; of a model of transformers "
            f"write `hf/{spec}`"
        )


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    # torch.manual_seed would reseed the accelerators too, which fork_rng does not restore without a warning.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        yield


def _in_eval_mode(model: nn.Module, spec: str) -> nn.Module:
    try:
        return model.eval()
    except Exception as error:  # a graph that torch.export made, for one
        raise ModelLoadError(
            f"{spec} cannot be put into eval mode ({one_line(error)}); give the nn.Module that it was made "
            "from"
        ) from error


def _from_factory(spec: str) -> LoadedModel:
    """Build what a factory does, with the weights that it sets."""
    place, _, factory_name = spec.rpartition(":")
    with _folder_first(Path(place).resolve().parent if place.endswith(".py") else Path.cwd()):
        with off_meta():
            module = _from_file(spec, Path(place)) if place.endswith(".py") else _import_module(spec, place)
        model, own, names = _build(spec, module, factory_name)
    if own is not None:
        preprocess: Preprocess = OwnPreprocess(f"the preprocessing of {spec}", own)
        how = f"preprocessing of {spec}"
    elif callable(beside := getattr(module, "preprocess", None)):
        preprocess, how = OwnPreprocess(f"{place}:preprocess", beside), f"preprocessing of {place}:preprocess"
    else:
        preprocess, usual_how = usual_preprocess(model)
        how = f"preprocessing: {usual_how}"
    return LoadedModel(model=model, preprocess=preprocess, name=spec, weights_note=how, names=names)


@contextlib.contextmanager
def _folder_first(folder: Path) -> Iterator[None]:
    importlib.invalidate_caches()  # the module may be newer than the last look into the folder
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(str(folder))


def _from_file(spec: str, path: Path) -> ModuleType:
    """Run a file as a module of its own name, as `import` would find it from its folder."""
    if not path.is_file():
        raise ModelLoadError(
            f"cannot load the model {spec!r}: there is no file {str(path)!r}; check the path (relative paths "
            f"start at {str(Path.cwd())!r})"
        )
    own = path.resolve()
    known = sys.modules.get(own.stem)
    if known is not None and getattr(known, "__file__", None) == str(own):
        return known
    name = own.stem if known is None and own.stem.isidentifier() else f"torchlens_viz_file_{abs(hash(own))}"
    found = importlib.util.spec_from_file_location(name, own)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # before it runs, since dataclasses and pickle look there
    try:
        found.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise ModelLoadError(
            f"cannot load the model {spec!r}: running {str(path)!r} raised {one_line(error)}"
            f"; see `python {path}`"
        ) from error
    return module


def _import_module(spec: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:  # a module of someone else's may do anything
        if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
            reason = f"there is no module {error.name!r}; run from the folder that holds it, or install it"
        elif not name or name.startswith("."):
            reason = "the part before the colon must be a full module name, such as package.module, or a file"
        else:
            reason = f"importing {name} raised {one_line(error)}; see `python -c 'import {name}'`"
        raise ModelLoadError(f"cannot load the model {spec!r}: {reason}") from error


def _build(
    spec: str, module: ModuleType, name: str
) -> tuple[nn.Module, Callable[..., object] | None, tuple[str, ...]]:
    factory: object = module
    for part in name.split("."):
        if not hasattr(factory, part):
            public = [key for key in dir(factory) if key[0] != "_" and callable(getattr(factory, key, None))]
            close = difflib.get_close_matches(part, public, n=3) or sorted(public)[:3]
            hint = f"did you mean {' or '.join(close)}?" if close else "it defines none"
            raise ModelLoadError(f"`{module.__name__}` has no factory {name!r}; {hint}")
        factory = getattr(factory, part)
    if isinstance(factory, nn.Module):
        return factory, None, ()
    if not callable(factory):
        raise ModelLoadError(
            f"{spec!r} must be an nn.Module or a function that returns one, got {type(factory).__name__}"
        )
    try:
        made = factory()
    except TorchlensVizError:
        raise
    except (Exception, SystemExit) as error:
        raise ModelLoadError(
            f"the factory {spec!r} raised {one_line(error)}; it must build the model without arguments"
        ) from error
    return _taken_apart(spec, made)


def _taken_apart(spec: str, made: object) -> tuple[nn.Module, Callable[..., object] | None, tuple[str, ...]]:
    if isinstance(made, nn.Module):
        return made, None, ()
    parts: tuple[object, ...] = made if isinstance(made, tuple) else (made,)
    model, preprocess, names = (*parts, None, None)[:3]
    if not isinstance(model, nn.Module) or len(parts) > 3:
        got = f"({', '.join(type(part).__name__ for part in parts)})"
        raise ModelLoadError(
            f"the factory {spec!r} must return an nn.Module, (model, preprocess) or (model, preprocess, "
            f"names), got {got if isinstance(made, tuple) else type(made).__name__}"
        )
    if preprocess is not None and not callable(preprocess):
        raise ModelLoadError(
            f"the factory {spec!r} must return a function of a PIL image as its second part, got "
            f"{type(preprocess).__name__}"
        )
    if names is not None and (isinstance(names, str) or not isinstance(names, Sequence)):
        raise ModelLoadError(
            f"the factory {spec!r} must return a list of the names of classes as its third part, got "
            f"{type(names).__name__}"
        )
    return model, preprocess, names_of(names)
