"""A model comes by name with its weights and preprocessing, or one sentence says why not."""

from __future__ import annotations

import http.client
import importlib.abc
import re
import sys
import urllib.error
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn
from torchvision.transforms._presets import ImageClassification

from torchlens_viz.errors import MissingDependencyError, ModelLoadError
from torchlens_viz.zoo.load import load_model, load_structure

NAME = "squeezenet1_1"
WEIGHTS = torchvision.models.SqueezeNet1_1_Weights.DEFAULT
PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 420, 3), dtype=np.uint8))


def state_with(value: float, name: str = NAME, **options) -> dict[str, torch.Tensor]:
    """Make a checkpoint that fits a model and is one number in memory and on disk."""
    with torch.device("meta"):
        shapes = torchvision.models.get_model(name, weights=None, **options).state_dict()
    return {key: torch.tensor(value, dtype=own.dtype).expand(own.shape) for key, own in shapes.items()}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache of torch hub, and no network."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))

    def no_network(*_args, **_options):
        raise urllib.error.URLError("no network in this test")

    monkeypatch.setattr(torch.hub, "urlopen", no_network)
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def write_module(tmp_path, monkeypatch):
    """Write importable modules into the current folder, and forget them afterwards."""
    monkeypatch.chdir(tmp_path)
    known = set(sys.modules)

    def write(name: str, source: str) -> None:
        path = Path(*name.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"import torch\nfrom torch import nn\n{source}\n")

    yield write
    for name in set(sys.modules) - known:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def refusal(match: str, spec: str, kind: type[Exception] = ModelLoadError, **options) -> str:
    with pytest.raises(kind, match=match) as caught:
        load_model(spec, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Torchvision's models


def test_random_weights_are_the_same_each_time_and_leave_the_generator_alone():
    torch.manual_seed(123)
    before = torch.get_rng_state()
    first = load_model(NAME, weights="none")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(456)
    second = load_model(NAME, weights="none")
    for one, other in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert first.model.features[0].weight.std() > 0
    assert not any(module.training for module in first.model.modules())
    assert first.name == NAME
    assert first.weights_note == f"random weights (seed 0), preprocessing of {WEIGHTS!r}"


def test_default_weights_come_from_the_cache_through_torchvisions_own_code(hub):
    torch.save(state_with(0.25), hub / WEIGHTS.url.rpartition("/")[2])
    loaded = load_model(NAME)
    assert all((parameter == 0.25).all() for parameter in loaded.model.parameters())
    assert not loaded.model.training
    assert loaded.weights_note == f"weights {WEIGHTS!r}, preprocessing of {WEIGHTS!r}"


@pytest.mark.parametrize("weights", ["none", "file"])
def test_the_preprocessing_is_that_of_the_default_weights(tmp_path, weights):
    if weights == "file":
        torch.save(state_with(0.5), tmp_path / "w.pth")
        weights = tmp_path / "w.pth"
    prepared = load_model(NAME, weights=weights).preprocess(PHOTO)
    assert torch.equal(prepared, WEIGHTS.transforms()(PHOTO)[None])
    assert prepared.shape == (1, 3, 224, 224)


def test_a_file_is_loaded_into_a_torchvision_model(tmp_path):
    torch.save({"state_dict": state_with(0.5)}, tmp_path / "w.pth")
    loaded = load_model(NAME.upper(), weights=str(tmp_path / "w.pth"))
    assert all((parameter == 0.5).all() for parameter in loaded.model.parameters())
    where = f"{str(tmp_path / 'w.pth')!r} (from its `state_dict`)"
    assert loaded.weights_note == f"weights of {where}, preprocessing of {WEIGHTS!r}"


@pytest.mark.parametrize(
    ("name", "option", "head"),
    [
        ("googlenet", "aux_logits", "aux1"),
        ("inception_v3", "aux_logits", "AuxLogits"),
        ("fcn_resnet50", "aux_loss", "aux_classifier"),
    ],
)
@pytest.mark.parametrize("with_head", [True, False])
def test_a_file_with_or_without_auxiliary_heads_fits(tmp_path, name, option, head, with_head):
    options = {"weights_backbone": None} if name == "fcn_resnet50" else {"init_weights": True}
    torch.save(state_with(0.0, name, **options, **{option: with_head}), tmp_path / "w.pth")
    model = load_model(name, weights=tmp_path / "w.pth").model
    assert (getattr(model, head) is not None) == with_head


@pytest.mark.parametrize("name", ["googlenet", "inception_v3", "fcn_resnet50"])
def test_random_weights_need_no_network_and_warn_of_nothing(hub, name):
    assert not load_model(name, weights="none").model.training
    assert list(hub.iterdir()) == []


def test_a_detector_takes_the_picture_at_its_own_size():
    loaded = load_model("ssdlite320_mobilenet_v3_large", weights="none")
    assert loaded.preprocess(PHOTO).shape == (1, 3, 300, 420)


def test_a_network_for_video_is_shown_a_still_clip():
    loaded = load_model("r3d_18", weights="none")
    clip = loaded.preprocess(PHOTO)
    frames = torch.from_numpy(np.array(PHOTO)).permute(2, 0, 1)[None].repeat(16, 1, 1, 1)
    assert torch.equal(clip, torchvision.models.video.R3D_18_Weights.DEFAULT.transforms()(frames)[None])
    assert torch.equal(clip[:, :, 0], clip[:, :, 15])
    assert loaded.weights_note.endswith("16 times the same frame")
    with torch.no_grad():
        assert loaded.on_images(clip).shape == (1, len(loaded.names)) == (1, 400)


@pytest.mark.parametrize("size", [(300, 420), (20, 50)])
def test_a_network_for_optical_flow_is_shown_the_picture_twice(size):
    loaded = load_model("raft_small", weights="none")
    frame = loaded.preprocess(PHOTO.resize(size))
    assert all(side % 8 == 0 and side >= 128 for side in frame.shape[2:])
    assert frame.min() >= -1
    assert frame.max() <= 1
    (first, second), named = loaded.arguments(frame)
    assert torch.equal(first, second)
    assert (first is second, named) == (False, {})


def test_a_classifier_knows_the_names_of_its_classes():
    assert load_model(NAME, weights="none").names == tuple(WEIGHTS.meta["categories"])


def test_a_quantized_name_is_the_float_network_with_its_weights():
    loaded = load_model("quantized_shufflenet_v2_x0_5", weights="none")
    assert "preprocessing of ShuffleNet_V2_X0_5_Weights." in loaded.weights_note


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("alexnot", "alexnet"), ("ResNet-18", "resnet18"), ("vgg", "vgg1"), ("", "alexnet"), ("?", "")],
)
def test_an_unknown_name_is_refused_with_the_nearest(name, nearest):
    message = refusal(f"no torchvision model is named {re.escape(repr(name))}; .*{nearest}", name)
    assert "package.module:factory" in message


def test_a_failing_download_suggests_what_to_do(hub):
    message = refusal("cannot get the weights of squeezenet1_1 from https://.*no network in this test", NAME)
    assert "`--weights none`" in message
    assert "`--weights FILE`" in message
    assert str(hub / WEIGHTS.url.rpartition("/")[2]) in message
    assert list(hub.iterdir()) == []


def test_a_download_that_breaks_off_suggests_what_to_do(hub, monkeypatch):
    def broken(*_args, **_options):
        raise http.client.IncompleteRead(b"half")

    monkeypatch.setattr(torch.hub, "urlopen", broken)
    refusal("cannot get the weights of squeezenet1_1 .*IncompleteRead", NAME)


def test_a_download_with_the_wrong_hash_is_refused(hub, monkeypatch, capsys):
    def download(url, target, hash_prefix, progress):
        raise RuntimeError(f'invalid hash value (expected "{hash_prefix}", got "0000")')

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    refusal("the weights of squeezenet1_1 arrived damaged .*try again", NAME)
    assert capsys.readouterr().out == ""


def test_a_damaged_file_in_the_cache_is_named(hub):
    cached = hub / WEIGHTS.url.rpartition("/")[2]
    cached.write_bytes(b"half a file")
    assert str(cached) in refusal("are damaged .*delete that file", NAME)
    torch.save({"other": torch.zeros(1)}, cached)
    assert str(cached) in refusal("are damaged .*delete that file", NAME)


def test_torchvision_that_is_missing_or_cannot_be_imported_names_the_fix(monkeypatch):
    class Broken(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name == "torchvision.models":
                raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.delitem(sys.modules, "torchvision.models")
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    message = refusal("torchvision::nms does not exist", NAME, MissingDependencyError)
    assert "--force-reinstall torch torchvision" in message
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    refusal(
        "torchvision is not installed; run `python -m pip install torchvision`", NAME, MissingDependencyError
    )


# Factories

FACTORY = "def make():\n    return nn.Sequential(nn.Conv2d(3, 2, 3), nn.Dropout())"


def test_a_factory_is_found_from_the_current_folder(write_module):
    write_module("mine_a.nets", FACTORY)
    path_before, state_before = list(sys.path), torch.get_rng_state()
    loaded = load_model("mine_a.nets:make")
    assert isinstance(loaded.model[0], nn.Conv2d)
    assert not loaded.model.training
    assert not loaded.model[1].training
    assert loaded.weights_note.startswith(
        "weights as its factory sets them, preprocessing: shorter side to 256"
    )
    assert sys.path == path_before
    assert torch.equal(torch.get_rng_state(), state_before)


@pytest.mark.parametrize("factory", ["instance", "Net", "Holder.make", "lazy"])
def test_a_factory_may_be_a_module_a_class_or_an_attribute(write_module, factory):
    source = """
class Net(nn.Conv2d):
    def __init__(self):
        super().__init__(3, 2, 3)
class Holder:
    make = staticmethod(Net)
instance = Net()
lazy = lambda: Net()
"""
    write_module("mine_b", source)
    assert type(load_model(f"mine_b:{factory}").model).__name__ == "Net"


def test_a_file_is_loaded_into_a_factorys_model(write_module):
    write_module("mine_c", FACTORY)
    torch.save({"0.weight": torch.full((2, 3, 3, 3), 7.0), "0.bias": torch.zeros(2)}, "w.pth")
    loaded = load_model("mine_c:make", weights="w.pth")
    assert (loaded.model[0].weight == 7).all()
    assert loaded.weights_note.startswith("weights of 'w.pth', preprocessing: ")


def test_none_for_a_factory_leaves_what_it_sets(write_module):
    write_module("mine_d", FACTORY)
    none, default = (load_model("mine_d:make", weights=which) for which in ("none", "DEFAULT"))
    assert torch.equal(none.model[0].weight, default.model[0].weight)
    assert none.weights_note == default.weights_note


def test_a_structure_has_no_values_where_that_is_possible(write_module):
    assert all(each.is_meta for each in load_structure("resnet18").model.parameters())
    looking = "def looks():\n    net = make()\n    return net if net[0].bias.tolist() else 0"
    write_module("mine_s", f"{FACTORY}\n{looking}")
    # It computes its widths with tensors as it is built.
    widths = load_structure("regnet_y_400mf").model
    assert all(each.is_meta for each in widths.parameters() if each.numel() > 1000)
    assert widths.trunk_output.block1[0].proj[0].out_channels == 48
    assert not load_structure("mine_s:looks").model[0].weight.is_meta
    with pytest.raises(ModelLoadError, match="no torchvision model is named 'alexnot'"):
        load_structure("alexnot")


def test_a_structure_leaves_no_trace_in_what_was_imported_for_it(write_module):
    source = "MEAN = torch.tensor(2.0)\ndef preprocess(image):\n    return torch.ones(3, 4, 4) * MEAN"
    write_module("mine_t", f"{FACTORY}\n{source}")
    assert load_structure("mine_t:make").model[0].weight.is_meta
    assert torch.equal(load_model("mine_t:make").preprocess(PHOTO), torch.full((1, 3, 4, 4), 2.0))


def test_a_preprocess_beside_the_factory_is_used(write_module):
    write_module("mine_e", FACTORY + "\ndef preprocess(image):\n    return torch.full((3, *image.size), 0.5)")
    loaded = load_model("mine_e:make")
    assert torch.equal(loaded.preprocess(PHOTO), torch.full((1, 3, 420, 300), 0.5))
    assert loaded.weights_note.endswith("preprocessing of mine_e:preprocess")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return 3", r"must return a tensor \(1, C, H, W\) or \(C, H, W\), got int"),
        ("return torch.zeros(5)", r"got Tensor \(shape \(5,\)\)"),
        ("return image.nonsense", "raised AttributeError: .*it must take a PIL.Image"),
    ],
)
def test_a_preprocess_that_does_not_fit_is_refused(write_module, body, message):
    write_module("mine_f", f"{FACTORY}\ndef preprocess(image):\n    {body}")
    loaded = load_model("mine_f:make")
    with pytest.raises(ModelLoadError, match=message):
        loaded.preprocess(PHOTO)


def test_the_usual_preprocessing_crops_scales_and_normalises(write_module):
    write_module("mine_g", FACTORY)
    preprocess = load_model("mine_g:make").preprocess
    square = PHOTO.crop((0, 0, 256, 256))
    usual = ImageClassification(crop_size=224, resize_size=256)
    assert torch.allclose(preprocess(square), usual(square)[None], rtol=0, atol=1e-6)
    smooth = Image.linear_gradient("L").resize((420, 300)).convert("RGB")
    assert torch.allclose(preprocess(smooth), usual(smooth)[None], rtol=0, atol=0.05)
    assert preprocess(Image.new("L", (100_000, 3))).shape == (1, 3, 224, 224)


def test_a_factory_may_return_preprocessing_and_names_too(write_module):
    write_module(
        "mine_p",
        f"{FACTORY}\ndef pair():\n    return make(), lambda image: torch.full((3, 4, 5), 1.0 * image.width)\n"
        "def three():\n    return *pair(), ['cat', 'dog']\n"
        "def preprocess(image):\n    raise AssertionError\n"
        "def unprepared():\n    return make(), None, ('a', 'b')\n",
    )
    pair, three = load_model("mine_p:pair"), load_model("mine_p:three")
    assert torch.equal(pair.preprocess(PHOTO), torch.full((1, 3, 4, 5), 420.0))
    assert pair.weights_note.endswith("preprocessing of mine_p:pair")
    assert (pair.names, three.names) == ((), ("cat", "dog"))
    assert load_model("mine_p:unprepared").weights_note.endswith("preprocessing of mine_p:preprocess")


def test_a_factory_is_found_in_a_file_with_what_stands_beside_it(write_module, tmp_path):
    write_module("beside_q", "WIDTH = 7")
    write_module("odd-name", f"from beside_q import WIDTH\n{FACTORY}")
    write_module("deep.file_q", f"{FACTORY}\nmade = nn.Conv2d(3, 5, 3)")
    before = list(sys.path)
    assert isinstance(load_model("./odd-name.py:make").model[0], nn.Conv2d)
    assert load_model("deep/file_q.py:made").model.out_channels == 5
    again = load_model(f"{tmp_path / 'deep' / 'file_q.py'}:made").model
    assert again is load_model("deep/file_q.py:made").model  # a module runs once
    assert sys.path == before


@pytest.mark.parametrize(
    ("source", "spec", "message"),
    [
        ("", "no_such_file.py:make", "there is no file 'no_such_file.py'; check the path"),
        ("x = 1 / 0", "./mine_h.py:make", r"running 'mine_h.py' raised ZeroDivisionError: .*see `python "),
        (FACTORY, "./mine_h.py", r"must say which function or class of './mine_h.py' builds it, such as"),
        ("def make(): return 3, 4", "mine_h:make", r"\(model, preprocess, names\), got \(int, int\)"),
        (f"{FACTORY}\ndef two(): return make(), 4", "mine_h:two", "as its second part, got int"),
        (f"{FACTORY}\ndef three(): return make(), None, 'cat'", "mine_h:three", "as its third part, got str"),
        (f"{FACTORY}\ndef four(): return make(), None, [], 4", "mine_h:four", "got .*list, int"),
        ("", "model.pt", "got the file 'model.pt', which holds weights and not the .* --weights model.pt"),
        ("", "nets/best.safetensors", "--weights nets/best.safetensors"),
        (
            "",
            "no_such_module_x:make",
            "there is no module 'no_such_module_x'; run from the folder that holds it",
        ),
        ("", "mine_h.deeper:make", "there is no module 'mine_h.deeper'"),
        (
            "import no_such_package_y",
            "mine_h:make",
            "importing mine_h raised ModuleNotFoundError: No module named",
        ),
        ("x = 1 / 0", "mine_h:make", "importing mine_h raised ZeroDivisionError: division by zero"),
        ("def broken(:", "mine_h:make", "importing mine_h raised SyntaxError"),
        ("raise SystemExit(3)", "mine_h:make", "importing mine_h raised SystemExit: 3"),
        (FACTORY, "mine_h:mak", "has no factory 'mak'; did you mean make"),
        ("", "mine_h:", "has no factory ''"),
        (FACTORY, ":make", "the part before the colon must be a full module name"),
        (FACTORY, ".mine_h:make", "the part before the colon must be a full module name"),
        ("make = 3", "mine_h:make", "must be an nn.Module or a function that returns one, got int"),
        ("def make(): return 3", "mine_h:make", r"must return an nn.Module, .*, got int"),
        (
            "def make(width): return 3",
            "mine_h:make",
            "raised TypeError: .*it must build the model without arguments",
        ),
        ("def make(): return {}[0]", "mine_h:make", "raised KeyError: 0; it must build"),
    ],
)
def test_a_factory_that_cannot_build_a_model_is_refused(write_module, source, spec, message):
    write_module("mine_h", source)
    refusal(message, spec)


def test_loading_warns_of_nothing_even_where_warnings_are_shown():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_model("googlenet", weights="none").preprocess(PHOTO)
    assert [str(warning.message) for warning in caught] == []


def test_a_default_device_that_was_taken_back_does_no_harm():
    def load():
        torch.set_default_device("cpu")
        torch.set_default_device(None)
        return load_model(NAME, weights="none").name

    # A default device belongs to its thread: that of the other tests keeps what torch 2.8 cannot restore.
    with ThreadPoolExecutor() as thread:
        assert thread.submit(load).result() == NAME
