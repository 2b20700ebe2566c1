"""Which networks the command line copes with: five commands over families of three packages.

    python -m benchmarks.networks [--only NAME ...] [--keep FILE] [--write-docs]

Needs torchvision, timm and transformers; downloads nothing: weights are random, and the models of
transformers are built from configurations into a folder. What a command says is held against plain PyTorch:
kernels against the weights, layers and maps against hooks, the score that is explained and the score that
is maximised against what the network puts out. A cell says "right", or is the number of a reason, which
stands below the table.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import gc
import io
import json
import platform
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

import torchlens_viz
from torchlens_viz import Maximization
from torchlens_viz.cli.main import main as command_line
from torchlens_viz.files.paths import safe_names
from torchlens_viz.models.colours import colours_of
from torchlens_viz.zoo.load import load_model
from torchlens_viz.zoo.loaded import LoadedModel

PAGE = Path(__file__).parent.parent / "docs" / "networks.md"
MARKS = (
    "<!-- written by benchmarks/networks.py: begin -->",
    "<!-- written by benchmarks/networks.py: end -->",
)
COMMANDS = ("kernels", "layers", "maps", "explain", "maximize")
RIGHT = "right"
_SHEETS = 4  # of maps, about, for each network

TIMM = (
    "resnet18", "convnext_atto", "efficientnet_b0", "mobilenetv3_small_050", "regnetx_002", "densenet121",
    "ghostnet_050", "hrnet_w18_small", "repvgg_a0", "nf_resnet26", "dla34", "ese_vovnet19b_dw",
    "vit_tiny_patch16_224", "deit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "pvt_v2_b0",
    "levit_128s", "xcit_nano_12_p16_224", "mixer_s32_224", "resmlp_12_224", "poolformer_s12",
    "mobilevit_xxs", "coatnet_nano_rw_224", "hiera_tiny_224", "mambaout_femto",
)  # fmt: skip
TORCHVISION = {
    "classification": (
        "alexnet", "vgg11", "resnet18", "squeezenet1_1", "densenet121", "googlenet", "shufflenet_v2_x0_5",
        "mobilenet_v3_small", "mnasnet0_5", "swin_t",
    ),
    "detection": (
        "fasterrcnn_mobilenet_v3_large_320_fpn", "fasterrcnn_mobilenet_v3_large_fpn",
        "ssdlite320_mobilenet_v3_large", "ssd300_vgg16", "fasterrcnn_resnet50_fpn", "fcos_resnet50_fpn",
        "retinanet_resnet50_fpn", "maskrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn",
        "fasterrcnn_resnet50_fpn_v2",
    ),
    "segmentation": (
        "lraspp_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large", "deeplabv3_resnet50", "fcn_resnet50",
        "deeplabv3_resnet101", "fcn_resnet101",
    ),
    "video": (
        "r3d_18", "mc3_18", "r2plus1d_18", "s3d", "mvit_v1_b", "mvit_v2_s", "swin3d_t", "swin3d_s",
        "swin3d_b",
    ),
    "optical flow": ("raft_small", "raft_large"),
    "quantised": (
        "quantized_mobilenet_v2", "quantized_mobilenet_v3_large", "quantized_resnet18", "quantized_resnet50",
        "quantized_googlenet", "quantized_inception_v3", "quantized_shufflenet_v2_x0_5",
        "quantized_shufflenet_v2_x1_0", "quantized_shufflenet_v2_x1_5", "quantized_shufflenet_v2_x2_0",
    ),
}  # fmt: skip
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet": (
        "ResNetForImageClassification",
        {"hidden_sizes": [16, 32], "depths": [1, 1], "embedding_size": 16},
    ),
    "vit": ("ViTForImageClassification", {**SMALL, "image_size": 224, "patch_size": 16}),
    "convnextv2": (
        "ConvNextV2ForImageClassification",
        {"hidden_sizes": [8, 16, 32, 64], "depths": [1, 1, 1, 1]},
    ),
    "swin": ("SwinForImageClassification", {"embed_dim": 24, "depths": [1, 1], "num_heads": [2, 2]}),
    "segformer": (
        "SegformerForSemanticSegmentation",
        {"hidden_sizes": [8, 16, 32, 64], "depths": [1, 1, 1, 1], "decoder_hidden_size": 32},
    ),
    "clip": (
        "CLIPModel",
        {"vision_config": {**SMALL, "image_size": 224, "patch_size": 32}, "text_config": SMALL},
    ),
}


@dataclass
class Row:
    """What became of one network: a verdict for each command, and how long all of it took."""

    name: str
    family: str
    cells: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def is_bad(self) -> bool:
        """Whether a command said something that is not so, or raised."""
        return any(cell.startswith(("wrong", "failed")) for cell in self.cells.values())


def specs(folder: Path) -> Iterator[tuple[str, str, str]]:
    """Yield the family, the name and what the command line is given for every network."""
    yield from (("timm", f"timm/{name}", f"timm/{name}") for name in TIMM)
    for family, names in TORCHVISION.items():
        yield from ((f"torchvision, {family}", name, name) for name in names)
    yield from (("transformers", f"hf/{name}", f"hf/{folder / name}") for name in TRANSFORMERS)


def build(name: str, folder: Path) -> None:
    """Save a model of transformers, built from a configuration, with an image processor."""
    import transformers

    kind, options = TRANSFORMERS[name]
    builder = getattr(transformers, kind)
    torch.manual_seed(0)
    builder(builder.config_class(**options)).save_pretrained(folder / name)
    transformers.ViTImageProcessor(size={"height": 224, "width": 224}).save_pretrained(folder / name)


def photograph() -> Image.Image:
    """Return a picture with edges, colours and noise, always the same."""
    rows, columns = np.mgrid[0:240, 0:320]
    waves = [np.sin(rows / 9) * np.cos(columns / 13), np.sin((rows + columns) / 7), np.cos(columns / 5)]
    noise = np.random.default_rng(0).normal(0, 0.2, (240, 320, 3))
    return Image.fromarray((127 * (1 + np.clip(np.stack(waves, -1) + noise, -1, 1))).astype(np.uint8))


class WrongError(Exception):
    """A command said something that is not so."""


def told(condition: object, what: str) -> None:
    """Raise where something that was said does not hold."""
    if not condition:
        raise WrongError(what)


def run(words: Sequence[str]) -> tuple[int, str, str]:
    """Run the command line; return its exit code, its output and the last line of what it said on stderr."""
    out, err = io.StringIO(), io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        warnings.simplefilter("ignore")
        code = command_line(list(words))
    return code, out.getvalue(), (err.getvalue().splitlines() or [""])[-1]


def kept(output: Any) -> Any:
    """Return what a module put out, safe from what comes after it and works in place."""
    return output.clone() if isinstance(output, torch.Tensor) else output


@dataclass
class Network:
    """One network, as plain PyTorch sees it."""

    loaded: LoadedModel
    prepared: torch.Tensor

    def called(self, batch: torch.Tensor) -> tuple[Any, dict[str, list[Any]]]:
        """Return what the network puts out, and what each of its modules put out in each call."""
        calls: dict[str, list[Any]] = {}
        model = self.loaded.model
        hooks = [
            module.register_forward_hook(
                lambda _module, _args, output, name=name: calls.setdefault(name, []).append(kept(output))
            )
            for name, module in model.named_modules()
            if name
        ]
        try:
            with torch.no_grad():
                args, kwargs = self.loaded.arguments(batch)
                return model(*args, **kwargs), calls
        finally:
            for hook in hooks:
                hook.remove()

    def first_weight(self) -> torch.Tensor:
        """Return the weight of the convolution that images enter."""
        found = [each for each in self.loaded.model.modules() if isinstance(each, nn.Conv2d | nn.Conv3d)]
        return next((each.weight for each in found if each.in_channels == 3), found[0].weight).detach()


def kernels(spec: str, network: Network, _photo: Path, out: Path) -> None:
    """Draw the first kernels at their own size, and look at every pixel."""
    weight = network.first_weight()
    path = out / "kernels.png"
    is_colour = weight.ndim == 4 and weight.shape[1] == 3
    plain = ["--full-range", "--upscale", "1", "--padding", "0", "--nrow", str(len(weight))]
    words = ["--weights", weights_of(spec), "-o", str(path), *(plain if is_colour else [])]
    refusal_of(run(["kernels", spec, *words]))
    with Image.open(path) as picture:
        pixels = torch.from_numpy(np.array(picture.convert("RGB"))).float() / 255
    if is_colour:
        expected = (weight - weight.min()) / (weight.max() - weight.min())
        expected = expected.permute(2, 0, 3, 1).flatten(1, 2)
        told(
            expected.shape == pixels.shape, f"kernels of {tuple(expected.shape)}, drawn {tuple(pixels.shape)}"
        )
        told(float((expected - pixels).abs().max()) < 1.5 / 250, "the pixels are not the weights")


def layers(spec: str, network: Network, _photo: Path, _out: Path) -> None:
    """List the layers, and hold names and shapes against hooks."""
    _, text, _ = refusal_of(run(["layers", spec, "--json"]))
    found = json.loads(text)
    shapes = found["input_shapes"]
    batch = torch.zeros(shapes[0])
    _, calls = network.called(batch)
    named = {name for row in found["rows"] for name in row["names"]}
    known = {id(module): name for name, module in network.loaded.model.named_modules()}
    ran = {name for name in calls if known[id(network.loaded.model.get_submodule(name))] == name}
    told(ran <= named, f"{len(ran - named)} layers ran and are not listed: {sorted(ran - named)[:3]}")
    told(
        named <= set(dict(network.loaded.model.named_modules(remove_duplicate=False))),
        "there is no such layer",
    )
    for row in found["rows"]:
        first = calls.get(row["names"][0], [None])[0]
        if isinstance(first, torch.Tensor) and row["output_shape"]:
            told(
                tuple(first.shape) == tuple(row["output_shape"]),
                f"{row['names'][0]} puts out {tuple(first.shape)}",
            )


def maps(spec: str, network: Network, photo: Path, out: Path) -> None:
    """Draw the maps of some convolutions, and count what they put out."""
    folder = out / "maps"
    rank = network.prepared.ndim
    kind = nn.Conv3d if rank == 5 else nn.Conv2d
    found = [name for name, each in network.loaded.model.named_modules() if isinstance(each, kind)]
    chosen = found[:: max(1, len(found) // _SHEETS)]
    words = [word for name in chosen for word in ("--layer", name)]
    refusal_of(run(["maps", spec, str(photo), "--weights", weights_of(spec), "-o", str(folder), *words]))
    _, calls = network.called(network.prepared)
    expected = sum(output.ndim == rank for name in chosen for output in calls.get(name, ()))
    drawn = len(list(folder.glob("*.png")))
    told(drawn == expected, f"{expected} outputs of convolutions, {drawn} sheets")


def explain(spec: str, network: Network, photo: Path, out: Path) -> None:
    """Explain the highest output, and hold its score against the network's own."""
    folder = out / "why"
    refusal_of(run(["explain", spec, str(photo), "--weights", weights_of(spec), "-o", str(folder)]))
    output, _ = network.called(network.prepared)
    with (folder / "scores.csv").open(newline="") as file:
        score = float(next(csv.DictReader(file))["score"])
    logits = output if isinstance(output, torch.Tensor) else output.logits
    told(
        abs(score - float(logits.max())) <= 1e-4 * float(logits.abs().max()),
        f"{score} of {float(logits.max())}",
    )


def maximize(spec: str, network: Network, _photo: Path, out: Path) -> None:
    """Drive a channel of the last convolution for three steps, and hold its score against the network's."""
    _, calls = network.called(network.prepared)
    with_maps = [
        name
        for name, outputs in calls.items()
        if len(outputs) == 1 and isinstance(outputs[0], torch.Tensor) and outputs[0].ndim in (4, 5)
        and isinstance(network.loaded.model.get_submodule(name), nn.Conv2d | nn.Conv3d)
    ]  # fmt: skip
    layer = with_maps[-1]
    words = ["--layer", layer, "--channels", "0", "--steps", "3"]
    refusal_of(run(["maximize", spec, "--weights", weights_of(spec), "-o", str(out / "max"), *words]))
    found = Maximization.load(out / "max" / safe_names([layer])[0])
    batch = colours_of(network.loaded.preprocess, axes=found.images.ndim - 2).apply(found.images)
    _, calls = network.called(batch)
    score = float(calls[layer][0][0, 0].mean())
    told(
        abs(score - float(found.scores[0])) <= 1e-4 * max(1.0, abs(score)),
        f"{float(found.scores[0])} of {score}",
    )


class RefusedError(Exception):
    """A command was refused, with a reason."""


def refusal_of(done: tuple[int, str, str]) -> tuple[int, str, str]:
    """Raise where a command was refused."""
    if done[0]:
        raise RefusedError(done[2].partition("error: ")[2])
    return done


def weights_of(spec: str) -> str:
    """Return which weights to take: random ones but for what was saved."""
    return "DEFAULT" if spec.startswith("hf/") else "none"


CHECKS: Mapping[str, Callable[[str, Network, Path, Path], None]] = {
    "kernels": kernels, "layers": layers, "maps": maps, "explain": explain, "maximize": maximize,
}  # fmt: skip


def row_of(family: str, name: str, spec: str, photo: Path, out: Path) -> Row:
    """Run all commands on one network."""
    row = Row(name, family)
    begin = time.perf_counter()
    loaded = load_model(spec, weights=weights_of(spec))
    network = Network(loaded, loaded.preprocess(Image.open(photo)))
    for command, check in CHECKS.items():
        folder = out / safe_names([name])[0] / command
        folder.mkdir(parents=True)
        try:
            check(spec, network, photo, folder)
            row.cells[command] = RIGHT
        except RefusedError as refusal:
            row.cells[command] = f"refused: {str(refusal).replace(spec, name).replace(str(photo), 'PHOTO')}"
        except WrongError as wrong:
            row.cells[command] = f"wrong: {wrong}"
        except Exception as error:  # which a user would see as well
            row.cells[command] = f"failed: {type(error).__name__}: {error}"
            traceback.print_exc()
    row.seconds = time.perf_counter() - begin
    return row


def render(rows: Sequence[Row], left_out: Sequence[str] = ()) -> str:
    """Return the table, with the reasons below it and the names of networks that were left out."""
    reasons: dict[str, int] = {}
    lines = ["| network | " + " | ".join(COMMANDS) + " |", "|---" * (1 + len(COMMANDS)) + "|"]
    family = ""
    for row in rows:
        if row.family != family:
            family = row.family
            lines.append(f"| **{family}** |" + " |" * len(COMMANDS))
        cells = [
            RIGHT
            if row.cells[each] == RIGHT
            else f"[{reasons.setdefault(row.cells[each], len(reasons) + 1)}]"
            for each in COMMANDS
        ]
        lines.append(f"| `{row.name}` | {' | '.join(cells)} |")
    counts = {each: sum(row.cells[each] == RIGHT for row in rows) for each in COMMANDS}
    lines.append(f"| right of {len(rows)} | " + " | ".join(str(counts[each]) for each in COMMANDS) + " |")
    notes = [f"{number}. {reason}" for reason, number in reasons.items()]
    if left_out:
        notes += ["", f"Not tried in this run: {', '.join(f'`{name}`' for name in left_out)}."]
    return "\n".join([*lines, "", *notes, "", made_with("torchvision", "timm", "transformers")])


def with_block(text: str, block: str, marks: tuple[str, str] = MARKS) -> str:
    """Return a page with what stands between the marks replaced."""
    begin, end = marks
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n\n{block}\n\n{end}{after}"


def options_of(description: str | None, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return what a table of networks was asked for: `only`, `keep` and `write_docs`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="networks with these words in their names")
    parser.add_argument(
        "--keep", type=Path, metavar="FILE", help="good rows are read from here, new ones added"
    )
    parser.add_argument("--write-docs", action="store_true", help="write the table into docs/networks.md")
    return parser.parse_args(arguments)


def made_with(*packages: str) -> str:
    """Return a line that says which versions a table was made with."""
    versions = {
        "torchlens_viz": torchlens_viz.__version__, "torch": torch.__version__,
        "Python": platform.python_version(),
        **{name: __import__(name).__version__ for name in packages},
    }  # fmt: skip
    return f"Made with {', '.join(f'{name} {version}' for name, version in versions.items())}."


def main(arguments: Sequence[str] | None = None) -> int:
    options = options_of(__doc__, arguments)
    known: dict[str, Row] = {}
    if options.keep and options.keep.exists():
        read = [Row(**each) for each in json.loads(options.keep.read_text("utf-8"))]
        known = {row.name: row for row in read if not row.is_bad}
    rows: list[Row] = []
    left_out: list[str] = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        photo = folder / "photo.png"
        photograph().save(photo)
        for family, name, spec in specs(folder / "models"):
            is_asked = not options.only or any(word in name for word in options.only)
            if name not in known and is_asked:
                if name.startswith("hf/"):
                    build(name.removeprefix("hf/"), folder / "models")
                with tempfile.TemporaryDirectory() as out:
                    known[name] = row_of(family, name, spec, photo, Path(out))
                gc.collect()
                print(name, f"{known[name].seconds:.0f} s", known[name].cells, flush=True)
                if options.keep:
                    options.keep.write_text(
                        json.dumps([vars(row) for row in known.values()], indent=1), "utf-8"
                    )
            if name in known:
                rows.append(known[name])
            else:
                left_out.append(name)
    print(render(rows, left_out))
    if options.write_docs:
        PAGE.write_text(with_block(PAGE.read_text("utf-8"), render(rows, left_out)), "utf-8")
    return int(any(row.is_bad for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
