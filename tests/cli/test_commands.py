"""`torchlens-viz kernels`, `maps` and `maximize` write what the library draws and finds."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn

from tests.nets import contents
from tests.pixels import colours, same
from tests.processes import said
from torchlens_viz import Maximization, feature_grid, kernel_grid, maximize
from torchlens_viz.ascent.checkpoint import Resumption
from torchlens_viz.cli.main import main
from torchlens_viz.files.pictures import read_image
from torchlens_viz.models.colours import colours_of
from torchlens_viz.zoo.load import load_model


def pixels(path: Path) -> np.ndarray:
    return np.asarray(read_image(path))


# Kernels and maps


def test_kernels_draws_the_first_convolution(folder, run):
    code, out, err = run("kernels", "tiny_net:Net", "-o", "k.png")
    assert (code, out) == (0, [str(folder / "k.png")])
    assert err == [f"torchlens-viz: tiny_net:Net: {load_model('tiny_net:Net').weights_note}"]
    model = load_model("tiny_net:Net").model
    assert np.array_equal(pixels("k.png"), colours(kernel_grid(model, value_range="robust")))


def test_an_outlier_leaves_the_rest_visible_unless_the_full_range_is_asked_for(folder, run):
    model = load_model("tiny_net:Net").model
    with torch.no_grad():
        model.second.weight[0, 0, 0, 0] = 100.0
    torch.save(model.state_dict(), "outlier.pth")
    second = ("--layer", "second", "--channels", "0-5", "--weights", "outlier.pth")
    drawn = []
    for more in ((), ("--full-range",)):
        assert run("kernels", "tiny_net:Net", "-o", "k.png", *second, *more)[0] == 0
        drawn.append(pixels("k.png"))
    sheets = [kernel_grid(model, "second", channels=range(6), value_range=each) for each in ("robust", None)]
    assert all(np.array_equal(found, colours(sheet)) for found, sheet in zip(drawn, sheets, strict=True))
    assert not np.array_equal(*drawn)


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
    assert np.array_equal(pixels("new/k.png"), colours(expected))


def test_a_network_that_folds_gray_pixels_into_channels_is_shown_gray_pictures(folder, run):
    code, out, err = run("maps", "tiny_net:folded", "photo.png", "-o", "new")
    assert (code, out) == (0, [str(folder / "new" / "1.png")])
    assert err[0].endswith("in gray")
    code, out, _ = run(
        *("maximize", "tiny_net:folded", "--layer", "1", "--channels", "0", "--steps", "1", "--size", "16"),
        *("-o", "made"),
    )
    assert code == 0
    assert Maximization.load("made/1").images.shape == (1, 1, 16, 16)


def test_switches_and_limits_reach_the_sheet(folder, run):
    code, *_ = run(
        *("kernels", "tiny_net:Net", "-o", "k.png", "--layer", "second"),
        *("--scale-each", "--labels", "--max-tiles", "2"),
    )
    assert code == 0
    model = load_model("tiny_net:Net").model
    assert np.array_equal(
        pixels("k.png"),
        colours(
            kernel_grid(model, "second", scale_each=True, labels=True, max_tiles=2, value_range="robust")
        ),
    )
    code, *_ = run("kernels", "tiny_net:Net", "-o", "k.png", "--layer", "second", "--legend")
    assert code == 0
    assert np.array_equal(
        pixels("k.png"), colours(kernel_grid(model, "second", legend=True, value_range="robust"))
    )


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
    assert np.array_equal(pixels("maps/first.png"), colours(feature_grid(first, value_range="robust")))
    assert np.array_equal(pixels("maps/second.png"), colours(feature_grid(second, value_range="robust")))


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
    assert np.array_equal(pixels("k.png"), colours(kernel_grid(model, value_range="robust")))

    code, out, _ = run("maps", "squeezenet1_1", "photo.png", "-o", "m", "--layer", "features.0")
    assert (code, out) == (0, [str(folder / "m" / "features.0.png")])
    with torch.inference_mode():
        expected = model.features[0](weights.transforms()(read_image("photo.png"))[None])
    assert np.array_equal(pixels(out[0]), colours(feature_grid(expected, value_range="robust")))


def test_a_weights_file_is_used(folder, run):
    model = load_model("tiny_net:Net").model
    nn.init.ones_(model.first.weight)
    torch.save(model.state_dict(), "w.pth")
    code, *_ = run("kernels", "tiny_net:Net", "-o", "k.png", "--weights", "w.pth")
    assert code == 0
    assert np.array_equal(pixels("k.png"), colours(kernel_grid(model, value_range="robust")))


def test_ranking_pages_and_titles_reach_the_sheet(tmp_path, capsys):
    out = tmp_path / "k.png"
    options = ["--sort-by", "norm", "--max-tiles", "8", "--page", "1", "--title", "second page"]
    assert main(["kernels", "squeezenet1_1", "--weights", "none", "-o", str(out), *options]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    model = load_model("squeezenet1_1", weights="none").model
    expected = kernel_grid(
        model, sort_by="norm", max_tiles=8, page=1, title="second page", value_range="robust"
    )
    with Image.open(out) as image:
        assert image.convert("RGB").tobytes() == expected.convert("RGB").tobytes()


# Maximise

MODELS = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Conv2d(3, 6, 3)
        self.relu = nn.ReLU(inplace=True)
        self.second = nn.Conv2d(6, 4, 3)

    def forward(self, images):
        return self.second(self.relu(self.first(images)))


class Clips(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv3d(3, 4, (2, 3, 3))

    def forward(self, clips):
        return self.first(clips)


def signals():
    return nn.Sequential(nn.Conv1d(12, 3, 5))


def clip(image):
    return preprocess(image)[:, :, None].expand(-1, -1, 5, -1, -1)


def clips():
    return Clips(), clip


def judged():
    return nn.Sequential(Clips(), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 2)), clip


def preprocess(image):
    values = torch.tensor(list(image.resize((20, 18)).convert("RGB").tobytes())).view(18, 20, 3)
    return (values.permute(2, 0, 1)[None].float() / 255 - 0.5) / 0.25


def build():
    return Net()


def curved(image):
    return preprocess(image) ** 3
"""


@pytest.fixture
def model_folder(tmp_path, monkeypatch):
    (tmp_path / "mymodels.py").write_text(MODELS)
    (tmp_path / "curved.py").write_text(MODELS.replace("/ 255 - 0.5) / 0.25", "/ 255) ** 3"))
    monkeypatch.chdir(tmp_path)
    for name in ("mymodels", "curved"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def normalised(images):
    return (images - 0.5) / 0.25


def expected(layer, channels=None, **options):
    model = load_model("mymodels:build").model
    options = {"parametrization": "fourier", "transforms": "robust", **options}
    return maximize(model, layer, channels, size=(18, 20), preprocess=normalised, **options)


def test_it_writes_a_folder_per_layer_with_what_maximize_finds(model_folder, capsys):
    words = [
        "maximize",
        "mymodels:build",
        "--layer",
        "first",
        "--layer",
        "second",
        "-o",
        "out",
        "--steps",
        "6",
    ]
    assert main([*words, "--channels", "0-2", "--seed", "5", "--precision", "float32"]) == 0
    out = capsys.readouterr()
    assert out.out.splitlines() == [
        str(model_folder / "out" / name / "grid.png") for name in ("first", "second")
    ]
    for layer in ("first", "second"):
        want = expected(layer, range(3), steps=6, seed=5, precision="float32")
        got = Maximization.load(model_folder / "out" / layer)
        torch.testing.assert_close(got.images, want.images, rtol=0, atol=1e-5)
        assert sorted(path.name for path in (model_folder / "out" / layer).iterdir()) == [
            "0.png", "1.png", "2.png", "grid.png", "maximization.npz", "scores.csv",
        ]  # fmt: skip
        drawn = np.asarray(read_image(model_folder / "out" / layer / "1.png"), dtype=np.float64)
        assert np.abs(drawn - 255 * want.images[1].permute(1, 2, 0).double().numpy()).max() <= 0.51
        with (model_folder / "out" / layer / "scores.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [row["channel"] for row in rows] == ["0", "1", "2"]
        assert [float(row["score"]) for row in rows] == pytest.approx(want.scores.tolist(), rel=1e-4)
    assert set(got.status) == {"steps"}
    assert "second: 3 made all steps\n" in out.err


@pytest.mark.parametrize("finished", [0, 2])
def test_a_run_that_was_broken_off_goes_on(model_folder, capsys, monkeypatch, finished):
    words = [
        "maximize",
        "mymodels:build",
        "--layer",
        "second",
        "-o",
        "out",
        "--steps",
        "6",
        "--batch-size",
        "1",
    ]
    keep, kept = Resumption.keep, []

    def keep_some(self, climb):
        if len(kept) == finished:
            raise KeyboardInterrupt
        kept.append(climb.request.channel)
        keep(self, climb)

    with monkeypatch.context() as broken:
        broken.setattr(Resumption, "keep", keep_some)
        assert main(words) == 130
    assert [path.suffix for path in (model_folder / "out" / "second").iterdir()] == [
        ""
    ]  # only the unfinished
    assert len(list((model_folder / "out" / "second" / "unfinished").glob("*.npz"))) == finished
    assert main(words) == 0
    got, whole = Maximization.load(model_folder / "out" / "second"), expected("second", steps=6)
    assert got.channels.tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(got.images, whole.images, rtol=0, atol=1e-3)
    assert not (model_folder / "out" / "second" / "unfinished").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mymodels:build", "--layer", "third"], "no layer is named `third`"),
        (["mymodels:build", "--layer", "first", "--channels", "9"], "indices from 0 to 5, got 9"),
        (["mymodels:build", "--layer", "first", "--transforms", "wild"], "`transforms` must be one of"),
        (["curved:build", "--layer", "first"], "along a straight line"),
        (["mymodels:build"], "required: --layer"),
    ],
)
def test_bad_input_is_one_line_and_changes_nothing(model_folder, capsys, words, message):
    before = sorted(path for path in model_folder.rglob("*") if "__pycache__" not in path.parts)
    assert main(["maximize", *words, "-o", "out", "--steps", "2"]) == 2
    out = capsys.readouterr()
    assert message in out.err
    assert out.err.count("\n") == 1
    assert out.out == ""
    assert sorted(path for path in model_folder.rglob("*") if "__pycache__" not in path.parts) == before


def test_what_preprocessing_does_to_colours_is_found(model_folder):
    found = colours_of(load_model("mymodels:build").preprocess)
    assert found.size == (18, 20)
    images = torch.rand(2, 3, 5, 5)
    torch.testing.assert_close(found.apply(images), normalised(images), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_two_processes_of_torchrun_find_what_one_finds(model_folder):
    words = ["maximize", "mymodels:build", "--layer", "second", "--steps", "5", "--precision", "float32"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "torchlens_viz"]
    done = subprocess.run(
        [*run, *words, "-o", "out"], capture_output=True, text=True, env=environment, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    files = [line for line in said(done.stdout) if "grid.png" in line]  # gloo may print between them
    assert files == [str(model_folder / "out" / "second" / "grid.png")]
    got = Maximization.load(model_folder / "out" / "second")
    want = expected("second", steps=5, precision="float32")
    assert got.channels.tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(got.images, want.images, rtol=0, atol=1e-4)


# Signals and clips


def test_a_network_over_clips_gets_clips_of_the_size_that_its_preprocessing_makes(model_folder, capsys):
    words = [
        "maximize",
        "mymodels:clips",
        "--layer",
        "first",
        "--channels",
        "0,2",
        "--steps",
        "3",
        "-o",
        "out",
    ]
    assert main([*words, "--precision", "float32"]) == 0
    found = Maximization.load("out/first")
    assert found.images.shape == (2, 3, 5, 18, 20)
    model = load_model("mymodels:clips").model
    torch.testing.assert_close(
        found.means, model(normalised(found.images)).detach().flatten(2).mean(2), rtol=1e-4, atol=1e-5
    )
    assert main([*words, "--size", "3x8x9", "-o", "small"]) == 0
    assert Maximization.load("small/first").images.shape == (2, 3, 3, 8, 9)


def test_a_network_over_signals_gets_them_as_they_are(tmp_path, model_folder, capsys):
    (tmp_path / "alone.py").write_text(MODELS.partition("def preprocess")[0])
    words = ["maximize", "alone:signals", "--layer", "0", "--channels", "1", "--steps", "3", "-o", "out"]
    assert main([*words, "--size", "60x"]) == 0
    assert "no preprocessing, which is for pictures alone" in capsys.readouterr().err
    assert Maximization.load("out/0").images.shape == (1, 12, 60)
    assert main([*words, "--size", "60x2x", "-o", "other"]) == 2
    assert "cannot take images of shape (12, 60, 2)" in capsys.readouterr().err
    assert main([*words, "--size", "wide"]) == 2
    assert "must be a number or as many as 16x112x112, got 'wide'" in capsys.readouterr().err


def test_maps_of_clips_are_sheets_of_slices(model_folder, capsys):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 28, 3), np.uint8)).save("photo.png")
    words = ["maps", "mymodels:clips", "photo.png", "--full-range", "-o"]
    assert main([*words, "out"]) == 0
    loaded = load_model("mymodels:clips")
    values = loaded.model(loaded.preprocess(read_image("photo.png"))).detach()
    with Image.open("out/first.png") as drawn:
        assert same(drawn, feature_grid(values))
    assert (
        main([*words, "rows", "--slices", "0-2", "--plane", "height", "--channels", "1,3", "--labels"]) == 0
    )
    with Image.open("rows/first.png") as drawn:
        expected = feature_grid(values, plane="height", slices=[0, 1, 2], channels=[1, 3], labels=True)
        assert same(drawn, expected)
    assert main([*words, "most", "--slices", "max"]) == 0
    with Image.open("most/first.png") as drawn:
        assert same(drawn, feature_grid(values.amax(2)[0], labels=False))
    capsys.readouterr()
    assert main([*words, "none", "--plane", "time"]) == 2
    assert "`plane` must be" in capsys.readouterr().err


def test_clips_are_explained_slice_by_slice(model_folder, capsys):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 28, 3), np.uint8)).save("photo.png")
    words = ["explain", "mymodels:judged", "photo.png", "--method", "hirescam", "-o"]
    assert main([*words, "out"]) == 0
    assert main([*words, "all", "--slices", "all"]) == 0
    with Image.open("out/photo.png") as one, Image.open("all/photo.png") as five:
        assert five.height > one.height + 4 * 128
        assert one.width >= 3 * 128
