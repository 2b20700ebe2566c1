"""Options that several commands share, and what may stand for them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, Final, NoReturn

from torchlens_viz.errors import InvalidArgumentError

_MAX_NUMBERS: Final = 100_000


class Parser(argparse.ArgumentParser):
    """Raises what argparse would exit with, and takes no shortened options."""

    def __init__(self, **options: Any) -> None:
        # Whoever relies on a shortened option would break with the next option that starts the same way.
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Raise what is wrong, with where to read more."""
        raise InvalidArgumentError(f"{message}; see `{self.prog} --help`")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, and refuse options without a value."""
        words = sys.argv[1:] if args is None else list(args)
        for word in words:  # argparse makes of `--name=--` an empty list, from Python 3.13 on the value `--`
            if word.startswith("--") and word.endswith("=--"):
                self.error(f"argument {word[:-3]}: expected a value, got '--'")
        return super().parse_args(words, namespace)

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """End, as after `--help`."""
        sys.stdout.flush()  # so that a reader who went away is noticed here and not while Python shuts down
        super().exit(status, message)


def add_model(parser: argparse.ArgumentParser, *, weights: bool = True) -> None:
    """Add the model and, unless they play no part, its weights."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a torchvision name such as alexnet, timm/NAME, hf/NAME or hf/FOLDER (transformers), or "
        "package.module:factory or file.py:factory, which returns the model, (model, preprocess) or (model, "
        "preprocess, names); a function preprocess(image) in that module prepares the picture too",
    )
    if not weights:
        return
    parser.add_argument(
        "--weights",
        metavar="DEFAULT|none|FILE",
        default="DEFAULT",
        help="DEFAULT: the published ones, or what the factory sets; none: random, or what the factory sets; "
        "FILE: .safetensors, or .pth holding tensors only (default: DEFAULT)",
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add where to run."""
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, ... (default: a GPU where there is one)")


def add_folder(parser: argparse.ArgumentParser) -> None:
    """Add the folder to write to."""
    parser.add_argument("-o", "--out", required=True, type=Path, metavar="DIR", help="the folder to write to")


def add_drawing(parser: argparse.ArgumentParser, *, channels: str) -> None:
    """Add the options that all sheets share."""
    group = parser.add_argument_group("drawing")
    group.add_argument("--channels", type=numbers, metavar="LIST", help=channels)
    group.add_argument(
        "--cmap", metavar="NAME", help="gray, hot, viridis, seismic, RdBu_r, ... (default: auto)"
    )
    group.add_argument("--scale-each", action="store_true", default=None, help="a value range for each tile")
    group.add_argument(
        "--value-range",
        nargs=2,
        type=float,
        metavar=("LOW", "HIGH"),
        help="the values drawn darkest and lightest (default: all but the outermost 0.5%% at either end)",
    )
    group.add_argument("--full-range", action="store_true", help="draw the least and greatest value as such")
    group.add_argument("--nrow", type=int, metavar="N", help="tiles per row (default: near-square)")
    group.add_argument("--padding", type=int, metavar="PX", help="pixels between tiles")
    group.add_argument(
        "--upscale",
        type=int,
        metavar="N",
        help="enlarge each tile by this factor (default: to 32 pixels at least)",
    )
    group.add_argument(
        "--interpolation", metavar="KIND", help="nearest, bilinear or bicubic (default: nearest)"
    )
    group.add_argument("--labels", action="store_true", default=None, help="number every tile")
    group.add_argument("--legend", action="store_true", default=None, help="draw the scale of values")
    group.add_argument("--title", metavar="TEXT", help="a line above the sheet")
    group.add_argument("--sort-by", metavar="FIGURE", help="norm, mean, std or max: the greatest first")
    group.add_argument("--max-tiles", type=int, metavar="N", help="draw at most this many tiles")
    group.add_argument("--page", type=int, metavar="N", help="with --max-tiles, which of the pages, from 0")


def add_channel_dim(parser: argparse.ArgumentParser) -> None:
    """Add the dimension that counts channels."""
    parser.add_argument(
        "--channel-dim",
        type=int,
        metavar="DIM",
        help="the dimension of a layer's output that counts channels, e.g. 1 in (N, C, H, W) or -1 in "
        "(N, H, W, C) (default: found for each layer)",
    )


def add_slices(parser: argparse.ArgumentParser, *, default: str) -> None:
    """Add which slices of volumes and clips are drawn."""
    parser.add_argument(
        "--plane",
        metavar="AXIS",
        help="of volumes and clips, the axis across which slices lie: depth (time in clips), height or width "
        "(default: depth)",
    )
    parser.add_argument(
        "--slices",
        type=slices,
        metavar="LIST|all|max",
        help="of volumes and clips, which slices, e.g. 0-3,7; max is the maximum along the axis (default: "
        f"{default})",
    )


def slices(text: str) -> str | list[int]:
    """Read "all", "max", or numbers."""
    return text if text in ("all", "max") else numbers(text)


def numbers(text: str) -> list[int]:
    """Read "0-15,20" as the numbers 0 to 15 and 20."""
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if not (first.isdecimal() and (last.isdecimal() or "-" not in part)):
            raise argparse.ArgumentTypeError(f"must be numbers and ranges such as 0-15,20, got {text!r}")
        low, high = int(first), int(last or first)
        if high < low:
            raise argparse.ArgumentTypeError(f"must name ranges from low to high, got {part!r}")
        if len(found) + high - low >= _MAX_NUMBERS:
            raise argparse.ArgumentTypeError(f"must name at most {_MAX_NUMBERS} channels, got {text!r}")
        found.extend(range(low, high + 1))
    return found


def sides(text: str) -> int | tuple[int, ...]:
    """Read "224" as a number for all axes, or "16x112x112" as one for each; "4096x" is a single one."""
    parts = text.removesuffix("x").split("x")
    if not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"must be a number or as many as 16x112x112, got {text!r}")
    found = tuple(map(int, parts))
    return found if "x" in text else found[0]


def position(text: str) -> str | tuple[int, int]:
    """Read "max", "all", or "3,4" as row 3 and column 4."""
    if text in ("max", "all"):
        return text
    row, _, column = text.partition(",")
    if not (row.isdecimal() and column.isdecimal()):
        raise argparse.ArgumentTypeError(f"must be max, all, or ROW,COLUMN such as 3,4, got {text!r}")
    return int(row), int(column)
