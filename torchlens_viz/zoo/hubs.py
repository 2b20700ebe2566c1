"""Models of timm and of transformers by name, each prepared for as the package itself says."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import io
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor, nn

from torchlens_viz.errors import ModelLoadError, TorchlensVizError, needed, one_line
from torchlens_viz.files.pictures import as_rgb
from torchlens_viz.zoo.loaded import (
    LoadedModel,
    Preprocess,
    names_of,
    not_too_long,
    off_meta,
    usual_preprocess,
)


def from_timm(name: str, choice: str) -> LoadedModel:
    """Build one of timm's models, with its own data configuration as preprocessing and the names it knows.

    Args:
        name: Its name there, with or without a tag: `resnet50`, `resnet50.a1_in1k`, `hf_hub:timm/...`.
        choice: `"default"` for the weights of that name; `"none"` or `"file"` for random ones.

    Raises:
        ModelLoadError: The name is unknown, or the weights cannot be had.
        MissingDependencyError: timm is not installed.
    """
    with off_meta():
        timm = needed("timm", f"timm/{name} is a model of timm", "timm")
        data = needed("timm.data", f"timm/{name} is a model of timm", "timm")
    is_elsewhere = ":" in name
    base = name.partition(".")[0]
    if not is_elsewhere and not timm.is_model(base):
        close = difflib.get_close_matches(base, timm.list_models(), n=3)
        names = " or ".join(f"timm/{each}" for each in close)
        hint = f"did you mean {names}?" if close else "see timm.list_models()"
        raise ModelLoadError(f"no timm model is named {name!r}; {hint}")
    with _told(f"timm/{name}", "use `--weights none` for random ones, or give a file as `--weights FILE`"):
        model: nn.Module = timm.create_model(name, pretrained=choice == "default")
    with off_meta():
        transform = data.create_transform(**data.resolve_model_data_config(model), is_training=False)
    found = getattr(model, "pretrained_cfg", None) or {}
    tagged = f"{base}.{found['tag']}" if found.get("tag") else name
    origin = {"default": f"weights {tagged} of timm, ", "none": "random weights (seed 0), "}
    return LoadedModel(
        model=model,
        preprocess=lambda image: transform(as_rgb(not_too_long(image))).unsqueeze(0),
        name=f"timm/{name}",
        weights_note=f"{origin.get(choice, '')}preprocessing of timm for {base}",
        names=_timm_names(data, model, found),
    )


def _timm_names(data: Any, model: nn.Module, found: Any) -> tuple[str, ...]:
    if found.get("label_names"):
        return names_of(found["label_names"])
    try:
        subset = data.infer_imagenet_subset(model)
        if not subset:
            return ()
        info = data.ImageNetInfo(subset)
        return tuple(info.index_to_description(place) for place in range(info.num_classes()))
    except Exception:  # of a data set it has no list for
        return ()


def from_transformers(name: str, choice: str) -> LoadedModel:
    """Build an image model of transformers, with its processor as preprocessing and the names it knows.

    Of a model that takes text beside images, the part that takes images.

    Args:
        name: The name of a model on the hub, or a folder that holds one.
        choice: `"default"` for its weights, from safetensors alone; `"none"` or `"file"` for random ones.

    Raises:
        ModelLoadError: There is no such model, it takes no images, or its weights cannot be had.
        MissingDependencyError: transformers is not installed.
    """
    with off_meta():
        transformers = needed("transformers", f"hf/{name} is a model of transformers", "hf")
    spec = f"hf/{name}"
    advice = "check the name, or give a folder that holds config.json and model.safetensors"
    with _told(spec, advice), off_meta():
        config = transformers.AutoConfig.from_pretrained(name)
        builder = _builder(transformers, config)
    with _told(spec, f"{advice}; `--weights none` is for random ones"):
        if choice == "default":
            model = builder.from_pretrained(name, config=config, use_safetensors=True)
        else:
            model = builder._from_config(config)
    with off_meta():
        preprocess, how = _processor(transformers, name, model)
    origin = {"default": f"weights of {name}, ", "none": "random weights (seed 0), "}
    labels = getattr(config, "id2label", None) or {}
    return LoadedModel(
        model=_that_takes_images(spec, model),
        preprocess=preprocess,
        name=spec,
        weights_note=origin.get(choice, "") + how,
        names=names_of([labels[key] for key in sorted(labels)]),
        inputs={"pixel_values": None},
    )


def _builder(transformers: Any, config: Any) -> Any:
    """Return the class that a configuration was written by, or that for its kind."""
    for architecture in getattr(config, "architectures", None) or ():
        if hasattr(transformers, architecture):
            return getattr(transformers, architecture)
    for auto in (transformers.AutoModelForImageClassification, transformers.AutoModel):
        with contextlib.suppress(Exception):
            return auto._model_mapping[type(config)]
    raise ModelLoadError(
        f"transformers knows no model for a configuration of {type(config).__name__}; give one of images"
    )


def _that_takes_images(spec: str, model: nn.Module) -> nn.Module:
    for part in (model, getattr(model, "vision_model", None)):
        if isinstance(part, nn.Module):
            names = list(inspect.signature(part.forward).parameters)
            if names[:1] == ["pixel_values"]:
                return part
    raise ModelLoadError(
        f"{spec} must be a model of images, got {type(model).__name__}, which takes no `pixel_values`"
    )


def _processor(transformers: Any, name: str, model: nn.Module) -> tuple[Preprocess, str]:
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            processor: Callable[..., Any] = transformers.AutoImageProcessor.from_pretrained(name)
    except Exception:  # the folder of a model that was trained without one holds none
        preprocess, how = usual_preprocess(model)
        return preprocess, f"no processor: {how}"

    def prepared(image: Image.Image) -> Tensor:
        made: Tensor = processor(images=as_rgb(not_too_long(image)), return_tensors="pt")["pixel_values"]
        return made

    return prepared, f"preprocessing of {type(processor).__name__}"


@contextlib.contextmanager
def _told(spec: str, advice: str) -> Iterator[None]:
    """Say of whatever a package raises what was asked for, and what can be done."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    except TorchlensVizError:
        raise
    except Exception as error:  # what packages raise for a missing file, a network or a damaged file
        where = "" if not Path(spec.partition("/")[2]).is_dir() else " from the folder"
        raise ModelLoadError(f"cannot load {spec}{where} ({one_line(error)}); {advice}") from error
