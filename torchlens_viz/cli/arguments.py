"""The arguments of each command that asks something of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torchlens_viz.cli.options import (
    add_channel_dim,
    add_device,
    add_folder,
    add_model,
    add_slices,
    numbers,
    position,
    sides,
)


def add_maximize(commands: Any) -> None:
    """Add `maximize`."""
    parser = commands.add_parser(
        "maximize",
        help="find the images that drive channels hardest",
        description="Find, by gradient ascent, the image that drives each channel of a layer hardest: "
        "DIR/LAYER/CHANNEL.png, a sheet of them all, and a table. Started again after a break, it goes on "
        "where it was. Under torchrun the channels are shared among the processes.",
    )
    add_model(parser)
    parser.add_argument(
        "--layer",
        action="append",
        required=True,
        metavar="GLOB",
        help="a layer, e.g. features.10; may be given several times",
    )
    add_folder(parser)
    parser.add_argument("--channels", type=numbers, metavar="LIST", help="channels, e.g. 0-63 (default: all)")
    parser.add_argument(
        "--size",
        type=sides,
        metavar="PX",
        help="side of the images, or HEIGHTxWIDTH, or of clips and volumes DEPTHxHEIGHTxWIDTH (default: the "
        "model's)",
    )
    parser.add_argument("--steps", type=int, metavar="N", help="steps per image (default: 64)")
    parser.add_argument("--lr", type=float, metavar="RATE", help="learning rate (default: 0.05 of the range)")
    parser.add_argument("--threshold", type=float, metavar="SCORE", help="stop an image beyond this score")
    parser.add_argument("--objective", metavar="NAME", help="mean, max or center of a map (default: mean)")
    parser.add_argument("--transforms", metavar="NAME", help="none, gentle or robust (default: robust)")
    parser.add_argument(
        "--parametrization", metavar="NAME", help="pixels, fourier or maco (default: fourier)"
    )
    parser.add_argument("--method", metavar="NAME", help="normalized or classic (default: normalized)")
    parser.add_argument("--seed", type=int, metavar="N", help="what random numbers follow from (default: 0)")
    parser.add_argument("--precision", metavar="NAME", help="auto, float32 or bfloat16 (default: auto)")
    parser.add_argument("--batch-size", type=int, metavar="N", help="images at a time (default: what fits)")
    add_channel_dim(parser)
    add_device(parser)


def add_survey(commands: Any) -> None:
    """Add `survey`."""
    parser = commands.add_parser(
        "survey",
        help="find what a folder of pictures makes of every channel",
        description="Show a folder of pictures to a network: statistics of every channel, the pictures that "
        "drive it hardest, and a list of what is dead, saturated or there twice, worst first. Started again "
        "after a break, it goes on where it was. Under torchrun the pictures are shared among the processes.",
    )
    add_model(parser)
    parser.add_argument(
        "folder", type=Path, metavar="IMAGE_FOLDER", help="the pictures, in folders of any depth"
    )
    add_folder(parser)
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
        "--channels", type=numbers, metavar="LIST", help="channels to draw, e.g. 0-63 (default: 0-31)"
    )
    parser.add_argument(
        "--loss",
        choices=["cross_entropy"],
        help="estimate what the loss would be without each channel; the folder holds one for each class, "
        "named as the output is or by its number, or as many as there are outputs, in their order",
    )
    parser.add_argument(
        "--skip-bad", action="store_true", help="pass over pictures that cannot be read, and list them"
    )
    add_channel_dim(parser)
    add_device(parser)


def add_layers(commands: Any) -> None:
    """Add `layers`."""
    parser = commands.add_parser(
        "layers",
        help="list the layers of a network, to choose one",
        description="List the layers of a network in execution order: shape, layout, receptive field, "
        "parameters, and which one to look at. Loads no weights, and without a picture takes no memory.",
    )
    add_model(parser, weights=False)
    parser.add_argument(
        "image",
        nargs="?",
        type=Path,
        metavar="IMAGE",
        help="a picture to show to it, so that time is known",
    )
    parser.add_argument(
        "--layer",
        action="append",
        metavar="GLOB",
        help="layers to list, e.g. 'features.*'; may be given several times (default: all)",
    )
    parser.add_argument("--no-blocks", action="store_true", help="leave out layers that hold others")
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")


def add_project(commands: Any) -> None:
    """Add `project`."""
    parser = commands.add_parser(
        "project",
        help="show which pattern in a picture made units fire",
        description="Go back from units of a layer to the pixels that made them fire, by a deconvnet, guided "
        "backpropagation or the plain gradient: DIR/LAYER/CHANNEL.png, each beside the part of the picture "
        "that the unit sees, a sheet of them all, and a table.",
    )
    add_model(parser)
    parser.add_argument("image", type=Path, metavar="IMAGE", help="the picture file to show to the network")
    parser.add_argument(
        "--layer",
        action="append",
        required=True,
        metavar="GLOB",
        help="a layer, e.g. features.10; may be given several times",
    )
    add_folder(parser)
    parser.add_argument(
        "--channels",
        type=numbers,
        metavar="LIST",
        help="channels, e.g. 0-63 (default: the 16 that respond most)",
    )
    parser.add_argument("--rule", metavar="NAME", help="deconvnet, guided or gradient (default: deconvnet)")
    parser.add_argument(
        "--position",
        type=position,
        metavar="PLACE",
        help="max, the highest unit of each map; all, their sum; or ROW,COLUMN (default: max)",
    )
    parser.add_argument(
        "--batch-size", type=int, metavar="N", help="parts of the picture at a time (default: what fits)"
    )
    add_channel_dim(parser)
    add_device(parser)


def add_explain(commands: Any) -> None:
    """Add `explain`."""
    parser = commands.add_parser(
        "explain",
        help="show where in pictures the evidence for an output lies",
        description="Show where in each picture the evidence for an output of the network lies: "
        "DIR/PICTURE.png with the picture, the heatmap and both together, and a table with figures that say "
        "how far each heatmap can be relied on.",
    )
    add_model(parser)
    parser.add_argument("image", type=Path, nargs="+", metavar="IMAGE", help="picture files")
    add_folder(parser)
    parser.add_argument(
        "--target",
        metavar="N|NAME",
        help="the output to explain, by index or, where the weights bring names, by name (default: the "
        "highest of each picture)",
    )
    parser.add_argument(
        "--method",
        metavar="NAME",
        help="gradcam, gradcam++, hirescam, layercam, eigencam, ablationcam, gradient, smoothgrad, "
        "integrated_gradients or guided (default: layercam)",
    )
    parser.add_argument(
        "--layer",
        action="append",
        metavar="GLOB",
        help="layers with maps, e.g. layer4; may be given several times (default: the last one, for layercam "
        "the last of each resolution)",
    )
    parser.add_argument(
        "--grid",
        nargs=2,
        type=int,
        metavar=("ROWS", "COLUMNS"),
        help="how the last ROWS * COLUMNS tokens (N, L, C) of a transformer lie in the picture",
    )
    parser.add_argument("--samples", type=int, metavar="N", help="of smoothgrad and integrated_gradients")
    parser.add_argument("--noise", type=float, metavar="SHARE", help="of smoothgrad, of the range of values")
    parser.add_argument("--seed", type=int, metavar="N", help="of smoothgrad's noise (default: 0)")
    parser.add_argument("--cmap", metavar="NAME", help="hot, viridis, RdBu_r, ... (default: auto)")
    add_slices(parser, default="the one with the most evidence")
    add_channel_dim(parser)
    add_device(parser)


def add_compare(commands: Any) -> None:
    """Add `compare`."""
    parser = commands.add_parser(
        "compare",
        help="find the layer where two models begin to differ",
        description="Show pictures to two models and print how far apart they are, layer by layer in the "
        "order in which those of the first run. The exit code is 1 where a layer is beyond the tolerance.",
    )
    parser.add_argument("a", metavar="A", help="the model that is right, as in the other commands")
    parser.add_argument("b", metavar="B", help="the model to compare with it")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="picture files")
    parser.add_argument(
        "-o", "--out", type=Path, metavar="FILE", help="a picture to write of the first layer that differs"
    )
    for side in ("a", "b"):
        parser.add_argument(
            f"--weights-{side}",
            metavar="DEFAULT|none|FILE",
            default="DEFAULT",
            help=f"the weights of {side.upper()}, as in the other commands (default: DEFAULT)",
        )
    parser.add_argument(
        "--layer",
        action="append",
        metavar="GLOB",
        help="layers of A, e.g. 'features.*'; may be given several times (default: all)",
    )
    parser.add_argument("--match", metavar="RULE", help="by name, or by order of execution (default: name)")
    parser.add_argument(
        "--rtol", type=float, metavar="SHARE", help="the tolerance in parts of the value (default: rounding)"
    )
    parser.add_argument("--atol", type=float, metavar="SIZE", help="the tolerance besides (default: 1e-8)")
    parser.add_argument(
        "--isolate",
        action="store_true",
        default=None,
        help="judge each layer of B alone, on what the layers of A before it put out",
    )
    add_channel_dim(parser)
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, ... (default: cpu)")


def add_report(commands: Any) -> None:
    """Add `report`."""
    parser = commands.add_parser(
        "report",
        help="write one page that shows a network",
        description="Write one HTML file that shows a network: what it says of pictures and why, the health "
        "of its layers, and of each layer the kernels, the maps, and every channel under its own address. "
        "The file loads nothing but pictures that `--assets` puts beside it, and needs no script to be read.",
    )
    add_model(parser)
    parser.add_argument("image", type=Path, nargs="+", metavar="IMAGE", help="picture files")
    parser.add_argument(
        "-o", "--out", required=True, type=Path, metavar="FILE", help="the page to write, e.g. report.html"
    )
    parser.add_argument(
        "--layer",
        action="append",
        metavar="GLOB",
        help="layers, e.g. 'features.*'; may be given several times (default: every convolution)",
    )
    parser.add_argument(
        "--survey",
        type=Path,
        metavar="FOLDER",
        help="a folder of pictures to survey, or one that `torchlens-viz survey` wrote: statistics rest on "
        "these, and each channel is shown with what drives it hardest",
    )
    parser.add_argument(
        "--maximize",
        action="store_true",
        help="find by gradient ascent the images that drive the strongest 8 channels of each layer; this "
        "takes minutes for large networks",
    )
    parser.add_argument(
        "--max-channels",
        type=int,
        metavar="N",
        help="channels of each layer with an entry of their own, the others are shown small (default: all, "
        "or 64 where there are more than 4096 in all)",
    )
    parser.add_argument(
        "--assets",
        type=Path,
        metavar="DIR",
        help="write the pictures of the page to files in this folder beside it; for pages that would be too "
        "large with them",
    )
    parser.add_argument("--title", metavar="TEXT", help="what the page is called (default: the model)")
    add_device(parser)
