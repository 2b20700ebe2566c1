"""What a release says of itself: one version, everywhere."""

from __future__ import annotations

import configparser
from pathlib import Path

import torchlens_viz

ROOT = Path(torchlens_viz.__file__).parents[1]


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
