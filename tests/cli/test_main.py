"""The command line answers bad input with one line and exit code 2; its help waits for no torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.nets import contents
from torchlens_viz import __version__
from torchlens_viz.cli import commands
from torchlens_viz.cli.main import main
from torchlens_viz.errors import InvalidArgumentError

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
    (("layers", "tiny_net:Net", "--layer", "frist"), "first"),
    (("layers", "tiny_net:Net", "--weights", "none"), "unrecognized arguments: --weights none"),
    (("layers", "tiny_net:Net", "notes.txt"), "notes.txt"),
    ((*NET, "-o", "k.png", "--value-range", "0", "1", "--full-range"), "`--full-range` and `--value-range`"),
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
    (("maps", "tiny_net:four", "photo.png", "-o", "new"), "put a function preprocess(image) that fits"),
    (("maps", "tiny_net:dense", "photo.png", "-o", "new"), "Conv2d"),
    ((*MAPS, "-o", "new", "--slices", "0"), "`slices` has no effect on maps of"),
    ((*MAPS, "-o", "new", "--slices", "some"), "must be numbers and ranges"),
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
    (("demo", "--image", "photo.png", "--out", "notes.txt"), "`--out` must name a folder, got the file"),
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


ENDING = """
import sys
import torch
from torch import nn


class Own(BaseException):
    pass


def raising(error):
    def fail(*args):
        raise error
    return fail


def net():
    return nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU())


def built(place, error):
    def build():
        if place == "factory":
            raise error
        model = net()
        if place == "forward":
            model[1].forward = raising(error)
        return (model, raising(error)) if place == "preprocess" else model
    return build


for kind in (SystemExit(3), GeneratorExit("x"), Own("\\x1b[2J\\n" + "x" * 10**5)):
    for place in ("factory", "preprocess", "forward"):
        globals()[f"{place}_{type(kind).__name__}"] = built(place, kind)
"""


@pytest.mark.parametrize("kind", ["SystemExit: 3", "GeneratorExit: x", "Own: \\x1b[2J"])
@pytest.mark.parametrize("place", ["factory", "preprocess", "forward"])
@pytest.mark.parametrize("command", ["maps", "explain", "survey"])
def test_code_of_a_model_that_ends_the_program_is_told_in_one_line(folder, run, command, place, kind):
    Path("ending.py").write_text(ENDING)
    Path("pictures").mkdir()
    Path("photo.png").rename("pictures/photo.png")
    picture = "pictures" if command == "survey" else "pictures/photo.png"
    target = ("--target", "0") if command == "explain" else ()
    name = kind.partition(":")[0]
    code, out, err = run(command, f"ending:{place}_{name}", picture, "-o", "new", *target)
    assert (code, out, len(err)) == (2, [], 1)
    assert err[0].startswith("torchlens-viz: error: ")
    assert kind in err[0]
    assert err[0].isprintable()
    assert len(err[0]) < 1000
    assert not Path("new").exists()
    del sys.modules["ending"]


FAILING = """
import torch
from torch import nn


class Failing(nn.Sequential):
    place = None

    def fail(self, place):
        if self.place == place:
            raise KeyError("on purpose\\n" + "x" * 10**5)

    def to(self, *args, **options):
        self.fail("to")
        return super().to(*args, **options)

    def state_dict(self, *args, **options):
        self.fail("state_dict")
        return super().state_dict(*args, **options)

    def parameters(self, recurse=True):
        self.fail("parameters")
        return super().parameters(recurse)

    def __hash__(self):
        self.fail("__hash__")
        return id(self)

    def __getattr__(self, name):
        if name == "config":
            self.fail("__getattr__")
        return super().__getattr__(name)


def built(place):
    def build():
        net = Failing(nn.Conv2d(3, 2, 3), nn.ReLU())
        net.__dict__["place"] = place
        return net
    return build


for place in ("to", "state_dict", "parameters", "__hash__", "__getattr__"):
    globals()[f"at_{place}"] = built(place)
"""


@pytest.mark.parametrize(
    ("place", "command"),
    [
        ("to", ["maximize", "--layer", "0", "--device", "cpu", "-o", "new"]),
        ("to", ["survey", "pictures", "--device", "cpu", "-o", "new"]),
        ("state_dict", ["kernels", "--weights", "w.pth", "-o", "new"]),
        ("parameters", ["maps", "photo.png", "-o", "new"]),
        ("__hash__", ["kernels", "-o", "new"]),
        ("__getattr__", ["layers"]),
    ],
)
def test_methods_of_a_model_that_fail_are_told_in_one_line(folder, run, place, command):
    Path("failing.py").write_text(FAILING)
    Path("pictures").mkdir()
    Image.new("RGB", (8, 8)).save("pictures/a.png")
    torch.save({"0.weight": torch.zeros(2, 3, 3, 3), "0.bias": torch.zeros(2)}, "w.pth")
    code, out, err = run(command[0], f"failing:at_{place}", *command[1:])
    assert (code, out, len(err)) == (2, [], 1)
    assert err[0].startswith("torchlens-viz: error: ")
    assert "KeyError: 'on purpose" in err[0]
    assert place in err[0] or place == "__hash__"  # which parameters() asks for
    assert err[0].isprintable()
    assert len(err[0]) < 1000
    assert not Path("new").exists()
    del sys.modules["failing"]


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


@pytest.mark.parametrize("option", ["--weights", "--layer", "--nrow", "--channels"])
def test_two_dashes_are_no_value(folder, capsys, option):
    assert main(["kernels", "tiny_net:Net", "-o", "k.png", f"{option}=--"]) == 2
    assert f"argument {option}: expected a value, got '--'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("out", "reason"), [("a" * 300, "too long"), ("loop/x", "symbolic links"), ("a\0b", "null")]
)
@pytest.mark.parametrize("command", ["maps", "survey", "maximize"])
def test_names_that_no_folder_can_have_are_refused(folder, capsys, command, out, reason):
    Path("loop").symlink_to("loop")
    words = {"maps": ["photo.png"], "survey": ["."], "maximize": ["--layer", "first"]}[command]
    assert main([command, "tiny_net:Net", *words, "-o", out]) == 2
    told = capsys.readouterr().err
    assert reason in told
    assert told.count("\n") == 1


@pytest.mark.parametrize(
    ("place", "reason"), [("a" * 300, "too long"), ("a\0b", "null"), ("loop", "must name a folder")]
)
def test_names_that_no_folder_of_pictures_can_have_are_refused(folder, capsys, place, reason):
    Path("loop").symlink_to("loop")
    assert main(["survey", "tiny_net:Net", place, "-o", "out"]) == 2
    assert reason in capsys.readouterr().err
