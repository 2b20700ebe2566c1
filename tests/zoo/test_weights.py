"""A file of weights is loaded strictly and safely, or refused in one sentence."""

from __future__ import annotations

import argparse
import os
import pickle
import sys
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from torchlens_viz.errors import MissingDependencyError, ModelLoadError
from torchlens_viz.zoo.weights import load_weights, read_weights


def network(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))


def equal(first: nn.Module, second: nn.Module) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def load(path: Path) -> nn.Module:
    model = network(seed=1)
    load_weights(model, read_weights(path).tensors, str(path))
    return model


def refusal(path: Path, match: str) -> str:
    with pytest.raises(ModelLoadError, match=match) as caught:
        load(path)
    message = str(caught.value)
    assert "\n" not in message
    assert repr(str(path)) in message
    return message


def prefixed(prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + key: value for key, value in network().state_dict().items()}


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".ckpt", ".bin", ".PTH"])
def test_a_state_dict_is_loaded(tmp_path, suffix):
    torch.save(network().state_dict(), tmp_path / f"w{suffix}")
    assert equal(load(tmp_path / f"w{suffix}"), network())
    assert not equal(network(1), network())


def test_safetensors_are_loaded(tmp_path):
    save_file(network().state_dict(), tmp_path / "w.safetensors")
    assert equal(load(tmp_path / "w.safetensors"), network())


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "module", "net"])
def test_a_state_dict_is_found_inside_a_training_checkpoint(tmp_path, key):
    torch.save({"epoch": 3, key: network().state_dict(), "optimizer": {"state": {}}}, tmp_path / "w.pth")
    assert equal(load(tmp_path / "w.pth"), network())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_the_prefix_of_a_parallel_or_compiled_model_is_removed(tmp_path, prefix):
    torch.save(prefixed(prefix), tmp_path / "w.pth")
    assert equal(load(tmp_path / "w.pth"), network())


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (lambda: network().state_dict(), []),
        (
            lambda: {"state_dict": prefixed("model.")},
            ["from its `state_dict`", "without the prefix `model.`"],
        ),
        (
            lambda: {"model": {"ema": prefixed("net.")}},
            ["from its `model`, `ema`", "without the prefix `net.`"],
        ),
        (lambda: {"model": {}, "model_ema": network().state_dict()}, ["from its `model_ema`"]),
        (
            lambda: {"n_averaged": torch.tensor(3), **prefixed("module.")},
            ["without `n_averaged`", "without the prefix `module.`"],
        ),
    ],
)
def test_what_was_done_to_find_the_weights_is_told(tmp_path, content, told):
    torch.save(content(), tmp_path / "w.pth")
    read, model = read_weights(tmp_path / "w.pth"), network(seed=1)
    assert [*read.notes, *load_weights(model, read.tensors, "w.pth")] == told
    assert equal(model, network())


def test_averaged_weights_are_taken_before_others(tmp_path):
    torch.save({"state_dict": network(2).state_dict(), "ema": network(0).state_dict()}, tmp_path / "w.pth")
    assert equal(load(tmp_path / "w.pth"), network(0))


def test_a_prefix_that_the_model_has_itself_is_kept(tmp_path):
    torch.save(prefixed("module."), tmp_path / "w.pth")
    model = nn.Module()
    model.module = network(seed=1)
    load_weights(model, read_weights(tmp_path / "w.pth").tensors, "w.pth")
    assert equal(model.module, network())


def test_the_keys_of_older_batch_norms_are_filled_in_as_torch_does(tmp_path):
    state = {key: value for key, value in network().state_dict().items() if "num_batches" not in key}
    torch.save(state, tmp_path / "w.pth")
    assert equal(load(tmp_path / "w.pth"), network())


def test_the_keys_of_published_densenet_files_are_understood():
    model = nn.Module()
    model.denselayer1 = nn.Module()
    model.denselayer1.conv1 = nn.Conv2d(1, 1, 1, bias=False)
    load_weights(model, {"denselayer1.conv.1.weight": torch.full((1, 1, 1, 1), 5.0)}, "densenet.pth")
    assert model.denselayer1.conv1.weight.item() == 5.0


def test_what_does_not_fit_is_named(tmp_path):
    state = network().state_dict()
    state["extra"] = state.pop("2.bias")
    state["0.weight"] = torch.zeros(8, 3, 3, 3)
    torch.save(state, tmp_path / "w.pth")
    message = refusal(tmp_path / "w.pth", "does not fit Sequential")
    assert (
        "1 missing (2.bias), 1 unexpected (extra), "
        "1 of another shape (0.weight (8, 3, 3, 3) where the model has (4, 3, 3, 3))"
    ) in message
    assert "package.module:factory" in message


def test_of_many_differences_some_are_named(tmp_path):
    torch.save({f"k{index}": torch.zeros(1) for index in range(1000)}, tmp_path / "w.pth")
    message = refusal(tmp_path / "w.pth", r"1000 unexpected \(k0, k1, k2, \.\.\.\)")
    assert len(message) < 600


class Bomb:
    """What an attacker would put into a file of weights."""

    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


def test_code_in_a_checkpoint_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": Bomb()}, "w.pth")
    Path("p.pth").write_bytes(pickle.dumps(Bomb()))
    refusal(Path("w.pth"), "objects other than tensors, which are never loaded")
    refusal(Path("p.pth"), "objects other than tensors, which are never loaded")
    assert not Path("exploded").exists()


@pytest.mark.parametrize("content", [network(), {"args": argparse.Namespace(), "model": {}}])
def test_a_pickled_model_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    refusal(tmp_path / "w.pth", r"torch\.save\(model\.state_dict\(\), 'weights\.pth'\)")


def test_a_torchscript_archive_is_refused_without_a_warning(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates the making of it
        torch.jit.save(torch.jit.trace(nn.Conv2d(1, 1, 1), torch.zeros(1, 1, 2, 2)), tmp_path / "w.pt")
    refusal(tmp_path / "w.pt", "is damaged, or holds objects other than tensors")


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.95])
def test_a_truncated_file_is_refused(tmp_path, suffix, share):
    whole = tmp_path / f"whole.{suffix}"
    if suffix == "pth":
        torch.save(network().state_dict(), whole)
    else:
        save_file(network().state_dict(), whole)
    path = tmp_path / f"cut.{suffix}"
    path.write_bytes(whole.read_bytes()[: int(share * whole.stat().st_size)])
    refusal(path, "is damaged|is truncated")


@pytest.mark.parametrize(
    ("content", "held"),
    [
        ([torch.zeros(1)], "a list"),
        (torch.zeros(1), "a Tensor"),
        ({}, "the keys none"),
        ({"epoch": 1, "lr": 0.1}, "the keys epoch, lr"),
        (OrderedDict(state_dict={"lr": 0.1}), "the keys lr"),
    ],
)
def test_a_file_without_named_tensors_is_refused(tmp_path, content, held):
    torch.save(content, tmp_path / "w.pth")
    refusal(tmp_path / "w.pth", rf"must hold a state_dict, got {held} with no tensors by name")


def test_a_missing_file_a_folder_and_another_kind_are_refused(tmp_path):
    refusal(tmp_path / "missing.pth", 'must be "DEFAULT", "none" or an existing file.*no such file')
    refusal(tmp_path, "a folder; check the spelling")
    refusal(tmp_path / ("long" * 100), "check the path")
    (tmp_path / "w.onnx").write_bytes(b"")
    refusal(tmp_path / "w.onnx", r"ends in one of \.safetensors, \.pth, \.pt, \.ckpt, \.bin")


def test_missing_safetensors_names_the_install_command(tmp_path, monkeypatch):
    save_file(network().state_dict(), tmp_path / "w.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(MissingDependencyError, match=r'python -m pip install "torchlens_viz\[safetensors\]"'):
        read_weights(tmp_path / "w.safetensors")


def selfish() -> dict[str, object]:
    """A checkpoint that holds itself."""
    found: dict[str, object] = {"epoch": 1}
    found["state_dict"] = {"model": found}
    return found


def test_a_checkpoint_that_holds_itself_is_refused(tmp_path):
    torch.save(selfish(), tmp_path / "w.pth")
    refusal(tmp_path / "w.pth", "must hold a state_dict, got the keys .* with no tensors by name")


def test_an_archive_that_unpacks_to_many_times_its_length_is_refused_unread(tmp_path, monkeypatch):
    torch.save(network().state_dict(), tmp_path / "w.pth")
    with zipfile.ZipFile(tmp_path / "w.pth", "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("w/data/9", bytes(2**27))
    assert (tmp_path / "w.pth").stat().st_size < 2**20
    monkeypatch.setattr(torch, "load", None)
    refusal(tmp_path / "w.pth", "is an archive of .* bytes that unpacks to many times as many")


def test_pipes_and_devices_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "w.pth")
    refusal(tmp_path / "w.pth", "which is a pipe or device")
    refusal(Path("/dev/zero"), "which is a pipe or device")


@pytest.mark.parametrize(
    ("state", "held"),
    [
        ({1: torch.zeros(1)}, "got 1: a tensor of shape"),
        ({"w": torch.zeros(1), ("a", "b"): 1}, r"got \('a', 'b'\): 1"),
        ({"w": torch.zeros(2, device="meta")}, "got 'w': a tensor of shape"),
    ],
)
def test_what_is_no_dense_tensor_under_a_name_is_refused(tmp_path, state, held):
    torch.save(state, tmp_path / "w.pth")
    refusal(tmp_path / "w.pth", f"must hold dense tensors with values under names, {held}")


def test_an_edited_version_is_told_as_what_does_not_fit(tmp_path):
    state = network().state_dict()
    state._metadata = {"": 7}
    torch.save(state, tmp_path / "w.pth")
    refusal(tmp_path / "w.pth", "does not fit Sequential: .*int")
