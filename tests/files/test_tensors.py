"""Tensors in files: they come back, and what is damaged or no file is refused; checksums tell them apart."""

from __future__ import annotations

import io
import json
import os
import stat
import sys
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from torchlens_viz.errors import ArchiveError
from torchlens_viz.files.tensors import (
    SafetensorsFile,
    checksum,
    read_npz,
    require_same_settings,
    require_tensors,
    require_values,
    write_npz,
    write_safetensors,
)


def test_a_checksum_tells_values_of_every_type_apart():
    values = torch.rand(3, 4)
    assert checksum(values) == checksum(values.clone())
    assert checksum(values) == checksum(values.t().contiguous().t())
    changed = values.clone()
    changed[1, 2] += 1e-7
    assert checksum(values) != checksum(changed)
    assert checksum(None) == checksum(torch.zeros(0))
    for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool):
        assert isinstance(checksum(torch.ones(3).to(dtype)), int)
    model = nn.BatchNorm2d(3)
    before = checksum(model)
    model(torch.rand(2, 3, 4, 4))
    assert checksum(model) != before  # buffers count


def test_npz_comes_back_and_numpy_reads_it(tmp_path):
    values = {
        "a": torch.rand(2, 3),
        "b": torch.arange(3),
        "empty": torch.zeros(0, 2),
        "one": torch.tensor(2.0),
    }
    write_npz(tmp_path / "x.npz", values, {"k": [1, None]})
    tensors, header = read_npz(tmp_path / "x.npz", remedy="")
    assert header == {"k": [1, None]}
    assert list(tensors) == list(values)
    with np.load(tmp_path / "x.npz") as file:
        for name, tensor in tensors.items():
            assert tensor.equal(values[name])
            assert np.array_equal(file[name], tensor.numpy())
    np.savez(
        tmp_path / "f.npz", told=np.frombuffer(b"{}", np.uint8), a=np.asfortranarray(values["a"].numpy())
    )
    assert read_npz(tmp_path / "f.npz", remedy="")[0]["a"].equal(values["a"])


def npy(shape, dtype=np.float32, data=b"\0" * 8):
    """An array as .npy whose header may say anything."""
    buffer = io.BytesIO()
    descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
    np.lib.format.write_array_header_1_0(buffer, {"descr": descr, "fortran_order": False, "shape": shape})
    return buffer.getvalue() + data


@pytest.mark.parametrize(
    ("name", "content", "options"),
    [
        ("a.npy", npy((10**12,)), {}),  # 3.6 TiB, were they allocated
        ("a.npy", npy((3,)), {}),
        ("a.npy", npy((-2,)), {}),
        ("a.npy", npy((1,), np.object_), {}),
        ("a.npy", b"\x93NUMPY\x07\0", {}),
        ("a.npy", npy((2**20,), np.uint8, bytes(2**20)), {"compress_type": zipfile.ZIP_DEFLATED}),
        ("told.npy", npy((2,), np.uint8, b"[]"), {}),
        ("told.npy", npy((2,), np.uint8, b"{x"), {}),
        ("told.npy", npy((20000,), np.uint8, b"[" * 20000), {}),
    ],
)
def test_what_is_no_npz_of_ours_is_refused_before_it_takes_memory(tmp_path, name, content, options):
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        if name != "told.npy":
            archive.writestr("told.npy", npy((2,), np.uint8, b"{}"))
        archive.writestr(name, content, **options)
    with pytest.raises(ArchiveError, match=r"cannot read .*x\.npz.*; try another"):
        read_npz(tmp_path / "x.npz", remedy="try another")


@pytest.mark.parametrize(
    "read", [lambda path: read_npz(path, remedy=""), lambda path: SafetensorsFile(path, format="f", what="x")]
)
def test_pipes_devices_and_folders_are_refused_at_once(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    for path, kind in ((tmp_path / "pipe", "pipe"), ("/dev/zero", "device"), (tmp_path, "folder")):
        with pytest.raises(ArchiveError, match=rf"{kind}.* and no file"):
            read(path)
    with pytest.raises(ArchiveError, match="No such file"):
        read(tmp_path / "none")
    with pytest.raises(ArchiveError, match="null"):
        read("a\0b")


def test_safetensors_come_back_apart(tmp_path):
    """Tensors that share memory, transposed ones, and a header."""
    base = torch.rand(4, 4)
    values = {"all": base, "row": base[1], "turned": base.T}
    write_safetensors(tmp_path / "x.safetensors", values, {"format": "f/1", "k": {"a": 1}}, what="things")
    file = SafetensorsFile(tmp_path / "x.safetensors", format="f/1", what="things")
    assert file.header["k"] == {"a": 1}
    assert file.names == set(values)
    for name, tensor in values.items():
        assert file.tensor(name).equal(tensor)
    with pytest.raises(ArchiveError, match="holds no things in the format 'f/2'"):
        SafetensorsFile(tmp_path / "x.safetensors", format="f/2", what="things")


def test_other_settings_are_named(tmp_path):
    require_same_settings({"a": [1, 2]}, {"a": (1, 2)}, tmp_path)
    for before, now in (({"a": 1}, {"a": 2}), ({"a": 1}, {}), ({}, {"a": 2})):
        with pytest.raises(ArchiveError, match=r"same settings: in .* `a` was .* and now is"):
            require_same_settings(before, now, tmp_path)
    with pytest.raises(ArchiveError, match="cannot read the settings"):
        require_same_settings(json.loads("[]"), {}, tmp_path)


def test_views_that_show_other_numbers_than_they_hold_come_back_as_they_show(tmp_path):
    conjugate, negative = torch.randn(3, dtype=torch.cfloat).conj(), torch._neg_view(torch.rand(2, 2))
    values = {"conjugate": conjugate, "negative": negative}
    write_safetensors(tmp_path / "x.safetensors", values, {"format": "f/1"}, what="things")
    file = SafetensorsFile(tmp_path / "x.safetensors", format="f/1", what="things")
    for name, tensor in values.items():
        assert torch.equal(file.tensor(name), tensor)


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX permissions")
@pytest.mark.parametrize(("umask", "expected"), [(0o022, 0o644), (0o077, 0o600)])
def test_archives_have_the_permissions_that_open_gives(tmp_path, umask, expected):
    before = os.umask(umask)
    try:
        path = write_safetensors(
            tmp_path / "x.safetensors", {"a": torch.ones(2)}, {"format": "f/1"}, what="x"
        )
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == expected


def test_entries_that_share_the_bytes_of_others_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("told.npy", npy((2,), np.uint8, b"{}"))
        archive.writestr("a.npy", npy((2**16,), np.uint8, bytes(2**16)))
        # As many names for the same bytes as there is room for in the directory.
        archive.filelist += [archive.getinfo("a.npy")] * 100
    with pytest.raises(ArchiveError, match=r"its entries overlap, or are longer than the file; try another"):
        read_npz(tmp_path / "x.npz", remedy="try another")


TENSORS = {"images": torch.rand(2, 3, 4), "means": torch.rand(2, 5)}
WANTED = {"images": (torch.float32, "KHW"), "means": (torch.float32, "KM")}


def test_tensors_as_they_are_wanted_tell_their_sizes():
    assert require_tensors(TENSORS, WANTED) == {"K": 2, "H": 3, "W": 4, "M": 5}


@pytest.mark.parametrize(
    ("change", "sizes", "message"),
    [
        ({"means": None}, {}, "`means` is missing"),
        ({"means": [1.0]}, {}, "`means` is missing"),
        ({"means": torch.rand(2, 5).double()}, {}, r"`means` must be torch.float32 \(K, M\) with K = 2, got"),
        ({"means": torch.rand(3, 5)}, {}, r"\(K, M\) with K = 2, got torch.float32 \(3, 5\)"),
        ({"means": torch.rand(2)}, {}, r"\(K, M\) with K = 2, got torch.float32 \(2,\)"),
        ({}, {"W": 5}, r"`images` must be torch.float32 \(K, H, W\) with K = 2, H = 3, W = 5, got"),
    ],
)
def test_tensors_of_other_types_and_shapes_are_named(change, sizes, message):
    with pytest.raises(ValueError, match=message):
        require_tensors({**TENSORS, **change}, WANTED, sizes)


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (None, "it must tell a, b, and tells nothing of that kind"),
        ({"a": 1}, "it must tell a, b, and tells a"),
        ({"a": 1, "b": 1.0, "c": 1}, "it must tell a, b, and tells a, b, c"),
        ({"a": True, "b": 1.0}, "`a` must be int"),
        ({"a": 2**63, "b": 1.0}, "`a` must be int"),
        ({"a": 1, "b": "x"}, "`b` must be float or NoneType"),
        ({"a": 1, "b": 10**400}, "`b` must be float or NoneType"),
    ],
)
def test_told_values_of_other_types_are_named(told, message):
    with pytest.raises(ValueError, match=message):
        require_values(told, {"a": int, "b": (float, type(None))})


def test_told_values_as_they_are_wanted_pass():
    for told in ({"a": 1, "b": 1.5}, {"a": 0, "b": 2}, {"a": -1, "b": None}):
        assert require_values(told, {"a": int, "b": (float, type(None))}) is told


def test_a_checksum_tells_values_of_every_layout_apart_and_meta_by_shape():
    eye = torch.eye(3)
    kinds = {
        "dense": lambda t: t,
        "sparse": lambda t: t.to_sparse(),
        "half": lambda t: t.half(),
        "float8": lambda t: t.to(torch.float8_e4m3fn),
        "complex": lambda t: (t + 1j * t).conj(),
        "negative": lambda t: (t + 1j * t).conj().imag,
        "bool": lambda t: t.bool(),
        "number": lambda t: t[1, 1],
    }
    for name, make in kinds.items():
        assert checksum(make(eye)) == checksum(make(eye.clone())) != checksum(make(0 * eye)), name
    assert checksum(kinds["sparse"](eye)) == checksum(eye)
    assert checksum(eye.to("meta")) == checksum(0 * eye.to("meta")) != checksum(torch.ones(4, device="meta"))
    assert checksum(torch.empty(0)) == checksum(torch.empty(0, 3))
