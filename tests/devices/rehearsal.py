"""Run every public function on the stand-in, in a process of its own, and say what differs from the CPU.

python -m tests.devices.rehearsal [--no-float64]
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import torch

import torchlens_viz as tv
from tests.devices.stand_in import Desk  # before the first backward pass
from tests.public import IMAGES, PUBLIC, captured, make_net, plain

# What must never wait for the device while the network runs.
WAITLESS = {
    "capture": lambda net, images: captured(net, images),
    "channels": lambda net, images: captured(net, images, channels=[2, 0]),
    "a reduction": lambda net, images: captured(net, images, reduce=lambda t: t.mean((2, 3))),
    "statistics": lambda net, images: captured(net, images, reduce=tv.RunningStats),
    "a histogram": lambda net, images: captured(net, images, reduce=tv.RunningStats(bins="log")),
    "stop": lambda net, images: captured(net, images, stop=True),
}


def differences(found: Any, expected: Any, place: str = "") -> list[str]:
    """Say where two results differ by more than float32 does; pictures by more than one level."""
    if isinstance(expected, dict):
        return [text for key in expected for text in differences(found[key], expected[key], f"{place}/{key}")]
    if isinstance(expected, bytes):
        found, expected = (np.frombuffer(each, np.uint8).astype(float) for each in (found, expected))
        return [] if found.shape == expected.shape and np.abs(found - expected).max() <= 1 else [place]
    try:
        np.testing.assert_allclose(
            np.asarray(found, float), np.asarray(expected, float), rtol=1e-5, atol=1e-6
        )
    except (TypeError, ValueError):  # lists of different lengths, or of words
        if isinstance(expected, list) and isinstance(found, list) and len(found) == len(expected):
            pairs = enumerate(zip(found, expected, strict=True))
            return [text for index, (a, b) in pairs for text in differences(a, b, f"{place}/{index}")]
        return [] if found == expected else [f"{place}: {found!r} for {expected!r}"[:200]]
    except AssertionError as error:
        return [f"{place}: {' '.join(str(error).split())}"[:200]]
    return []


def rehearse(*, float64: bool) -> dict[str, list[str]]:
    """Return what went wrong, by function."""
    wrong: dict[str, list[str]] = {}
    for name, function in PUBLIC.items():
        expected = plain(function(make_net(), IMAGES))
        with Desk(float64=float64) as desk:
            try:
                found = plain(function(desk.put(make_net()), IMAGES.to("desk")))
                wrong[name] = differences(found, expected)
            except Exception as error:
                wrong[name] = [f"{type(error).__name__}: {error}"]
    for name, function in WAITLESS.items():
        with Desk(float64=float64) as desk:
            net, images = desk.put(make_net()), IMAGES.to("desk")
            desk.clear()
            kept = function(net, images)
            wrong[f"{name}, waits"] = [f"{operation} at {place}" for operation, place in desk.waits]
            del kept
    return wrong


if __name__ == "__main__":
    torch.manual_seed(0)
    sys.stdout.write(json.dumps(rehearse(float64="--no-float64" not in sys.argv)))
