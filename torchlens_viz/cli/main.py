"""The command line: arguments in, files out, and one line on stderr for whatever the user can put right."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from torchlens_viz import __version__
from torchlens_viz.errors import InvalidArgumentError, TorchlensVizError

if TYPE_CHECKING:
    from torchlens_viz.cli.commands import Outcome

_PROGRAM = "torchlens-viz"
_MAX_NUMBERS = 100_000
_DRAWING_OPTIONS = (
    "cmap", "nrow", "padding", "scale_each", "value_range", "filters", "channels", "upscale",
    "interpolation", "labels", "legend", "title", "sort_by", "max_tiles", "page",
)  # fmt: skip
_CLIMBING_OPTIONS = (
    "channels", "size", "steps", "lr", "threshold", "objective", "transforms", "parametrization", "method",
    "seed", "precision", "batch_size",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The arguments after the program's name; by default those of the process.

    Returns:
        The exit code: 0, or 2 where the input is at fault (one line on stderr says what to change), 130 after
        Ctrl-C, 141 where nobody reads the output any more.
    """
    try:
        arguments = _parser().parse_args(argv)
        _run(arguments)
        sys.stdout.flush()
    except TorchlensVizError as error:
        print(f"{_PROGRAM}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        _silence_stdout()
        return 141
    return 0


def _run(arguments: argparse.Namespace) -> None:
    # Imported only now: torch takes seconds, and neither --help nor a mistyped option should wait for it.
    if arguments.command == "demo":
        from torchlens_viz.cli.demo import run_demo

        run_demo(image=arguments.image, out=arguments.out)
        return

    if arguments.command == "survey":
        from torchlens_viz.cli.survey import survey_folder

        _report(
            survey_folder(
                arguments.model,
                arguments.folder,
                arguments.out,
                layers=arguments.layer,
                weights=arguments.weights,
                device=arguments.device,
                batch_size=arguments.batch_size,
                top_k=arguments.top_k,
                skip_bad=arguments.skip_bad,
                channels=arguments.channels,
            )
        )
        return

    from torchlens_viz.cli import commands

    given = vars(arguments)
    options = {name: given[name] for name in _DRAWING_OPTIONS if given.get(name) is not None}
    if arguments.command == "kernels":
        outcome = commands.draw_kernels(
            arguments.model, arguments.out, layer=arguments.layer, weights=arguments.weights, options=options
        )
    elif arguments.command == "maximize":
        climbing = {name: given[name] for name in _CLIMBING_OPTIONS if given[name] is not None}
        outcome = commands.maximize_layers(
            arguments.model,
            arguments.out,
            layers=arguments.layer,
            weights=arguments.weights,
            device=arguments.device,
            options=climbing,
        )
    else:
        outcome = commands.draw_maps(
            arguments.model,
            arguments.image,
            arguments.out,
            layers=arguments.layer,
            weights=arguments.weights,
            options=options,
        )
    _report(outcome)


def _report(outcome: Outcome) -> None:
    for path in outcome.paths:
        print(path.absolute())
    for note in outcome.notes:
        print(f"{_PROGRAM}: {note}", file=sys.stderr)


def _silence_stdout() -> None:
    """Point stdout to nowhere, so that Python's own flush at exit does not fail a second time."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any) -> None:
        # Whoever relies on a shortened option would break with the next option that starts the same way.
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise InvalidArgumentError(f"{message}; see `{self.prog} --help`")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        sys.stdout.flush()  # so that a reader who went away is noticed here and not while Python shuts down
        super().exit(status, message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=_PROGRAM,
        description="See inside a convolutional network: its kernels, and what each makes of a picture.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)

    kernels = commands.add_parser(
        "kernels",
        help="draw the kernels of one layer",
        description="Draw the kernels of one layer as a sheet.",
    )
    _add_model(kernels)
    kernels.add_argument(
        "-o", "--out", required=True, type=Path, metavar="FILE", help="the picture to write, e.g. k.png"
    )
    kernels.add_argument("--layer", metavar="NAME", help="the layer to draw (default: the first convolution)")
    kernels.add_argument(
        "--filters",
        type=_numbers,
        metavar="LIST",
        help="output channels to draw, e.g. 0-15,20 (default: all)",
    )
    _add_drawing(kernels, channels="input channels to draw, e.g. 0-2,5")

    maps = commands.add_parser(
        "maps",
        help="draw the feature maps of a picture",
        description="Draw what layers make of a picture: one sheet of feature maps per layer, DIR/LAYER.png.",
    )
    _add_model(maps)
    maps.add_argument("image", type=Path, metavar="IMAGE", help="the picture file to show to the network")
    maps.add_argument(
        "-o", "--out", required=True, type=Path, metavar="DIR", help="the folder to write the sheets to"
    )
    maps.add_argument(
        "--layer",
        action="append",
        metavar="GLOB",
        help="layers to draw, e.g. 'features.*'; may be given several times (default: every convolution)",
    )
    _add_drawing(maps, channels="channels to draw, e.g. 0-15,20 (default: all)")

    _add_maximize(commands)
    _add_survey(commands)

    demo = commands.add_parser(
        "demo",
        help="draw a small trained network that needs no download",
        description="Draw the kernels and feature maps of a small trained network that needs no download.",
    )
    demo.add_argument("--image", type=Path, metavar="FILE", help="a picture (default: one of scikit-image's)")
    demo.add_argument(
        "-o",
        "--out",
        type=Path,
        metavar="DIR",
        default=Path("torchlens-viz-demo"),
        help="the folder to write to (default: ./%(default)s)",
    )
    return parser


def _add_maximize(commands: Any) -> None:
    parser = commands.add_parser(
        "maximize",
        help="find the images that drive channels hardest",
        description="Find, by gradient ascent, the image that drives each channel of a layer hardest: "
        "DIR/LAYER/CHANNEL.png, a sheet of them all, and a table. Started again after a break, it goes on "
        "where it was. Under torchrun the channels are shared among the processes.",
    )
    _add_model(parser)
    parser.add_argument(
        "--layer",
        action="append",
        required=True,
        metavar="GLOB",
        help="a layer, e.g. features.10; may be given several times",
    )
    parser.add_argument("-o", "--out", required=True, type=Path, metavar="DIR", help="the folder to write to")
    parser.add_argument(
        "--channels", type=_numbers, metavar="LIST", help="channels, e.g. 0-63 (default: all)"
    )
    parser.add_argument("--size", type=int, metavar="PX", help="side of the images (default: the model's)")
    parser.add_argument("--steps", type=int, metavar="N", help="steps per image (default: 64)")
    parser.add_argument("--lr", type=float, metavar="RATE", help="learning rate (default: 0.05 of the range)")
    parser.add_argument("--threshold", type=float, metavar="SCORE", help="stop an image beyond this score")
    parser.add_argument("--objective", metavar="NAME", help="mean, max or center of a map (default: mean)")
    parser.add_argument("--transforms", metavar="NAME", help="none, gentle or robust (default: none)")
    parser.add_argument("--parametrization", metavar="NAME", help="pixels, fourier or maco (default: pixels)")
    parser.add_argument("--method", metavar="NAME", help="normalized or classic (default: normalized)")
    parser.add_argument("--seed", type=int, metavar="N", help="what random numbers follow from (default: 0)")
    parser.add_argument("--precision", metavar="NAME", help="auto, float32 or bfloat16 (default: auto)")
    parser.add_argument("--batch-size", type=int, metavar="N", help="images at a time (default: what fits)")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, ... (default: a GPU where there is one)")


def _add_survey(commands: Any) -> None:
    parser = commands.add_parser(
        "survey",
        help="find what a folder of pictures makes of every channel",
        description="Show a folder of pictures to a network: statistics of every channel, the pictures that "
        "drive it hardest, and a list of what is dead, saturated or there twice, worst first. Started again "
        "after a break, it goes on where it was. Under torchrun the pictures are shared among the processes.",
    )
    _add_model(parser)
    parser.add_argument(
        "folder", type=Path, metavar="IMAGE_FOLDER", help="the pictures, in folders of any depth"
    )
    parser.add_argument("-o", "--out", required=True, type=Path, metavar="DIR", help="the folder to write to")
    parser.add_argument(
        "--layer",
        action="append",
        metavar="GLOB",
        help="layers, e.g. 'features.*'; may be given several times (default: every convolution)",
    )
    parser.add_argument(
        "--batch-size", type=int, default=32, metavar="N", help="pictures at a time (default: 32)"
    )
    parser.add_argument(
        "--top-k", type=int, default=9, metavar="K", help="pictures to keep per channel (default: 9)"
    )
    parser.add_argument(
        "--channels", type=_numbers, metavar="LIST", help="channels to draw, e.g. 0-63 (default: 0-31)"
    )
    parser.add_argument(
        "--skip-bad", action="store_true", help="pass over pictures that cannot be read, and list them"
    )
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, ... (default: a GPU where there is one)")


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a torchvision name such as alexnet, or package.module:factory, found from the current folder; "
        "a function preprocess(image) in that module prepares the picture",
    )
    parser.add_argument(
        "--weights",
        metavar="DEFAULT|none|FILE",
        default="DEFAULT",
        help="DEFAULT: torchvision's best, or what the factory sets; none: random (torchvision names only); "
        "FILE: .safetensors, or .pth holding tensors only (default: DEFAULT)",
    )


def _add_drawing(parser: argparse.ArgumentParser, *, channels: str) -> None:
    group = parser.add_argument_group("drawing")
    group.add_argument("--channels", type=_numbers, metavar="LIST", help=channels)
    group.add_argument(
        "--cmap", metavar="NAME", help="gray, hot, viridis, seismic, RdBu_r, ... (default: auto)"
    )
    group.add_argument("--scale-each", action="store_true", default=None, help="a value range for each tile")
    group.add_argument(
        "--value-range",
        nargs=2,
        type=float,
        metavar=("LOW", "HIGH"),
        help="the values drawn darkest and lightest",
    )
    group.add_argument("--nrow", type=int, metavar="N", help="tiles per row (default: near-square)")
    group.add_argument("--padding", type=int, metavar="PX", help="pixels between tiles")
    group.add_argument("--upscale", type=int, metavar="N", help="enlarge each tile by this factor")
    group.add_argument(
        "--interpolation", metavar="KIND", help="nearest, bilinear or bicubic (default: nearest)"
    )
    group.add_argument("--labels", action="store_true", default=None, help="number every tile")
    group.add_argument("--legend", action="store_true", default=None, help="draw the scale of values")
    group.add_argument("--title", metavar="TEXT", help="a line above the sheet")
    group.add_argument("--sort-by", metavar="FIGURE", help="norm, mean, std or max: the greatest first")
    group.add_argument("--max-tiles", type=int, metavar="N", help="draw at most this many tiles")
    group.add_argument("--page", type=int, metavar="N", help="with --max-tiles, which of the pages, from 0")


def _numbers(text: str) -> list[int]:
    """Read "0-15,20" as the numbers 0 to 15 and 20."""
    numbers: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if not (first.isdecimal() and (last.isdecimal() or "-" not in part)):
            raise argparse.ArgumentTypeError(f"must be numbers and ranges such as 0-15,20, got {text!r}")
        low, high = int(first), int(last or first)
        if high < low:
            raise argparse.ArgumentTypeError(f"must name ranges from low to high, got {part!r}")
        if len(numbers) + high - low >= _MAX_NUMBERS:
            raise argparse.ArgumentTypeError(f"must name at most {_MAX_NUMBERS} channels, got {text!r}")
        numbers.extend(range(low, high + 1))
    return numbers
