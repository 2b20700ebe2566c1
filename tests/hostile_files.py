"""Files that are damaged in many ways, and what reads them."""

from __future__ import annotations

import io
import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import torchlens_viz as tv
from tests.hostile import (
    ACTS,
    CLIMBED,
    IMAGES,
    NET,
    PROJECTED,
    SURVEY,
    climbed,
    make_net,
    surveyed,
)
from torchlens_viz.files.pictures import read_image


def make_files(folder: Path) -> dict[str, tuple[Path, Callable[[Path], Any]]]:
    """Write one of every kind of file, and say how each is read and then looked at."""
    from safetensors.torch import save_file

    from torchlens_viz.zoo.weights import load_weights, read_weights

    ACTS.save(folder / "acts.safetensors")
    SURVEY.save(folder / "survey.safetensors")
    CLIMBED.save(folder / "climbed")
    PROJECTED.save(folder / "projected")
    surveyed(checkpoint=folder / "begun.safetensors", correlations=True)
    resumed(folder / "resumed")
    checked(folder / "baselines", overwrite=True)
    torch.save(NET.state_dict(), folder / "weights.pth")
    torch.save({"state_dict": NET.state_dict(), "epoch": 3}, folder / "training.ckpt")
    save_file(NET.state_dict(), folder / "weights.safetensors")
    Image.new("RGB", (20, 10), (9, 99, 199)).save(folder / "picture.png")
    Image.fromarray(np.full((10, 20), 40000, np.uint16)).save(folder / "deep.png")
    Image.new("RGB", (20, 10), (9, 99, 199)).save(folder / "picture.jpg")

    def weights(path: Path) -> None:
        load_weights(make_net(), read_weights(path).tensors, str(path))

    return {
        "activations": (folder / "acts.safetensors", look_at_activations),
        "survey": (folder / "survey.safetensors", look_at_survey),
        "survey checkpoint": (
            folder / "begun.safetensors",
            lambda path: surveyed(checkpoint=path, correlations=True).to_dict(),
        ),
        "maximization": (folder / "climbed" / "maximization.npz", look_at_climbed),
        "projection": (folder / "projected" / "projection.npz", look_at_projected),
        "image of a checkpoint": (folder / "resumed" / "0-0.npz", lambda path: resumed(path.parent)),
        "settings of a checkpoint": (folder / "resumed" / "settings.json", lambda path: resumed(path.parent)),
        "baseline": (folder / "baselines" / "a.json", lambda path: checked(path.parent, overwrite=False)),
        "weights.pth": (folder / "weights.pth", weights),
        "training.ckpt": (folder / "training.ckpt", weights),
        "weights.safetensors": (folder / "weights.safetensors", weights),
        "picture.png": (folder / "picture.png", read_image),
        "deep.png": (folder / "deep.png", read_image),
        "picture.jpg": (folder / "picture.jpg", read_image),
    }


def resumed(folder: Path) -> Any:
    """Go on with a checkpoint of `maximize`, and hold that nothing passed on what no ascent makes."""
    found = climbed(checkpoint=folder, method=tv.Normalized(frames=1))
    look_at(found)
    assert found.images.isfinite().all(), "an image of a checkpoint is not finite"
    return found


def checked(folder: Path, *, overwrite: bool) -> None:
    from torchlens_viz.testing.baseline import ActivationRegression

    ActivationRegression(folder, "a", overwrite=overwrite).check(ACTS)


def look_at_activations(path: Path) -> None:
    acts = tv.Activations.load(path)
    for name in acts:
        acts.calls(name)
    repr(acts)


def look_at_survey(path: Path) -> None:
    found = tv.Survey.load(path, model=NET)
    json.dumps(found.to_dict())
    found.findings()
    found.rows()
    repr(found)
    for name in found.top:
        found.grid(name, IMAGES)
    for name in found.top_by_relevance:
        found.grid(name, IMAGES, by="relevance")


def look_at_climbed(path: Path) -> None:
    look_at(tv.Maximization.load(path.parent))


def look_at_projected(path: Path) -> None:
    found = tv.Projection.load(path.parent)
    found.grid()
    found.save("looked at again")
    repr(found)


def look_at(found: Any) -> None:
    found.grid()
    found.save("looked at")
    repr(found)
    assert set(found.status) <= {"threshold", "steps", "stalled", "dead", "nonfinite"}, "a status is none"


def damaged(data: bytes, kind: str, chance: random.Random) -> bytes:
    """Return a file with one thing wrong that somebody or something may have done to it."""
    ways: list[Callable[[bytes, random.Random], bytes]] = [cut, flipped, blanked]
    if kind.endswith((".json", ".safetensors", ".npz")):
        ways += [edited] * 7
    return chance.choice(ways)(data, chance) if not kind.endswith(".npz") else _npz(data, ways, chance)


def cut(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(len(data))]


def flipped(data: bytes, chance: random.Random) -> bytes:
    spoilt = bytearray(data)
    for _ in range(chance.choice([1, 3, 30])):
        # Headers stand at the beginning or the end, and matter most.
        reach = chance.choice([40, 400, len(data)])
        place = chance.randrange(min(reach, len(data)))
        spoilt[place if chance.random() < 0.7 else len(data) - 1 - place] = chance.randrange(256)
    return bytes(spoilt)


def blanked(data: bytes, chance: random.Random) -> bytes:
    start = chance.randrange(len(data))
    return data[:start] + bytes(min(chance.choice([1, 8, 200]), len(data) - start)) + data[start + 200 :]


JSON_VALUES = [
    None, True, -1, 0, 1, 3, 2**31, 2**63, 2**70, 1.5, float("nan"), float("inf"), "", "F64",
    [], {}, [0], [-1], [2**40], [2**40, 2**40], [None], ["x"], [[]], {"x": 1}, {"tensor": "0#0"},
    {"value": 1}, {"list": []}, {"mapping": [[]]}, {"named": {}}, "a" * 300, "0",
]  # fmt: skip


def changed(value: Any, chance: random.Random) -> Any:
    """Return JSON with one value replaced, left out or doubled."""
    places: list[tuple[Any, Any]] = []

    def collect(inner: Any) -> None:
        keys = (
            list(inner) if isinstance(inner, dict) else range(len(inner)) if isinstance(inner, list) else ()
        )
        for key in keys:
            places.append((inner, key))
            collect(inner[key])

    value = json.loads(json.dumps(value))
    collect(value)
    if not places:
        return chance.choice(JSON_VALUES)
    inner, key = chance.choice(places)
    way = chance.random()
    if way < 0.7:
        inner[key] = chance.choice(JSON_VALUES)
    elif way < 0.85:
        del inner[key]
    elif isinstance(inner, dict):
        inner[chance.choice(["x", "__proto__", "a.b"])] = inner[key]
    else:
        inner.append(inner[key])
    return value


def edited(data: bytes, chance: random.Random) -> bytes:
    """Change a JSON header and leave all else well formed."""
    if data[:1] == b"{":
        return json.dumps(changed(json.loads(data), chance)).encode()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    body = data[8 + length :]
    metadata = header.get("__metadata__", {})
    if "torchlens_viz" in metadata and chance.random() < 0.7:
        metadata["torchlens_viz"] = json.dumps(changed(json.loads(metadata["torchlens_viz"]), chance))
    else:
        names = [name for name in header if name != "__metadata__"]
        name = chance.choice(names)
        entry = header[name]
        way = chance.randrange(5)
        if way == 0:
            entry["dtype"] = {"F32": "I32", "F64": "I64", "I64": "F64"}.get(entry["dtype"], "U8")
        elif way == 1:
            entry["shape"] = entry["shape"][::-1]
        elif way == 2:
            entry["shape"] = [*entry["shape"], 1] if chance.random() < 0.5 else [1, *entry["shape"]]
        elif way == 3:
            header[f"{name}x"] = header.pop(name)
        else:
            entry["shape"] = chance.choice(JSON_VALUES)
        if chance.random() < 0.2:
            start, end = entry.get("data_offsets", [0, 0])
            body = body[:start] + b"\xff" * (end - start) + body[end:]
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def _npz(data: bytes, ways: list[Callable[[bytes, random.Random], bytes]], chance: random.Random) -> bytes:
    way = chance.choice(ways)
    if way is not edited:
        return way(data, chance)
    with np.load(io.BytesIO(data)) as archive:
        arrays = dict(archive)
    told = json.loads(arrays["told"].tobytes())
    if chance.random() < 0.5:
        arrays["told"] = np.frombuffer(json.dumps(changed(told, chance)).encode(), np.uint8)
    else:
        name = chance.choice(sorted(arrays))
        arrays[name] = chance.choice(
            [
                lambda values: values[:0],
                lambda values: values[None],
                lambda values: values.reshape(-1),
                lambda values: np.full(values.shape, np.nan, np.float32),
                lambda values: np.full(values.shape, 2**62, np.int64),
                lambda values: -values.astype(np.float64) - 1,
                lambda values: values.astype(np.complex64),
                lambda values: values.astype(">f4"),
                lambda values: values.astype("U3"),
                lambda values: values.astype(bool),
                lambda values: np.concatenate([values, values]),
                lambda values: values.astype(np.float16),
            ]
        )(arrays[name])
        if chance.random() < 0.2:
            del arrays[name]
    buffer = io.BytesIO()
    (np.savez if chance.random() < 0.9 else np.savez_compressed)(buffer, **arrays)
    return buffer.getvalue()
