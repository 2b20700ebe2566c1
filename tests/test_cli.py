"""The command line writes what the library draws, and answers bad input with one line and exit code 2."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn

from torchlens_viz import __version__, feature_grid, kernel_grid
from torchlens_viz.cli import commands
from torchlens_viz.cli.main import main
from torchlens_viz.errors import InvalidArgumentError
from torchlens_viz.files.pictures import read_image
from torchlens_viz.models.zoo import load_model

MODULE = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3)
        self.relu = nn.ReLU(inplace=True)
        self.second = nn.Conv2d(6, 4, 3)
        self.head = nn.Linear(4, 2)
        self.unused = nn.Conv2d(1, 1, 1)

    def forward(self, images):
        assert not self.training and torch.is_inference_mode_enabled()
        maps = self.relu(self.second(self.relu(self.first(images))))
        return self.head(maps.mean((2, 3)))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.shared = nn.Conv2d(3, 3, 3)

    def forward(self, images):
        return self.shared(self.shared(images))


def gray():
    return nn.Conv2d(1, 2, 3)


def dense():
    return nn.Linear(3, 2)


def hostile():
    net = nn.Sequential()
    net.add_module("/escape", nn.Conv2d(3, 2, 3))
    net.add_module("a/b", nn.Conv2d(2, 2, 3))
    net.add_module("a_b", nn.Conv2d(2, 2, 3))
    return net
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A current folder with a model, a photograph, and a collection of files that are no good."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    Path("tiny_net.py").write_text(MODULE)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("photo.png")
    Path("cut.png").write_bytes(Path("photo.png").read_bytes()[:3000])
    Image.fromarray(pixels[:4, :4]).save("tiny.png")
    Path("notes.txt").write_text("not a picture")
    Path("folder.png").mkdir()
    torch.save({"other": torch.zeros(1)}, "other.pth")
    Path("damaged.pth").write_bytes(b"half")
    Path("damaged.safetensors").write_bytes(b"half")
    yield tmp_path
    sys.modules.pop("tiny_net", None)


@pytest.fixture
def run(capsys):
    def call(*arguments: str | Path) -> tuple[int, list[str], list[str]]:
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out.splitlines(), err.splitlines()

    return call


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(place): place.read_bytes() if place.is_file() else None for place in folder.rglob("*")}


def pixels(path: Path) -> np.ndarray:
    return np.asarray(read_image(path))


def drawn(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"))


# What is written


def test_kernels_draws_the_first_convolution(folder, run):
    code, out, err = run("kernels", "tiny_net:Net", "-o", "k.png")
    assert (code, out) == (0, [str(folder / "k.png")])
    assert err == [f"torchlens-viz: tiny_net:Net: {load_model('tiny_net:Net').weights_note}"]
    assert np.array_equal(pixels("k.png"), drawn(kernel_grid(load_model("tiny_net:Net").model)))


def test_kernels_draws_the_layer_with_the_options_asked_for(folder, run):
    code, *_ = run(
        *("kernels", "tiny_net:Net", "-o", "new/k.png", "--layer", "second"),
        *("--filters", "0-1,3", "--channels", "2", "--cmap", "gray", "--value-range", "-0.5", "0.25"),
        *("--nrow", "2", "--padding", "3", "--upscale", "5"),
    )
    assert code == 0
    expected = kernel_grid(
        load_model("tiny_net:Net").model,
        "second",
        filters=[0, 1, 3],
        channels=[2],
        cmap="gray",
        value_range=(-0.5, 0.25),
        nrow=2,
        padding=3,
        upscale=5,
    )
    assert np.array_equal(pixels("new/k.png"), drawn(expected))


def test_switches_and_limits_reach_the_sheet(folder, run):
    code, *_ = run(
        *("kernels", "tiny_net:Net", "-o", "k.png", "--layer", "second"),
        *("--scale-each", "--labels", "--max-tiles", "2"),
    )
    assert code == 0
    model = load_model("tiny_net:Net").model
    assert np.array_equal(
        pixels("k.png"), drawn(kernel_grid(model, "second", scale_each=True, labels=True, max_tiles=2))
    )
    code, *_ = run("kernels", "tiny_net:Net", "-o", "k.png", "--layer", "second", "--legend")
    assert code == 0
    assert np.array_equal(pixels("k.png"), drawn(kernel_grid(model, "second", legend=True)))


def test_maps_draws_every_convolution_as_it_was_before_the_in_place_relu(folder, run):
    code, out, err = run("maps", "tiny_net:Net", "photo.png", "-o", "maps")
    assert (code, out) == (0, [str(folder / "maps" / name) for name in ("first.png", "second.png")])
    assert len(err) == 2
    assert err[1].endswith("not drawn, because they did not run or put out no maps (N, C, H, W): unused")
    loaded = load_model("tiny_net:Net")
    with torch.inference_mode():
        first = loaded.model.first(loaded.preprocess(read_image("photo.png")))
        second = loaded.model.second(first.relu())
    assert first.min() < 0
    assert np.array_equal(pixels("maps/first.png"), drawn(feature_grid(first)))
    assert np.array_equal(pixels("maps/second.png"), drawn(feature_grid(second)))


def test_maps_draws_the_layers_and_channels_asked_for(folder, run):
    code, out, _ = run(
        "maps",
        "tiny_net:Net",
        "photo.png",
        "-o",
        "m",
        "--layer",
        "s*",
        "--layer",
        "relu",
        "--channels",
        "1,3",
    )
    assert code == 0
    assert [Path(line).name for line in out] == ["relu-call0.png", "relu-call1.png", "second.png"]
    assert sorted(path.name for path in Path("m").iterdir()) == [
        "relu-call0.png",
        "relu-call1.png",
        "second.png",
    ]


def test_a_layer_that_runs_twice_gives_two_sheets(folder, run):
    code, out, _ = run("maps", "tiny_net:Twice", "photo.png", "-o", "m")
    assert code == 0
    assert [Path(line).name for line in out] == ["shared-call0.png", "shared-call1.png"]
    assert not np.array_equal(pixels(out[0]), pixels(out[1]))


def test_hostile_layer_names_stay_inside_the_folder(folder, run):
    before = contents(folder).keys()
    code, out, _ = run("maps", "tiny_net:hostile", "photo.png", "-o", "deep/m")
    assert code == 0
    assert [Path(line).name for line in out] == ["_escape.png", "a_b-2.png", "a_b.png"]
    assert contents(folder).keys() - before == {str(folder / "deep"), str(folder / "deep" / "m"), *out}


def test_default_weights_are_loaded_from_the_cache(folder, run, monkeypatch):
    weights = torchvision.models.SqueezeNet1_1_Weights.DEFAULT
    cache = folder / "torch" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    monkeypatch.setenv("TORCH_HOME", str(folder / "torch"))
    model = load_model("squeezenet1_1", weights="none").model
    with torch.no_grad():
        model.features[0].weight.mul_(3)
    torch.save(model.state_dict(), cache / weights.url.rpartition("/")[2])

    code, _, err = run("kernels", "squeezenet1_1", "-o", "k.png")
    assert (code, err) == (
        0,
        [f"torchlens-viz: squeezenet1_1: weights {weights!r}, preprocessing of {weights!r}"],
    )
    assert np.array_equal(pixels("k.png"), drawn(kernel_grid(model)))

    code, out, _ = run("maps", "squeezenet1_1", "photo.png", "-o", "m", "--layer", "features.0")
    assert (code, out) == (0, [str(folder / "m" / "features.0.png")])
    with torch.inference_mode():
        expected = model.features[0](weights.transforms()(read_image("photo.png"))[None])
    assert np.array_equal(pixels(out[0]), drawn(feature_grid(expected)))


def test_a_weights_file_is_used(folder, run):
    model = load_model("tiny_net:Net").model
    nn.init.ones_(model.first.weight)
    torch.save(model.state_dict(), "w.pth")
    code, *_ = run("kernels", "tiny_net:Net", "-o", "k.png", "--weights", "w.pth")
    assert code == 0
    assert np.array_equal(pixels("k.png"), drawn(kernel_grid(model)))


# What is refused

NET = ("kernels", "tiny_net:Net")
MAPS = ("maps", "tiny_net:Net", "photo.png")
REFUSED = [
    ((), "COMMAND; see `torchlens-viz --help`"),
    (("draw",), "invalid choice: 'draw'"),
    ((*NET,), "-o/--out; see `torchlens-viz kernels --help`"),
    ((*NET, "-o", "k.png", "--colour", "red"), "unrecognized arguments: --colour red"),
    ((*NET, "-o", "k.png", "--lay", "first"), "unrecognized arguments: --lay"),
    ((*NET, "-o", "k.png", "--nrow", "two"), "argument --nrow: invalid int value: 'two'"),
    ((*NET, "-o", "k.png", "--channels", "1-x"), "such as 0-15,20, got '1-x'"),
    ((*NET, "-o", "k.png", "--channels", "-1"), "--channels"),
    ((*NET, "-o", "k.png", "--channels", ""), "such as 0-15,20, got ''"),
    ((*NET, "-o", "k.png", "--channels", "5-2"), "from low to high, got '5-2'"),
    ((*NET, "-o", "k.png", "--filters", "0-999999999999"), "at most 100000 channels"),
    ((*NET, "-o", "k.png", "--value-range", "1"), "expected 2 arguments"),
    (("kernels", "alexnot", "-o", "k.png"), "did you mean alexnet"),
    (("kernels", "no_such_module:make", "-o", "k.png"), "no module 'no_such_module'"),
    (("kernels", "tiny_net:make", "-o", "k.png"), "has no factory 'make'"),
    (("kernels", "tiny_net:dense", "-o", "k.png"), ""),
    ((*NET, "-o", "k.png", "--layer", "frist"), "first"),
    ((*NET, "-o", "k.png", "--layer", "relu"), "relu"),
    ((*NET, "-o", "k.png", "--cmap", "jett"), "cmap"),
    ((*NET, "-o", "k.png", "--filters", "6"), "filters"),
    ((*NET, "-o", "k.png", "--layer", "second", "--channels", "9"), "channels"),
    ((*NET, "-o", "k.png", "--nrow", "0"), "nrow"),
    ((*NET, "-o", "k.png", "--padding", "-1"), "padding"),
    ((*NET, "-o", "k.png", "--upscale", "0"), "upscale"),
    ((*NET, "-o", "k.png", "--max-tiles", "0"), "max_tiles"),
    ((*NET, "-o", "k.png", "--value-range", "1", "0"), "value_range"),
    ((*NET, "-o", "k.png", "--value-range", "0", "1", "--scale-each"), "scale_each"),
    ((*NET, "-o", "k.png", "--weights", "none"), "left out or a file"),
    ((*NET, "-o", "k.png", "--weights", "missing.pth"), 'must be "DEFAULT", "none" or an existing file'),
    ((*NET, "-o", "k.png", "--weights", "other.pth"), "does not fit Net: 8 missing"),
    ((*NET, "-o", "k.png", "--weights", "damaged.pth"), "is damaged"),
    ((*NET, "-o", "k.png", "--weights", "damaged.safetensors"), "is truncated or no safetensors file"),
    ((*NET, "-o", "k.png", "--weights", "notes.txt"), "ends in one of .safetensors"),
    ((*NET, "-o", "new/k.xyz"), "append .png"),
    ((*NET, "-o", "new/k"), "append .png"),
    ((*NET, "-o", "folder.png"), "append a file name"),
    ((*NET, "-o", "notes.txt/k.png"), "choose a path in a folder you can write to"),
    ((*MAPS[:2], "missing.png", "-o", "new"), "must name an existing picture file"),
    ((*MAPS[:2], "cut.png", "-o", "new"), "truncated"),
    ((*MAPS[:2], "notes.txt", "-o", "new"), "no format that Pillow reads"),
    ((*MAPS[:2], "folder.png", "-o", "new"), "which is a folder"),
    (("maps", "alexnot", "photo.png", "-o", "new"), "did you mean alexnet"),
    (("maps", "tiny_net:gray", "photo.png", "-o", "new"), "put a function preprocess(image) that fits"),
    (("maps", "tiny_net:dense", "photo.png", "-o", "new"), "Conv2d"),
    (("maps", "raft_small", "photo.png", "-o", "new", "--weights", "none"), "takes two pictures"),
    ((*MAPS, "-o", "new", "--layer", "first", "--layer", "secnd"), "second"),
    ((*MAPS, "-o", "new", "--layer", "x*"), "no layer"),
    (
        (*MAPS, "-o", "new", "--layer", "head", "--layer", "unused"),
        "put out maps (N, C, H, W), got head, unused",
    ),
    ((*MAPS, "-o", "new", "--channels", "5"), "channels"),
    ((*MAPS, "-o", "new", "--cmap", "jett"), "cmap"),
    ((*MAPS, "-o", "new", "--filters", "1"), "unrecognized arguments: --filters 1"),
    ((*MAPS, "-o", "notes.txt"), "must name a folder"),
    ((*MAPS, "-o", "notes.txt/new"), "choose a path in a folder you can write to"),
    (("demo", "--image", "missing.png", "--out", "new"), "must name an existing picture file"),
    (("demo", "--image", "tiny.png", "--out", "new"), "at least 31 pixels a side"),
    (("demo", "--image", "photo.png", "--out", "notes.txt"), "choose a path in a folder you can write to"),
]


@pytest.mark.parametrize(
    ("arguments", "fix"), REFUSED, ids=[" ".join(case[0]) or "nothing" for case in REFUSED]
)
def test_bad_input_gets_one_line_and_changes_nothing(folder, run, arguments, fix):
    before = contents(folder)
    code, out, err = run(*arguments)
    assert (code, out, len(err)) == (2, [], 1)
    assert err[0].startswith("torchlens-viz: error: ")
    assert fix in err[0]
    assert contents(folder) == before


def test_a_failed_download_is_one_line(folder, run, monkeypatch):
    def no_network(*_args, **_options):
        raise OSError("no network in this test")

    monkeypatch.setenv("TORCH_HOME", str(folder / "torch"))
    monkeypatch.setattr(torch.hub, "urlopen", no_network)
    code, out, err = run("kernels", "squeezenet1_1", "-o", "k.png")
    assert (code, out, len(err)) == (2, [], 1)
    assert "no network in this test" in err[0]
    assert "`--weights none`" in err[0]
    assert not Path("k.png").exists()


def test_an_error_of_several_lines_becomes_one(folder, run, monkeypatch):
    def fail(*_args, **_options):
        raise InvalidArgumentError("first\n  second")

    monkeypatch.setattr(commands, "draw_kernels", fail)
    assert run(*NET, "-o", "k.png") == (2, [], ["torchlens-viz: error: first second"])


def test_ctrl_c_ends_quietly(folder, run, monkeypatch):
    def interrupt(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "draw_kernels", interrupt)
    assert run(*NET, "-o", "k.png") == (130, [], [])


def test_a_bug_is_not_hidden(folder, monkeypatch):
    def bug(*_args, **_options):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(commands, "draw_kernels", bug)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        main([*NET, "-o", "k.png"])


# The program as a process


def process(*arguments: str, **options) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "torchlens_viz", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_the_module_runs_as_a_program():
    with process("--version") as program:
        assert program.communicate() == (f"torchlens-viz {__version__}\n", "")
    assert program.returncode == 0


@pytest.mark.parametrize("arguments", [("--help",), (*NET, "-o", "k.png")])
def test_a_reader_who_went_away_is_no_error(folder, monkeypatch, arguments):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    with process(*arguments, cwd=folder) as program:
        program.stdout.close()
        program.stdout = None
        _, err = program.communicate()
    assert program.returncode == 141
    assert "Traceback" not in err
    assert "BrokenPipe" not in err


def loaded_after(statement: str) -> set[str]:
    code = (
        "import sys\nfrom torchlens_viz.cli.main import main\n"
        f"try:\n    {statement}\nexcept SystemExit:\n    pass\n"
        "print(*{'torch', 'numpy', 'PIL'} & sys.modules.keys(), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stderr.splitlines()[-1].split())


def test_help_and_a_mistyped_option_do_not_wait_for_torch():
    assert loaded_after("main(['--help'])") == set()
    assert loaded_after("main(['kernels', '--help'])") == set()
    assert loaded_after("main(['kernels', 'alexnet', '-o', 'k.png', '--bogus'])") == set()
    assert loaded_after("import torchlens_viz.cli.commands") == {
        "torch",
        "numpy",
        "PIL",
    }  # the probe can see it


def test_ranking_pages_and_titles_reach_the_sheet(tmp_path, capsys):
    out = tmp_path / "k.png"
    options = ["--sort-by", "norm", "--max-tiles", "8", "--page", "1", "--title", "second page"]
    assert main(["kernels", "squeezenet1_1", "--weights", "none", "-o", str(out), *options]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    model = load_model("squeezenet1_1", weights="none").model
    expected = kernel_grid(model, sort_by="norm", max_tiles=8, page=1, title="second page")
    with Image.open(out) as image:
        assert image.convert("RGB").tobytes() == expected.convert("RGB").tobytes()
