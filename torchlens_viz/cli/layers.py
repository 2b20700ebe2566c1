"""`torchlens-viz layers`: which layers a network has, as a table or as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torchlens_viz.cli.commands import Outcome, prepared_by, told_as_model_error
from torchlens_viz.errors import InvalidArgumentError
from torchlens_viz.files.pictures import read_image
from torchlens_viz.models.state import like_parameters
from torchlens_viz.overview.layers import layers as table_of
from torchlens_viz.overview.table import LayerTable
from torchlens_viz.zoo.load import load_model, load_structure


def list_layers(
    model: str, image: Path | None, *, layers: Sequence[str] | None, blocks: bool, as_json: bool
) -> Outcome:
    """List the layers of a network in execution order.

    No weights are loaded, since the table does not depend on them; without an image none are made either.

    Args:
        model: What `torchlens_viz.zoo.load.load_model` takes.
        image: A picture to show to the network, so that time is measured; None for zeros.
        layers: Names and globs; every layer where it is None.
        blocks: List also layers that hold others.
        as_json: Give JSON in place of the table.

    Returns:
        The table as text.
    """
    table = _table(model, image, None if layers is None else list(layers), blocks)
    return Outcome(paths=[], notes=[], text=table.to_json() if as_json else str(table))


def _table(model: str, image: Path | None, layers: list[str] | None, blocks: bool) -> LayerTable:
    if image is not None:
        picture = read_image(image)
        loaded = load_model(model, weights="none")
        prepared = like_parameters(prepared_by(loaded, picture), loaded.model)
        with told_as_model_error(loaded, f"this picture as an input of shape {tuple(prepared.shape)}"):
            args, kwargs = loaded.arguments(prepared)
            return table_of(loaded.model, dict(kwargs) or args, layers=layers, blocks=blocks)
    light = load_structure(model)
    try:
        return table_of(light.model, layers=layers, blocks=blocks)
    except InvalidArgumentError:  # it may look at values, of which it has none
        loaded = load_model(model, weights="none")
        return table_of(loaded.model, layers=layers, blocks=blocks)
