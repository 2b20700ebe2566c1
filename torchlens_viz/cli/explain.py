"""`torchlens-viz explain`: pictures through a model, and where in them the evidence for an output lies."""

from __future__ import annotations

import csv
import difflib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torchlens_viz.attribution.explain import explain
from torchlens_viz.cli.commands import Outcome, own_gpu, prepared_by, told_as_model_error
from torchlens_viz.errors import ArchiveError, InvalidArgumentError
from torchlens_viz.files.paths import safe_names, write_whole
from torchlens_viz.files.pictures import read_image, save_picture
from torchlens_viz.models.state import usable_device
from torchlens_viz.zoo.load import load_model
from torchlens_viz.zoo.loaded import LoadedModel


def explain_pictures(
    model: str,
    images: Sequence[Path],
    out: Path,
    *,
    target: str | None,
    layers: Sequence[str] | None,
    weights: str,
    device: str | None,
    drawing: Mapping[str, Any],
    options: Mapping[str, Any],
) -> Outcome:
    """Write, for each picture, where in it the evidence for an output lies, and a table.

    Nothing is written unless every picture can be explained.

    Args:
        model: What `torchlens_viz.zoo.load.load_model` takes.
        images: The picture files.
        out: The folder.
        target: An output by index or name; the highest of each picture where it is None.
        layers: Names and globs; chosen as `explain` says where it is None.
        weights: What `load_model` takes.
        device: Where to run; None is a GPU where there is one.
        drawing: What `Explanation.grid` takes by keyword.
        options: What `explain` takes by keyword.

    Returns:
        A sheet per picture and the table; the weights used, and the figures of each picture.
    """
    pictures = [read_image(path) for path in images]
    loaded = load_model(model, weights=weights)
    chosen = _index(target, loaded)
    loaded.model.to(usable_device(device or own_gpu() or "cpu", "--device"))
    rows, sheets, notes = [], [], [f"{loaded.name}: {loaded.weights_note}"]
    for path, picture in zip(images, pictures, strict=True):
        prepared = prepared_by(loaded, picture, repr(str(path)))
        with told_as_model_error(loaded, f"{str(path)!r} as an input of shape {tuple(prepared.shape)}"):
            found = explain(
                loaded.model,
                picture,
                chosen,
                preprocess=loaded.preprocess,
                inputs=loaded.inputs,
                layer=None if layers is None else list(layers),
                **options,
            )
            trust = found.trust
        label = found.label(0, loaded.names)
        figures = [each[0].item() for each in (trust.kept, trust.lost, trust.rank_correlation)]
        rows.append([str(path), label, found.scores[0].item(), *figures])
        sheets.append(found.grid(names=loaded.names, title=path.name, **drawing))
        notes.append(
            f"{path.name}: {label}, output {found.scores[0].item():.4g}; {'; '.join(found.legend())}"
        )
    names = safe_names([path.stem for path in images])
    paths = [save_picture(sheet, out / f"{name}.png") for sheet, name in zip(sheets, names, strict=True)]
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(("picture", "target", "score", "kept", "lost", "rank_correlation"))
    writer.writerows(rows)
    write_whole(out / "scores.csv", table.getvalue().encode(), ArchiveError)
    return Outcome(paths=[*paths, out / "scores.csv"], notes=notes)


def _index(target: str | None, loaded: LoadedModel) -> int | None:
    """Return the index of an output that was named."""
    if target is None or target.isdecimal():
        return None if target is None else int(target)
    known = [name.casefold() for name in loaded.names]
    if target.casefold() in known:
        return known.index(target.casefold())
    close = difflib.get_close_matches(target.casefold(), known, n=3, cutoff=0.5)
    close = close or [name for name in known if target.casefold() in name][:3]
    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "give its index"
    brings = "" if known else f", and the weights of {loaded.name} bring no names"
    raise InvalidArgumentError(f"`--target` must be an output of the network, got {target!r}{brings}; {hint}")
