"""Two models on the same pictures: a table of their layers, and where they begin to differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from torchlens_viz.cli.commands import Outcome, prepared_by, told_as_model_error
from torchlens_viz.comparison.compare import compare
from torchlens_viz.files.pictures import read_image, save_picture
from torchlens_viz.models.state import usable_device
from torchlens_viz.zoo.load import load_model


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What became of a comparison.

    Attributes:
        table: The layers, line by line.
        is_same: Whether no layer is beyond the tolerance.
        outcome: The files that were written, and notes.
    """

    table: str
    is_same: bool
    outcome: Outcome


def compare_models(
    a: str,
    b: str,
    images: Sequence[Path],
    out: Path | None,
    *,
    layers: Sequence[str] | None,
    weights: tuple[str, str],
    device: str | None,
    options: dict[str, Any],
) -> Verdict:
    """Compare two models, both on what the preprocessing of the first makes of the pictures.

    Args:
        a: What `torchlens_viz.zoo.load.load_model` takes: the model that is right.
        b: The other.
        images: The picture files.
        out: A picture to write of the first layer beyond the tolerance, or of the one nearest to it.
        layers: Names and globs; all layers where it is None.
        weights: What `load_model` takes, for either.
        device: Where to run; None is the CPU.
        options: What `compare` takes by keyword.
    """
    pictures = [read_image(path) for path in images]
    ours, theirs = (load_model(name, weights=each) for name, each in zip((a, b), weights, strict=True))
    place = usable_device(device or "cpu", "--device")
    for loaded in (ours, theirs):
        loaded.model.to(place)
    batches = [prepared_by(ours, picture) for picture in pictures]
    chosen = None if layers is None else list(layers)
    with torch.inference_mode(), told_as_model_error(theirs, f"what the preprocessing of {ours.name} makes"):
        found = compare(ours.on_images, theirs.on_images, batches, chosen, **options)
    notes = [f"{loaded.name}: {loaded.weights_note}" for loaded in (ours, theirs)]
    paths = []
    if out is not None:
        paths = [save_picture(found.grid(value_range="robust", labels=True, legend=True), out)]
    return Verdict(table=repr(found), is_same=found.first is None, outcome=Outcome(paths=paths, notes=notes))
