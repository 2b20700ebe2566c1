"""The command `project`: which pattern in a picture made units of some layers fire."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torchlens_viz.attribution.project import project
from torchlens_viz.cli.commands import Outcome, own_gpu, prepared_by, told_as_model_error
from torchlens_viz.files.paths import safe_names
from torchlens_viz.files.pictures import read_image
from torchlens_viz.models.layers import select
from torchlens_viz.models.state import usable_device
from torchlens_viz.zoo.load import load_model


def project_units(
    model: str,
    image: Path,
    out: Path,
    *,
    layers: Sequence[str],
    weights: str,
    device: str | None,
    options: Mapping[str, Any],
) -> Outcome:
    """Write which pattern in a picture made units of some layers fire.

    Args:
        model: What `torchlens_viz.zoo.load.load_model` takes.
        image: The picture file.
        out: The folder; each layer gets one of its own in it, as `Projection.save` writes it.
        layers: Names and globs.
        weights: What `load_model` takes.
        device: Where to run; None is a GPU where there is one.
        options: What `torchlens_viz.project` takes by keyword.

    Returns:
        The sheets, one per layer, and which weights they show.
    """
    picture = read_image(image)
    loaded = load_model(model, weights=weights)
    names = [layer.name for layer in select(loaded.model, list(layers))]
    prepared_by(loaded, picture)  # what is wrong with the preprocessing is said before anything is written
    loaded.model.to(usable_device(device or own_gpu() or "cpu", "--device"))
    with told_as_model_error(loaded, "this picture"):
        found = [
            project(
                loaded.model,
                name,
                picture,
                preprocess=loaded.preprocess,
                inputs=loaded.inputs,
                **options,
            )
            for name in names
        ]
    folders = [out / name for name in safe_names(names)]
    paths = [each.save(folder) / "grid.png" for each, folder in zip(found, folders, strict=True)]
    return Outcome(paths=paths, notes=[f"{loaded.name}: {loaded.weights_note}"])
