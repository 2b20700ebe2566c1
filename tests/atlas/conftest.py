"""A headless browser that reaches nothing but files, and pages to open in it."""

from __future__ import annotations

import os
import shutil
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image

import torchlens_viz as tv
from tests.atlas import pages

REQUIRED = "TORCHLENS_VIZ_BROWSER"  # set where a test without a browser is a failure
ARGUMENTS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
)


def missing(what):
    if os.environ.get(REQUIRED):
        pytest.fail(f"{what} is missing, and {REQUIRED} is set")
    pytest.skip(f"{what} is missing")


@pytest.fixture(scope="module")
def browser():
    binary = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if binary is None:
        missing("chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("playwright")
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=binary, args=ARGUMENTS.split())
        yield found
        found.close()


class Opened:
    """A page in the browser, and all that went wrong or out in it."""

    def __init__(self, tab):
        self.tab, self.said, self.requests = tab, [], []
        tab.on("console", lambda message: self.said.append(message.text))
        tab.on("pageerror", lambda error: self.said.append(str(error)))
        tab.on("dialog", lambda dialog: (self.said.append(f"dialog {dialog.message}"), dialog.dismiss()))
        tab.on("request", lambda request: self.requests.append(request.url))

    @property
    def asked_for(self):
        return [url for url in self.requests if not url.startswith("data:")]


@pytest.fixture
def opened(browser):
    """Open a file: `with opened(path, "#anchor", width=375) as page`."""

    @contextmanager
    def open_file(path, anchor="", *, width=1280, height=900, **options):
        context = browser.new_context(viewport={"width": width, "height": height}, offline=True, **options)
        page = Opened(context.new_page())
        page.tab.goto(path.as_uri() + anchor)
        try:
            yield page
        finally:
            context.close()

    return open_file


def photograph(seed=0, size=(48, 32)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR)


@pytest.fixture(scope="session")
def hostile_page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    photograph().save(folder / pages.FILE)
    return tv.report(
        pages.hostile(),
        [folder / pages.FILE],
        folder / "page.html",
        names=[pages.CLASS, "bee", "cow"],
        targets=[0],
        title=pages.TITLE,
        about=pages.ABOUT,
    )


@pytest.fixture(scope="session")
def wide_page(tmp_path_factory):
    """A page of which most channels have no entry of their own."""
    folder = tmp_path_factory.mktemp("wide")
    options = {"explain": False, "max_channels": 64, "projections": 0}
    return tv.report(pages.wide(), {"photograph": photograph()}, folder / "page.html", **options)


@pytest.fixture(scope="session")
def worth_page(tmp_path_factory):
    """A page with effects of channels, and another network beside its own."""
    import torch

    net, other = pages.classifier(), pages.classifier()
    other[3].weight.data[2] += 0.5
    images = torch.rand(12, 3, 24, 32, generator=torch.Generator().manual_seed(3))
    found = tv.survey(
        net, [(images, torch.tensor([0, 1, 2] * 4))], ["0", "3"], loss="cross_entropy", progress=False
    )
    return tv.report(
        net,
        {"image": photograph()},
        tmp_path_factory.mktemp("worth") / "page.html",
        survey=found,
        comparison=tv.compare(net, other, [images]),
        max_channels=5,
    )


@pytest.fixture(scope="session")
def split_page(tmp_path_factory):
    """A page whose pictures lie beside it, with hostile names of layers, images, and of the folder itself."""
    folder = tmp_path_factory.mktemp("split")
    (folder / "reports").mkdir()
    return tv.report(
        pages.hostile(),
        {pages.FILE: photograph(), "../up": photograph(3)},
        folder / "reports" / "page.html",
        assets=folder / "reports" / "it's (a) #folder? 100%",
    )


@pytest.fixture(scope="session")
def signed_page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("signed")
    red = np.zeros((16, 16, 3), np.uint8)
    red[..., 0] = 255
    return tv.report(pages.signed(), {"red": Image.fromarray(red)}, folder / "page.html")


@pytest.fixture(scope="session")
def usual_page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("usual")
    images = {"first.png": photograph(1), "second.png": photograph(2)}
    net = pages.classifier()
    found = tv.survey(net, [tv_input(each) for each in images.values()], "0", top_k=2, progress=False)
    driven = tv.maximize(net, "0", [1, 5], size=16, steps=6)
    return tv.report(
        net,
        images,
        folder / "page.html",
        survey=found,
        source=[tv_input(each)[0] for each in images.values()],
        maximized=driven,
        names=["ant", "bee", "cow"],
        targets=[2, 1],
    )


def tv_input(image):
    import torch

    return torch.from_numpy(np.array(image)).movedim(2, 0)[None] / 255


@pytest.fixture
def written(tmp_path):
    def write(model, images, **options):
        return tv.report(model, images, tmp_path / "page.html", **options).read_text("utf-8")

    return write
