"""Activations on disk: what was recorded comes back, and a damaged file says so."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import types
from collections import OrderedDict, namedtuple
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.nets import Gives
from torchlens_viz import Activations, capture
from torchlens_viz.errors import ArchiveError, LayerNotCapturedError, MissingDependencyError
from torchlens_viz.files.tensors import write_safetensors
from torchlens_viz.hooks.activations import InputOutput


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1)
        self.lstm = nn.LSTM(2, 3)
        self.unused = nn.ReLU()

    def forward(self, value):
        value = self.conv(self.conv(value)[:, :, ::2])
        return self.lstm(value.flatten(2).permute(2, 0, 1))


@pytest.fixture
def acts():
    model = Twice()
    with torch.no_grad(), capture(model, ["conv", "lstm", "unused"]) as acts:
        model(torch.randn(1, 2, 4, 4))
    return acts


def test_what_was_saved_comes_back(acts, tmp_path):
    path = tmp_path / "new" / "acts.safetensors"
    assert acts.save(path) == path
    loaded = Activations.load(path)
    assert list(loaded) == list(acts) == ["conv", "lstm"]
    assert loaded.not_called == ("unused",)
    for actual, expected in zip(loaded.calls("conv"), acts.calls("conv"), strict=True):
        assert torch.equal(actual, expected)
    output, (hidden, cell) = loaded["lstm"]
    expected_output, (expected_hidden, expected_cell) = acts["lstm"]
    assert torch.equal(output, expected_output)
    assert torch.equal(hidden, expected_hidden)
    assert torch.equal(cell, expected_cell)
    assert repr(loaded) == repr(acts)
    assert list(tmp_path.glob("new/*")) == [path]


def test_tensors_are_readable_by_safetensors_itself(acts, tmp_path):
    from safetensors.torch import load_file

    tensors = load_file(acts.save(tmp_path / "a.safetensors"))
    assert torch.equal(tensors["conv#1"], acts.calls("conv")[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool])
def test_every_dtype_keeps_its_bits(dtype, tmp_path):
    model = nn.Identity()
    value = torch.tensor([[0.0, 1.5], [-2.0, 3.0]]).to(dtype)
    with capture(model, "") as acts:
        model(value)
    loaded = Activations.load(acts.save(tmp_path / "a.safetensors"))
    assert loaded[""].dtype == dtype
    assert torch.equal(loaded[""], value)


def test_channels_last_and_inputs_keep_their_values(tmp_path):
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    with torch.no_grad(), capture(model, "", io="both") as acts:
        model(torch.randn(2, 3, 5, 5))
    loaded = Activations.load(acts.save(tmp_path / "a.safetensors"))
    assert isinstance(loaded[""], InputOutput)
    assert torch.equal(loaded[""].output, acts[""].output)


def test_loading_reads_only_what_is_asked_for_and_hands_it_out_for_good(acts, tmp_path, monkeypatch):
    path = acts.save(tmp_path / "a.safetensors")
    read = []

    class Counting:
        def __init__(self, file):
            self._file = file

        def metadata(self):
            return self._file.metadata()

        def keys(self):
            return self._file.keys()

        def get_tensor(self, key):
            read.append(key)
            return self._file.get_tensor(key)

    real = safetensors.safe_open
    monkeypatch.setattr(safetensors, "safe_open", lambda *a, **k: Counting(real(*a, **k)))
    loaded = Activations.load(path)
    assert read == []
    first = loaded.calls("conv")[0]
    assert read == ["conv#0", "conv#1"]
    first.fill_(7)
    assert (loaded.calls("conv")[0] == 7).all()
    assert not (Activations.load(path).calls("conv")[0] == 7).any()


def test_names_that_were_not_selected_are_explained_after_loading(acts, tmp_path):
    loaded = Activations.load(acts.save(tmp_path / "a.safetensors"))
    with pytest.raises(LayerNotCapturedError, match=r"`cnv` was not selected .* did you mean `conv`"):
        loaded["cnv"]


@pytest.mark.parametrize("keep", [0, 5, 40, -10])
def test_truncated_file_says_so(acts, tmp_path, keep):
    path = acts.save(tmp_path / "a.safetensors")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ArchiveError, match=r"cannot read .*a\.safetensors.* truncated"):
        Activations.load(path)


def test_other_files_are_refused(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(OSError, match=r"cannot read .*No such file"):
        Activations.load(tmp_path / "none.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(ArchiveError, match="holds no activations"):
        Activations.load(tmp_path / "weights.safetensors")


def test_what_a_file_cannot_hold_is_named_and_nothing_is_written(tmp_path):
    class Gives(nn.Module):
        def forward(self, value):
            return {"sparse": value.to_sparse()} if value.ndim == 2 else [object(), value]

    model = Gives()
    for value, message in (
        (torch.zeros(2, 2), "`#0.sparse` is a torch.sparse_coo"),
        (torch.zeros(1), "is a object"),
    ):
        with capture(model, "") as acts:
            model(value)
        with pytest.raises(ArchiveError, match=message):
            acts.save(tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_every_structure_comes_back_as_it_was(tmp_path):
    """Tensors that occur twice, views of one another, keys that are no strings, and keys with dots."""
    Pair = namedtuple("Pair", ["first", "second"])
    one, two = torch.rand(2, 3), torch.rand(4)
    value = {
        "twice": [one, one],
        "view": one[0],
        "numbered": {0: one, 1: two, (0, 1): two, None: two},
        "a": {"b": one},
        "a.b": two,
        "size": one.shape,
        "pair": Pair(one, 3),
        "proxy": types.MappingProxyType({"x": two}),
        "most": torch.max(one, 1),
    }
    net = Gives(lambda _: value)
    with capture(net, "") as acts:
        net(one)
    found = Activations.load(acts.save(tmp_path / "a.safetensors"))[""]
    assert found["twice"][0].equal(one)
    assert found["twice"][1].equal(one)
    assert found["view"].equal(one[0])
    assert list(found["numbered"]) == [0, 1, (0, 1), None]
    assert [each.equal(two) for each in found["numbered"].values()] == [False, True, True, True]
    assert found["a"]["b"].equal(one)
    assert found["a.b"].equal(two)
    assert type(found["size"]) is torch.Size
    assert found["size"] == one.shape
    assert found["pair"]._fields == ("first", "second")
    assert found["pair"].second == 3
    assert found["proxy"]["x"].equal(two)
    assert found["most"].values.equal(one.max(1).values)
    assert found["most"].indices.equal(one.max(1).indices)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("dtype", [torch.complex32, torch.complex64, torch.complex128])
@pytest.mark.parametrize("view", [lambda each: each, torch.conj, torch.t])
def test_complex_numbers_of_every_width_come_back(dtype, view, tmp_path):
    real = torch.arange(12.0, dtype=torch.float64).reshape(2, 3, 2) / 8
    value = view(torch.view_as_complex(real).to(dtype))
    net = Gives(lambda _: [value, value.clone()])
    with capture(net, "") as acts:
        net(None)
    found = Activations.load(acts.save(tmp_path / "a.safetensors"))[""]
    expected = view(torch.view_as_complex(real))
    assert [each.dtype for each in found] == [dtype, dtype]
    assert all(torch.equal(each.to(torch.complex128), expected) for each in found)


def test_names_that_are_no_text_come_back(tmp_path):
    value = {"\udcff": torch.zeros(2), "a\0b": torch.ones(2), "\\udcff": torch.full((2,), 2.0)}
    net = Gives(lambda _: value)
    with capture(net, "") as acts:
        net(None)
    found = Activations.load(acts.save(tmp_path / "a.safetensors"))[""]
    assert {key: each.tolist() for key, each in found.items()} == {
        "\udcff": [0, 0],
        "a\0b": [1, 1],
        "\\udcff": [2, 2],
    }


def endless():
    found = [torch.zeros(1)]
    found.append(found)
    return found


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "`#0` is a nested Tensor of"),
        (lambda: torch.empty(2, device="meta"), "`#0` is a torch.strided Tensor of torch.float32 on meta"),
        (lambda: torch.masked.masked_tensor(torch.ones(2), torch.ones(2) > 0), "`#0` is a .* MaskedTensor"),
        (endless, "`#0` contains itself, or is nested too deeply"),
    ],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of")
def test_tensors_without_plain_memory_and_what_contains_itself_are_named(make, message, tmp_path):
    value = make()
    net = Gives(lambda _: value)
    with capture(net, "") as acts:
        net(None)
    with pytest.raises(ArchiveError, match=message):
        acts.save(tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_type_that_the_file_format_lacks_is_named(acts, tmp_path, monkeypatch):
    def lacks(*args, **kwargs):
        raise KeyError(torch.float8_e8m0fnu)

    monkeypatch.setattr(safetensors.torch, "save_file", lacks)
    with pytest.raises(ArchiveError, match=r"cannot write .*: torch\.float8_e8m0fnu"):
        acts.save(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header.pop("calls"),
        lambda header: header.update(calls=[1]),
        lambda header: header.update(selected=[1]),
        lambda header: header.update(selected=[]),
        lambda header: header["calls"].update(conv=[{"tensor": "elsewhere"}]),
        lambda header: header["calls"].update(conv=[{"tensor": ["x"]}]),
        lambda header: header["calls"].update(conv=[{"value": [1]}]),
        lambda header: header["calls"].update(conv=[{"code": "print()"}]),
        lambda header: header["calls"].update(conv=[{"named": {"name": "class", "fields": [], "items": []}}]),
        lambda header: header["calls"].update(conv=[{"complex": "elsewhere"}]),
        lambda header: header["calls"].update(conv=[{}]),
        lambda header: header["calls"].update(conv=7),
    ],
)
def test_a_damaged_header_is_refused_when_the_file_is_opened(acts, tmp_path, change):
    from safetensors import safe_open
    from safetensors.torch import save_file

    path = acts.save(tmp_path / "a.safetensors")
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["torchlens_viz"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no dict
    change(header)
    save_file(tensors, path, metadata={"torchlens_viz": json.dumps(header)})
    with pytest.raises(ArchiveError, match="its header is damaged; save the activations again"):
        Activations.load(path)


def test_pairs_that_are_none_are_damage(acts, tmp_path):
    from safetensors.torch import load_file, save_file

    path = acts.save(tmp_path / "a.safetensors")
    header = {"format": "torchlens_viz.activations/1", "selected": ["conv"]}
    header["calls"] = {"conv": [{"complex": "conv#1"}]}
    save_file(load_file(path), path, metadata={"torchlens_viz": json.dumps(header)})
    with pytest.raises(ArchiveError, match=r"`conv#1` is damaged: .*save the activations again"):
        Activations.load(path)["conv"]


def test_failure_to_write_leaves_the_old_file(acts, tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    path.write_text("old")

    def fail(*args, **kwargs):
        raise safetensors.SafetensorError("I/O error: no space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(ArchiveError, match="no space left"):
        acts.save(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_missing_safetensors_names_the_install_command(acts, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(
        MissingDependencyError, match=r"python -m pip install \"torchlens_viz\[safetensors\]\""
    ):
        acts.save(tmp_path / "a.safetensors")


def test_another_process_reads_the_same_values(acts, tmp_path):
    path = acts.save(tmp_path / "a.safetensors")
    code = (
        "from torchlens_viz import Activations\n"
        f"print(Activations.load({str(path)!r}).calls('conv')[0].sum().item())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) == acts.calls("conv")[0].sum().item()


# Names that look like what an archive makes of names itself.
KEYS = st.text("ab.#01/", min_size=1, max_size=4)
NESTED = st.recursive(
    st.integers(0, 99),  # the tensor that is filled with it
    lambda inner: st.one_of(
        st.dictionaries(st.one_of(KEYS, st.integers(0, 3)), inner, min_size=1, max_size=3),
        st.lists(inner, min_size=1, max_size=3),
        st.tuples(inner, inner),
    ),
    max_leaves=6,
)


def filled(value):
    if isinstance(value, dict):
        return {key: filled(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(filled, value))
    return torch.full((2,), float(value))


def assert_same(found, expected):
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for key, value in expected.items():
            assert_same(found[key], value)
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected, strict=True):
            assert_same(ours, theirs)
    else:
        assert torch.equal(found, expected)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.text("ab#01", min_size=1, max_size=4), NESTED, min_size=1, max_size=3))
def test_what_is_loaded_is_what_was_saved_whatever_its_keys_are_called(layers):
    values = {name: filled(value) for name, value in layers.items()}
    model = nn.ModuleDict({name: Gives(lambda given, value=value: value) for name, value in values.items()})
    with capture(model, "*") as acts:
        for module in model.values():
            module(None)
            module(None)
    with tempfile.TemporaryDirectory() as folder:
        acts.save(Path(folder) / "x.safetensors")
        loaded = Activations.load(Path(folder) / "x.safetensors")
        for name, value in values.items():
            for call in loaded.calls(name):
                assert_same(call, value)
            assert len(loaded.calls(name)) == 2


class Told(tuple):
    """A tuple that knows more than its items."""


def saved(path, value):
    """Return a file with what a layer called `a` put out."""
    net = nn.Sequential(OrderedDict(a=Gives(lambda _: value)))
    with capture(net, "a") as acts:
        net(torch.ones(1))
    return acts.save(path)


class Shared(nn.Module):
    def forward(self, x):
        return {"twice": [x, x], "again": (x, x[:1])}


def test_what_occurs_twice_is_one_tensor_again(tmp_path):
    net = Shared()
    with capture(net, "", io="both") as acts:
        net(torch.rand(2, 3))
    loaded = Activations.load(acts.save(tmp_path / "acts"))[""]
    taken, (one, other), (again, part) = loaded.input, loaded.output["twice"], loaded.output["again"]
    assert one is other is again
    assert torch.equal(part, one[:1])
    assert torch.equal(taken, one)


@pytest.mark.parametrize(
    "value",
    [
        np.float32(0.1),
        np.float64(0.1),
        np.int64(-3),
        np.uint8(7),
        np.bool_(True),
        np.float16(0.5),
        np.float32("nan"),
    ],
    ids=repr,
)
def test_numbers_of_numpy_come_back_as_they_are(tmp_path, value):
    found = Activations.load(saved(tmp_path / "acts", (torch.ones(1), value)))["a"][1]
    assert type(found) is type(value)
    assert str(found) == str(value)


def test_what_knows_more_than_its_items_is_refused(tmp_path):
    told = Told([torch.ones(1)])
    saved(tmp_path / "acts", told)
    told.scale = torch.ones(2)
    with pytest.raises(ArchiveError, match="`a#0` is a Told with `scale` beside its items"):
        saved(tmp_path / "acts", told)
    saved(tmp_path / "acts", OrderedDict(a=torch.ones(1)))


@pytest.mark.parametrize(
    "packed",
    [
        {"numpy": ["int8", 300]},
        {"numpy": ["uint8", -1]},
        {"numpy": ["int64", 0.5]},
        {"numpy": ["object", 1]},
        {"numpy": ["int64"]},
        {"size": [{"value": 10**30}]},
        {"size": [{"value": True}]},
    ],
    ids=str,
)
def test_numbers_that_are_none_are_damage(tmp_path, packed):
    header = {"format": "torchlens_viz.activations/1", "selected": ["a"], "calls": {"a": [packed]}}
    write_safetensors(tmp_path / "acts", {"t": torch.ones(1)}, header, what="activations")
    with pytest.raises(ArchiveError, match="header is damaged"):
        Activations.load(tmp_path / "acts")
