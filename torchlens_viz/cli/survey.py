"""What a survey of a folder found, in files: findings, tables, the survey itself and a sheet per layer."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, final

import torch
from PIL import Image
from torch import nn

from torchlens_viz.cli.commands import Outcome, own_gpu, prepared_by, told_as_model_error
from torchlens_viz.dataset.findings import Finding
from torchlens_viz.dataset.result import Survey
from torchlens_viz.dataset.survey import survey
from torchlens_viz.distributed import gathered, joined
from torchlens_viz.errors import (
    ArchiveError,
    InvalidArgumentError,
    PictureError,
    TorchlensVizError,
    one_line,
)
from torchlens_viz.files.classes import Classes, classes_of
from torchlens_viz.files.paths import safe_names, write_whole
from torchlens_viz.files.pictures import pictures_in, read_image, save_picture
from torchlens_viz.models.colours import colours_of
from torchlens_viz.models.kernels import image_axes
from torchlens_viz.models.layers import select
from torchlens_viz.models.state import device_of, usable_device
from torchlens_viz.progress import is_shown, tracked
from torchlens_viz.stats.classes import MOST_CLASSES
from torchlens_viz.zoo.load import load_model
from torchlens_viz.zoo.loaded import LoadedModel

_MOST_ROWS: Final = 32  # channels on a sheet, where none are chosen
_MOST_IMPORTANT: Final = 5  # channels that are named
_CLASS_COLUMNS: Final = ("layer", "class", "output", "inputs", "channel", "effect", "effect_error")


@final
class Files:
    """All pictures by index, as `Survey.grid` takes them."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files

    def __getitem__(self, index: int) -> Image.Image:
        return read_image(self._files[index])


def write_report(
    found: Survey,
    loaded: LoadedModel,
    files: Sequence[Path],
    bad: list[tuple[int, str]],
    out: Path,
    channels: Sequence[int] | None,
) -> tuple[list[Path], list[str]]:
    """Write what was found.

    Args:
        found: The survey.
        loaded: The model, for the preprocessing of what is drawn.
        files: All pictures, by index.
        bad: Those that could not be read, by index, and why.
        out: The folder to write to.
        channels: The channels to draw; None is the first 32.

    Returns:
        The files, and what there is to tell.
    """
    findings = found.findings()
    rows = found.rows()
    spoilt = dict(bad)
    tables: dict[str, list[dict[str, Any]]] = {
        "findings.csv": [
            {**each._asdict(), "channels": " ".join(map(str, each.channels))} for each in findings
        ],
        "statistics.csv": rows,
        "pictures.csv": [
            {"index": index, "file": str(path), "problem": spoilt.get(index, "")}
            for index, path in enumerate(files)
        ],
    }
    paths = [_table(out / name, content) for name, content in tables.items()]
    whole = json.dumps(_plain(found.to_dict()), allow_nan=False)
    write_whole(out / "statistics.json", whole.encode(), ArchiveError)
    paths += [out / "statistics.json", found.save(out / "survey.safetensors")]
    notes = [f"{found.samples_seen:,} pictures surveyed, {len(bad):,} bad ones skipped"] if bad else []
    if found.not_called:
        notes.append(f"did not run: {', '.join(found.not_called)}")
    invert = inverse_of(loaded)
    drawable = [name for name in found.top if found.top[name].values.shape[1]]
    sheets = list(zip(drawable, safe_names(drawable), strict=True))
    for name, file_name in tracked(sheets, shown=is_shown(None), total=len(sheets), unit="sheet"):
        count = found.stats[name].channels
        drawn = [channel for channel in channels or range(_MOST_ROWS) if channel < count]
        if not drawn:
            notes.append(f"no sheet of {name}, which has {count} channels")
            continue
        try:
            sheet = found.grid(
                name,
                Files(files),
                channels=drawn,
                preprocess=loaded.preprocess,
                invert=invert,
                title=name,
            )
        except InvalidArgumentError as error:
            notes.append(f"no sheet of {name}: {one_line(error)}")
            continue
        paths.append(save_picture(sheet, out / "top" / f"{file_name}.png"))
        if len(drawn) < count:
            notes.append(f"{name}: {len(drawn)} of {count} channels drawn")
    notes += [f"{each.kind}: {each.layer}, {each.meaning}" for each in findings[:5]]
    return paths, notes


def inverse_of(loaded: LoadedModel) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Return what undoes the preprocessing of colours; None where it cannot be told once for all pictures."""
    try:
        return colours_of(loaded.preprocess, axes=image_axes(loaded.model)).undo
    except InvalidArgumentError:  # it may well be made for other pictures than plain ones
        return None


def _table(path: Path, rows: Sequence[dict[str, Any]], columns: Sequence[str] = Finding._fields) -> Path:
    """Write rows; `columns` are those of a table without any."""
    text = io.StringIO()
    columns = list(dict.fromkeys(name for row in rows for name in row)) or list(columns)
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    # A file's name may hold bytes that are no text.
    write_whole(path, text.getvalue().encode("utf-8", "backslashreplace"), ArchiveError)
    return path


def _plain(value: Any) -> Any:
    """Replace what JSON has no number for by null."""
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def survey_folder(
    model: str,
    folder: Path,
    out: Path,
    *,
    layers: Sequence[str] | None,
    weights: str,
    device: str | None,
    batch_size: int,
    top_k: int,
    skip_bad: bool,
    loss: Literal["cross_entropy"] | None,
    channels: Sequence[int] | None,
    channel_dim: int | None,
) -> Outcome:
    """Survey a folder of pictures, and write what was found.

    A run that was broken off goes on where it was, when it is started again with the same options. Under
    torchrun the pictures are shared among the processes, of which the first writes.

    Args:
        model: What `torchlens_viz.zoo.load.load_model` takes.
        folder: The pictures, in folders of any depth; their order is that of their paths.
        out: The folder to write to.
        layers: Names and globs; every convolution where it is None.
        weights: What `load_model` takes.
        device: Where to run; None is a GPU where there is one.
        batch_size: Pictures at a time.
        top_k: Pictures to keep per channel.
        skip_bad: Pass over pictures that cannot be read, and list them.
        loss: What to estimate the effect of every channel on; the pictures then lie in a folder for each
            class, see `classes_of`.
        channels: The channels to draw; None is the first 32.
        channel_dim: The dimension that counts channels, as in `survey`.

    Returns:
        `findings.csv`, `statistics.csv`, `statistics.json`, `pictures.csv`, `survey.safetensors` and the
        sheets `top/LAYER.png`; with a loss `classes.csv` too; nothing in the other processes of a torchrun.

    Raises:
        InvalidArgumentError: There is a loss, and the folders do not fit the outputs of the network.
        PictureError: The folder is missing or has no picture, or one cannot be read and `skip_bad` is off.
    """
    for name, value, least in (("--batch-size", batch_size, 1), ("--top-k", top_k, 0)):
        if value < least:
            raise InvalidArgumentError(f"`{name}` must be at least {least}, got {value}")
    files = pictures_in(folder, but_not_in=out / "top")  # an earlier run's sheets
    loaded = load_model(model, weights=weights)
    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[image_axes(loaded.model) - 1]
    selected: Any = convolutions if layers is None else list(layers)
    names = [layer.name for layer in select(loaded.model, selected)]
    with joined() as rank:
        loaded.model.to(usable_device(device or own_gpu() or "cpu", "--device"))
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        classes = None
        if loss is not None:
            one = Pictures(files, loaded, 1, skip_bad=skip_bad, share=(0, 1))
            outputs = next((_outputs_of(loaded, batch) for batch, *_ in one), 0)
            classes = classes_of(files, folder, names=loaded.names, outputs=outputs)
        own = Pictures(
            files,
            loaded,
            batch_size,
            skip_bad=skip_bad,
            share=(rank, processes),
            labels=() if classes is None else classes.labels,
        )
        unfinished = out / "unfinished.safetensors"
        try:
            with told_as_model_error(loaded, "these pictures"):
                found = survey(
                    loaded.model,
                    own,
                    names,
                    inputs=loaded.inputs,
                    top_k=top_k,
                    indices=lambda batch: batch[1],
                    correlations=True,
                    channel_dim=channel_dim,
                    checkpoint=unfinished,
                    loss=loss,
                    label_of=None if classes is None else 2,
                    by_class=classes is not None and len(classes.outputs) <= MOST_CLASSES,
                )
        except TorchlensVizError as error:
            if own.bad and len(own.bad) == own.seen:
                raise PictureError(f"no picture in {str(folder)!r} can be read; {own.bad[0][1]}") from error
            raise
        if not found.is_complete:
            raise KeyboardInterrupt  # what was seen stays where the next run finds it
        if own.seen < len(own.dataset):  # all of it was in the file of an earlier run, but for the bad ones
            deque(own, maxlen=0)
        bad = sorted(gathered(lambda: own.bad))
        own_file = Path(f"{unfinished}.{rank}") if processes > 1 else unfinished
        if rank != 0:
            own_file.unlink(missing_ok=True)
            return Outcome(paths=[], notes=[])
        paths, notes = write_report(found, loaded, files, bad, out, channels)
        if classes is not None:
            paths.append(_table(out / "classes.csv", list(_rows_by_class(found, classes)), _CLASS_COLUMNS))
            notes = [classes.told, *_most_important(found), *notes]
        own_file.unlink(missing_ok=True)  # all of it is in what was saved
    return Outcome(paths=paths, notes=[f"{loaded.name}: {loaded.weights_note}", *notes])


def _outputs_of(loaded: LoadedModel, batch: torch.Tensor) -> int:
    with torch.no_grad(), told_as_model_error(loaded, "these pictures"):
        output = loaded.on_images(batch.to(device_of(loaded.model)))
    if not isinstance(output, torch.Tensor) or output.ndim != 2:
        what = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
        raise InvalidArgumentError(f"`--loss` needs a network that puts out (N, classes), got {what}")
    return output.shape[1]


def _most_important(found: Survey) -> list[str]:
    """Say without which channels the loss would be largest."""
    ranked = sorted((row for row in found.rows() if row["effect"] > 0), key=lambda row: -row["effect"])
    return [
        f"{row['layer']}, channel {row['channel']}: loss +{row['effect']:.3g} +- {row['effect_error']:.2g} "
        "without it, as estimated"
        for row in ranked[:_MOST_IMPORTANT]
    ]


def _rows_by_class(found: Survey, classes: Classes) -> Iterator[dict[str, Any]]:
    """Yield for every layer and class the channel that it needs most."""
    names = {place: name for name, place in classes.outputs.items()}
    for layer in found.selectivity:
        by_class = found.effects.by_class(layer)
        for label, inputs, change, error in zip(*by_class, strict=True):
            channel = int(change.argmax())
            figures = (layer, names[int(label)], int(label), int(inputs), channel)
            yield dict(
                zip(_CLASS_COLUMNS, (*figures, float(change[channel]), float(error[channel])), strict=True)
            )


@final
@dataclass
class Pictures:
    """The share of one process, as batches with the indices of the pictures and their labels, if any.

    A batch is of one size.
    """

    files: Sequence[Path]
    loaded: LoadedModel
    batch_size: int
    skip_bad: bool = field(kw_only=True)
    share: tuple[int, int] = field(kw_only=True)
    labels: Sequence[int] = field(kw_only=True, default=())
    bad: list[tuple[int, str]] = field(default_factory=list)
    seen: int = 0

    def __iter__(self) -> Iterator[tuple[torch.Tensor, list[int], list[int]]]:
        self.bad, self.seen = [], 0
        together: list[torch.Tensor] = []
        indices: list[int] = []
        for index in self.dataset:
            prepared = self._prepared(index)
            self.seen += 1
            if prepared is None:
                continue
            if together and (len(together) == self.batch_size or prepared.shape != together[0].shape):
                yield torch.cat(together), indices, self._labelled(indices)
                together, indices = [], []
            together.append(prepared)
            indices.append(index)
        if together:
            yield torch.cat(together), indices, self._labelled(indices)

    def _labelled(self, indices: Sequence[int]) -> list[int]:
        return [self.labels[index] for index in indices] if self.labels else []

    @property
    def dataset(self) -> range:
        """The indices of the pictures, of which there are as many as inputs, or more where some are bad."""
        return range(self.share[0], len(self.files), self.share[1])

    def _prepared(self, index: int) -> torch.Tensor | None:
        try:
            picture = read_image(self.files[index])
        except PictureError as error:
            if not self.skip_bad:
                raise PictureError(f"{error}; or pass --skip-bad") from error
            self.bad.append((index, str(error)))
            return None
        return prepared_by(self.loaded, picture, repr(str(self.files[index])))
