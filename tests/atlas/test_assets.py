"""Pages that would be too large, and pictures as files beside a page."""

from __future__ import annotations

import base64
import re
from urllib.parse import unquote

import pytest
from torch import nn

import torchlens_viz as tv
from tests.atlas import pages
from tests.atlas.conftest import photograph
from tests.atlas.pages import IMAGE
from torchlens_viz.errors import InvalidArgumentError, PictureError
from torchlens_viz.files import paths


def test_a_page_that_would_be_too_large_is_refused_and_nothing_written(tmp_path):
    with pytest.raises(
        InvalidArgumentError, match=r"would have 0\.\d MB, and `max_bytes` allows 0\.0 MB; .*`--assets DIR`"
    ):
        tv.report(pages.classifier(), IMAGE, tmp_path / "page.html", max_bytes=1000)
    assert list(tmp_path.iterdir()) == []


def test_with_assets_the_page_holds_no_picture(tmp_path):
    (inline, page), folder = (tmp_path / "in.html", tmp_path / "page.html"), tmp_path / "its pictures (1)"
    tv.report(pages.classifier(), IMAGE, inline)
    tv.report(pages.classifier(), IMAGE, page, assets=folder, max_bytes=inline.stat().st_size - 1)
    found, text = {each.name: each.read_bytes() for each in folder.iterdir()}, page.read_text("utf-8")
    asked = set(re.findall(r'(?:url\(|src=")(its%20pictures%20%281%29/[^)"]*)', text))
    assert {unquote(each).partition("/")[2] for each in asked} == set(found)
    assert "data:" not in text
    within = re.findall(r"data:image/\w+;base64,([A-Za-z0-9+/=]*)", inline.read_text("utf-8"))
    assert {base64.b64decode(each) for each in within} == set(found.values())


def test_a_page_that_is_too_large_even_so_is_refused(tmp_path):
    with pytest.raises(InvalidArgumentError, match=r"allows 0\.0 MB; show fewer images"):
        tv.report(pages.classifier(), IMAGE, tmp_path / "p.html", assets=tmp_path / "a", max_bytes=1000)
    assert list(tmp_path.iterdir()) == []


def test_names_of_files_are_safe(tmp_path):
    net = nn.Sequential()
    for name in ("a/b", "A/b", "nul", "x" * 300, "\ud800 \n'\"()"):
        net.add_module(name, nn.Conv2d(3, 3, 1))
    folder = tmp_path / "deep" / "assets"
    page = tv.report(
        net.eval(), {pages.FILE: photograph(), "../../up.png": IMAGE}, tmp_path / "p.html", assets=folder
    )
    names = [each.name for each in folder.iterdir()]
    assert len(names) > 10
    assert all(re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,160}", each) for each in names)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["deep", "p.html"]
    assert "deep/assets/a_b-maps-" in page.read_text("utf-8", "surrogatepass")


def test_what_fails_half_way_leaves_nothing_behind(tmp_path, monkeypatch):
    page, folder = tmp_path / "page.html", tmp_path / "new" / "assets"
    written, real = [], paths.write_whole

    def write(path, data, error):
        if len(written) == 3:
            raise PictureError("the disk is full")
        written.append(path)
        real(path, data, error)

    monkeypatch.setattr(paths, "write_whole", write)
    with pytest.raises(PictureError, match="the disk is full"):
        tv.report(pages.classifier(), IMAGE, page, assets=folder)
    assert len(written) == 3
    assert list(tmp_path.iterdir()) == []


def test_a_page_that_was_there_keeps_its_pictures_when_the_next_fails(tmp_path, monkeypatch):
    page, folder = tmp_path / "page.html", tmp_path / "assets"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    net = pages.classifier()
    tv.report(net, IMAGE, page, assets=folder)
    before = {each: each.read_bytes() for each in (page, *folder.iterdir())}
    real = paths.write_whole

    def write(path, data, error):
        if path == page:
            raise PictureError("the disk is full")
        real(path, data, error)

    monkeypatch.setattr(paths, "write_whole", write)
    net[0].weight.data += 1
    with pytest.raises(PictureError, match="the disk is full"):
        tv.report(net, IMAGE, page, assets=folder)
    assert {each: each.read_bytes() for each in (page, *folder.iterdir())} == before


def test_assets_that_are_no_folder_are_refused_before_anything_runs(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PictureError, match="`assets` must name a folder, got the file "):
        tv.report(nn.Conv2d(3, 1, 1), IMAGE, tmp_path / "p.html", assets=tmp_path / "file")
    with pytest.raises(PictureError, match=r"`assets` must name a folder that can be .*Not a directory"):
        tv.report(nn.Conv2d(3, 1, 1), IMAGE, tmp_path / "p.html", assets=tmp_path / "file" / "in")
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
