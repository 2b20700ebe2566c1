"""What a release says of itself: one version, what was tested, and a page that a package index can show."""

from __future__ import annotations

import configparser
import email
import os
import re
import runpy
import shutil
import subprocess
import sys
from email.message import Message
from pathlib import Path

import pytest

import torchlens_viz

ROOT = Path(torchlens_viz.__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
ADDRESS = re.compile(r"\]\(([^)\s]+)\)")


def test_the_version_is_told_in_one_place():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert setup["metadata"]["version"] == "attr: torchlens_viz.__version__"
    assert f"\nversion: {torchlens_viz.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {torchlens_viz.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_everything_that_is_no_python_is_packaged():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    package = ROOT / "torchlens_viz"
    told = setup["options.package_data"]["torchlens_viz"].split()
    found = {path for pattern in told for path in package.glob(pattern)}
    there = {
        path for path in package.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc", ".md")
    }
    assert found == there


def metadata_of(folder: Path, url: str) -> Message:
    """What a package index is told of the project, with this address of its repository."""
    pytest.importorskip("setuptools", minversion="77")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    setup = (ROOT / "setup.cfg").read_text("utf-8")
    (folder / "setup.cfg").write_text(setup.replace("[metadata]", f"[metadata]\nurl = {url}", 1), "utf-8")
    shutil.copytree(
        ROOT / "torchlens_viz", folder / "torchlens_viz", ignore=shutil.ignore_patterns("__pycache__")
    )
    code = "from setuptools.build_meta import prepare_metadata_for_build_wheel as p; p('out')"
    (folder / "out").mkdir()
    environment = os.environ | {"PYTHONPATH": ""}
    subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, check=True, capture_output=True)
    (path,) = folder.glob("out/*.dist-info/METADATA")
    return email.message_from_bytes(path.read_bytes())


def test_once_the_repository_has_an_address_a_package_index_shows_pictures_and_links(tmp_path):
    about = metadata_of(tmp_path, "https://example.org/lens")
    assert about["Version"] == torchlens_viz.__version__
    assert about["Description-Content-Type"] == "text/markdown"
    page = about.get_payload(decode=True).decode("utf-8")
    assert "(https://example.org/lens/raw/HEAD/docs/images/kernels_beside_maps.png)" in page
    assert "(https://example.org/lens/blob/HEAD/docs/capture.md)" in page
    assert all(address.startswith("https://") for address in ADDRESS.findall(page))
    assert re.sub(r"https://example.org/lens/(raw|blob)/HEAD/", "", page).strip() == README.strip()


def test_a_project_without_an_address_keeps_the_readme_as_it_is():
    absolute = runpy.run_path(str(ROOT / "setup.py"))["absolute"]
    assert absolute(README, None) == README
    assert absolute("a[0](b), ![x](y/z.png) [q](https://r.org/s.md)", "u") == (
        "a[0](u/blob/HEAD/b), ![x](u/raw/HEAD/y/z.png) [q](https://r.org/s.md)"
    )


def test_every_file_that_the_readme_leads_to_is_there():
    files = [address for address in ADDRESS.findall(README) if "://" not in address]
    assert len(files) > 20
    assert [file for file in files if not (ROOT / file).is_file()] == []


def test_the_classifiers_are_the_python_versions_that_are_tested():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    told = re.findall(r"Python :: (\d\.\d+)", setup["metadata"]["classifiers"])
    assert told == re.findall(r"interpreter (\d\.\d+)", (ROOT / ".ci" / "versions").read_text("utf-8"))
    assert setup["options"]["python_requires"] == f">={told[0]}"


@pytest.mark.skipif(os.name == "nt", reason="a script of bash")
@pytest.mark.parametrize(
    ("end", "words"),
    [("newest", r"Python 3\.13 is missing: .* PYTHON313"), ("middle", "there are the ends .* got middle")],
)
def test_a_missing_interpreter_is_said_in_one_line_before_anything_starts(end, words, tmp_path):
    environment = os.environ | {"PYTHON313": str(tmp_path / "python"), "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [ROOT / ".ci" / "versions", end], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert re.fullmatch(words + r"\n", done.stderr)
    assert (done.stdout, list(tmp_path.iterdir())) == ("", [])
