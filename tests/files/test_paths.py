"""File names from layer names: plain, distinct, and inside the folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchlens_viz.errors import PictureError
from torchlens_viz.files.paths import require_writable, safe_name, safe_names, write_together, write_whole


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("features.0", "features.0"),
        ("a/b", "a_b"),
        ("../x", "___x"),
        ("..", "__"),
        (".hidden", "_hidden"),
        ("trailing.", "trailing_"),
        ("", "_"),
        ("a b\\c:d*e\n\0", "a_b_c_d_e__"),
        ("Größe", "Gr__e"),
        ("con", "_con"),
        ("NUL.0", "_NUL.0"),
        ("lpt1", "_lpt1"),
        ("conv", "conv"),
    ],
)
def test_names_become_plain_file_names(name, expected):
    assert safe_name(name) == expected


def test_long_names_are_cut_and_stay_apart():
    first, second = safe_name("layer." * 100 + "a"), safe_name("layer." * 100 + "b")
    assert first != second
    assert len(first) == len(second) == 120
    assert first.startswith("layer.layer.")


def test_colliding_names_are_numbered_and_exact_ones_keep_their_form():
    assert safe_names(["a/b", "a_b", "A_B", "a_b-2", "c"]) == ["a_b-4", "a_b", "A_B-3", "a_b-2", "c"]
    assert safe_names(["x", "x", "x"]) == ["x", "x-2", "x-3"]
    assert safe_names([]) == []


@given(
    st.lists(
        st.text(max_size=200) | st.sampled_from(["a/b", "a_b", "A_b", "nul", "..", "a_b-2"]), max_size=12
    )
)
def test_every_list_of_names_becomes_distinct_files_inside_the_folder(names):
    cleaned = safe_names(names)
    assert len(cleaned) == len(names)
    assert len({name.lower() for name in cleaned}) == len(names)
    for name in cleaned:
        assert 0 < len(name) <= 130
        assert name.isascii()
        assert Path(f"{name}.png").name == f"{name}.png"
        assert not name.startswith(".")
        assert not name.endswith(".")


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_what_a_killed_writer_left_is_removed_by_the_next_one_and_no_more(tmp_path):
    program = (
        "import os, pathlib, signal, sys\n"
        "from torchlens_viz.errors import PictureError\n"
        "from torchlens_viz.files.paths import replacing\n"
        "with replacing(sys.argv[1], PictureError) as temporary:\n"
        "    temporary.write_bytes(b'half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "a.png")], check=False)
    (left,) = tmp_path.iterdir()
    assert left.read_bytes() == b"half"
    alive = tmp_path / left.name.replace(left.name.split("-")[3], str(os.getppid()))
    elsewhere = tmp_path / left.name.replace(left.name.split("-")[2], "0" * 8)
    for other in (alive, elsewhere):  # a writer that is still at it, and one on another machine
        other.write_bytes(b"under way")
    write_whole(tmp_path / "b.png", b"whole", PictureError)
    assert sorted(tmp_path.iterdir()) == sorted([alive, elsewhere, tmp_path / "b.png"])


def test_files_are_written_together_or_not_at_all(tmp_path):
    (tmp_path / "old").write_bytes(b"old")
    (tmp_path / "folder").mkdir()
    files = {tmp_path / "old": b"new", tmp_path / "deep" / "er" / "a": b"a", tmp_path / "folder": b"no file"}
    with pytest.raises(PictureError, match="must name a file, got the folder"):
        write_together(files, PictureError)
    assert sorted(each.name for each in tmp_path.rglob("*")) == ["folder", "old"]
    del files[tmp_path / "folder"]
    write_together(files, PictureError)
    assert {path: path.read_bytes() for path in files} == files


@pytest.mark.parametrize(
    ("kind", "path", "told"),
    [
        ("folder", "file", "`out` must name a folder, got the file '.*file'; choose another name"),
        (
            "folder",
            "file/in",
            "`out` must name a folder that can be written, .*Not a directory; choose a path",
        ),
        ("folder", "/proc/new/deep", "`out` must name a folder that can be written, "),
        ("folder", "a" * 300, "too long"),
        ("folder", "a\0b", "null"),
        ("file", "folder", "`out` must name a file, got the folder '.*folder'; append a file name"),
        ("file", "file/in", "`out` must name a file that can be written, .*Not a directory; choose"),
        ("file", "/proc/new.png", "`out` must name a file that can be written, "),
        ("file", "/dev/full", "which is no regular file"),
        ("file", "a" * 300, "too long"),
        ("file", "a\0b", "null"),
        ("file", "loop/x", "symbolic links"),
    ],
)
def test_a_place_where_nothing_can_be_written_is_refused_before_there_is_anything(tmp_path, kind, path, told):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(PictureError, match=told):
        require_writable(tmp_path / path, "out", kind, PictureError)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file", "folder", "loop"]


@pytest.mark.parametrize(
    ("kind", "path"), [("folder", "folder"), ("folder", "new/deep"), ("file", "file"), ("file", "new/deep")]
)
def test_a_place_where_something_can_be_written_is_left_as_it_is(tmp_path, kind, path):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "folder").mkdir()
    require_writable(tmp_path / path, "out", kind, PictureError)
    assert sorted(each.name for each in tmp_path.rglob("*")) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "kept"
