"""The arguments of every command, and what they may be."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

from torchlens_viz import __version__
from torchlens_viz.cli.arguments import (
    add_compare,
    add_explain,
    add_layers,
    add_maximize,
    add_project,
    add_report,
    add_survey,
)
from torchlens_viz.cli.options import Parser, add_channel_dim, add_drawing, add_model, add_slices, numbers

PROGRAM: Final = "torchlens-viz"


def parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    whole = Parser(
        prog=PROGRAM,
        description="See inside a convolutional network: its kernels, and what each makes of a picture.",
    )
    whole.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = whole.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)

    kernels = commands.add_parser(
        "kernels",
        help="draw the kernels of one layer",
        description="Draw the kernels of one layer as a sheet.",
    )
    add_model(kernels)
    kernels.add_argument(
        "-o", "--out", required=True, type=Path, metavar="FILE", help="the picture to write, e.g. k.png"
    )
    kernels.add_argument("--layer", metavar="NAME", help="the layer to draw (default: the first convolution)")
    kernels.add_argument(
        "--filters",
        type=numbers,
        metavar="LIST",
        help="output channels to draw, e.g. 0-15,20 (default: all)",
    )
    add_drawing(kernels, channels="input channels to draw, e.g. 0-2,5")

    maps = commands.add_parser(
        "maps",
        help="draw the feature maps of a picture",
        description="Draw what layers make of a picture: one sheet of feature maps per layer, DIR/LAYER.png.",
    )
    add_model(maps)
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
    maps.add_argument(
        "--grid",
        nargs=2,
        type=int,
        metavar=("ROWS", "COLUMNS"),
        help="how the last ROWS * COLUMNS tokens (N, L, C) of a transformer lie in the picture",
    )
    add_slices(maps, default="the middle one")
    add_channel_dim(maps)
    add_drawing(maps, channels="channels to draw, e.g. 0-15,20 (default: all)")

    add_layers(commands)
    add_maximize(commands)
    add_survey(commands)
    add_project(commands)
    add_explain(commands)
    add_compare(commands)
    add_report(commands)

    demo = commands.add_parser(
        "demo",
        help="show a small trained network that needs no download",
        description="Write a page that shows a small trained network, DIR/report.html, and pictures of its "
        "kernels, maps and more. Nothing is downloaded.",
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
    return whole
