"""The pages of the docs: every Python block runs, links lead somewhere, what is made is up to date.

The blocks of a page run one after the other, as a reader would run them; what a page takes for granted
stands in `GIVEN`. Nothing is downloaded.
"""

from __future__ import annotations

import doctest
import importlib.util
import inspect
import re
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torchvision
from PIL import Image
from torch import nn

import torchlens_viz
from tests.test_readme import prelude
from torchlens_viz.testing.baseline import ActivationRegression

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = sorted(path.stem for path in DOCS.glob("*.md"))
Names = dict[str, Any]


def module_at(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_pages = module_at(DOCS / "make_pages.py")


# What pages take for granted.


class Answers(nn.Module):
    """A network whose answer is a dict, or a list of boxes."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.backbone = nn.ModuleDict({"body": nn.ModuleDict({"layer4": nn.Conv2d(3, 16, 3, padding=1)})})

    def forward(self, images: torch.Tensor) -> Any:
        maps = self.backbone["body"]["layer4"](images).relu()
        if self.kind == "out":
            return {"out": maps}
        if self.kind == "logits":
            return {"logits": maps.mean((2, 3))}
        return [{"scores": each.flatten().sort(descending=True).values} for each in maps]


def for_explain(_: pytest.MonkeyPatch) -> Names:
    mask = torch.zeros(28, 28)
    mask[:9, :9] = 1
    return {
        "model": Answers("logits").eval(),
        "deeplab": Answers("out").eval(),
        "fcos": Answers("scores").eval(),
        "mask": mask,
    }


def for_gallery(monkeypatch: pytest.MonkeyPatch) -> Names:
    import skimage.data

    script = module_at(ROOT / "examples" / "make_gallery.py")
    own = {name: value for name, value in vars(script).items() if not name.startswith("__")}
    return {**own, "Image": Image, "skimage": skimage, "channels": [0, 1], "lr": 0.1}


def for_maximize(monkeypatch: pytest.MonkeyPatch) -> Names:
    small = partial(torchlens_viz.maximize, size=16, steps=3)  # a climb of seconds, not of minutes
    monkeypatch.setattr(torchlens_viz, "maximize", small)
    return {}


def for_monitor(monkeypatch: pytest.MonkeyPatch) -> Names:
    pytest.importorskip("tensorboard")
    lightning = pytest.importorskip("lightning")
    from lightning.pytorch.loggers import TensorBoardLogger

    given = prelude("trains")
    optimiser = torch.optim.SGD(given["model"].parameters(), 1e-3)
    return {
        **given,
        "optimiser": optimiser,
        "criterion": nn.CrossEntropyLoss(),
        "Trainer": partial(lightning.Trainer, max_steps=1, accelerator="cpu", enable_progress_bar=False),
        "TensorBoardLogger": TensorBoardLogger,
    }


def for_survey(monkeypatch: pytest.MonkeyPatch) -> Names:
    from torch import distributed
    from torch.utils.data import DataLoader, DistributedSampler

    found = torchlens_viz.survey
    given = prelude("")
    for name, value in (("RANK", 0), ("WORLD_SIZE", 1), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", 0)):
        monkeypatch.setenv(name, str(value))
    images = given["images"]
    return {
        "model": given["model"],
        "data": images,
        "dataset": images,
        "dist": distributed,
        "DataLoader": DataLoader,
        "DistributedSampler": DistributedSampler,
        "_found": lambda: found(given["model"], images.split(16), "features.10", top_k=2, progress=False),
    }


def for_layers(_: pytest.MonkeyPatch) -> Names:
    model = torchvision.models.resnet18(weights=None).eval()
    return {"tv": torchlens_viz, "model": model, "image": torch.rand(1, 3, 64, 64)}


def for_project(_: pytest.MonkeyPatch) -> Names:
    given = prelude("")
    images = given["images"][:8]
    return {
        "image": given["photograph"],
        "preprocess": given["to_tensor"],
        "dataset": images,
        "loader": images.split(4),
    }


def for_testing(_: pytest.MonkeyPatch) -> Names:
    given = prelude("trains")
    optimiser = torch.optim.SGD(given["model"].parameters(), 1e-3)
    return {**given, "optimiser": optimiser, "criterion": nn.CrossEntropyLoss()}


GIVEN: dict[str, Callable[[pytest.MonkeyPatch], Names]] = {
    "explain": for_explain,
    "gallery": for_gallery,
    "how-to": for_maximize,
    "layers": for_layers,
    "maximize": for_maximize,
    "monitor": for_monitor,
    "project": for_project,
    "survey": for_survey,
    "testing": for_testing,
}


def blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def run(block: str, names: Names, page: str) -> None:
    if ">>>" in block:
        test = doctest.DocTestParser().get_doctest(block, names, page, page, 0)
        flags = doctest.IGNORE_EXCEPTION_DETAIL | doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        runner = doctest.DocTestRunner(optionflags=flags, verbose=False)
        out: list[str] = []
        runner.run(test, out=out.append, clear_globs=False)
        assert not runner.failures, "".join(out)
        names.update(test.globs)
        return
    exec(compile(block, f"{page}.md", "exec"), names)


@pytest.fixture
def _elsewhere(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    load = torchvision.models.get_model

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a page must not download anything")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    assert load


@pytest.mark.slow
@pytest.mark.usefixtures("_elsewhere")
@pytest.mark.parametrize("page", [page for page in PAGES if page != "reference"])
def test_every_python_block_of_a_page_runs(page, monkeypatch, activations):
    text = (DOCS / f"{page}.md").read_text("utf-8")
    given = GIVEN.get(page, lambda _: {})(monkeypatch)
    names = {**prelude(page), **given}
    for place, block in enumerate(blocks(text)):
        before_block(page, place, block, names)
        run(block, names, page)
        for name in [name for name in names if name.startswith("test_")]:
            check = names.pop(name)
            wanted = list(inspect.signature(check).parameters)
            for overwrite in (True, False):  # a baseline is written, and then compared with
                baseline = ActivationRegression(Path("baselines"), name, overwrite=overwrite)
                check(*[activations, baseline][: len(wanted)])
    after_page(names)


def before_block(page: str, place: int, block: str, names: Names) -> None:
    """Give what stands between the blocks of a page: in its prose, or in the script that it names."""
    if page == "survey" and "found.grid(" in block:
        names["found"] = names["_found"]()
    if page == "testing" and "criterion" in block:
        head = {"flat": nn.Flatten(), "out": nn.LazyLinear(16)}
        layers = OrderedDict({"conv": nn.Conv2d(3, 32, 3), "relu": nn.ReLU(), **head})
        names["net"], names["step"] = nn.Sequential(layers), 3
        names["labels"] = torch.arange(32) % 16
    if page == "monitor" and "monitor.watch" in block:
        names["monitor"] = torchlens_viz.Monitor(names["model"], "runs/watched", every=1)
        names["watched"] = names["monitor"]
        names["step"] = 0
    if page == "monitor" and "callbacks.transformers" in block:  # what it does there is tested beside it
        pytest.importorskip("transformers")
        names["Trainer"] = lambda *_, **__: SimpleNamespace(train=lambda: None)
        names["arguments"] = names["data"] = None
    if page == "gallery" and "+Inf, -Inf" in block:
        names["maps"] = torch.randn(1, 4, 12, 12)
    if page == "gallery" and block.startswith("maximize("):
        names["net"], names["channels"] = names["load_demo_net"](), [0]


def after_page(names: Names) -> None:
    if "monitor" in names:
        names["watched"].close()
        names["monitor"].step(0)  # the last block leaves one that has not begun
        names["monitor"].close()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("block", "error"),
    [("unheard_of()\n", NameError), (">>> 1 + 1\n3\n", AssertionError), ("1 +\n", SyntaxError)],
)
def test_the_runner_can_fail(block, error):
    assert blocks(f"# Page\n```\nx\n```\n```python\n{block}```\n") == [block]
    with pytest.raises(error, match=r"unheard_of|Got:|invalid syntax"):
        run(block, {}, "page")


# What is made from sources.


@pytest.mark.parametrize("path", make_pages.PAGES, ids=lambda path: path.name)
def test_what_is_made_from_sources_is_up_to_date(path):
    assert path.read_text("utf-8") == make_pages.PAGES[path](), "run `python docs/make_pages.py`"


def test_every_public_name_is_in_the_reference_and_in_llms_txt():
    reference, llms = ((make_pages.DOCS / "reference.md").read_text(), (ROOT / "llms.txt").read_text())
    for name in torchlens_viz.__all__:
        assert f"### `{name}`" in reference, name
        assert f"- `{name}`: " in llms, name
    assert "### `testing.assert_finite`" in reference
    assert "### `objectives.channel`" in reference


def test_every_page_is_in_the_navigation_and_in_llms_txt():
    llms = (ROOT / "llms.txt").read_text("utf-8")
    assert sorted(name.removesuffix(".md") for name in make_pages._pages()) == PAGES
    assert all(f"(docs/{page}.md)" in llms for page in PAGES)


def test_a_docstring_becomes_lists_and_code():
    def sample(first: int, *, second: str = "x") -> int:
        """Do a thing.

        Args:
            first: The one, which is
                long.
            second: The other.

        Returns:
            A number.

        Example:
            >>> sample(1)
            2
        """
        return first + len(second)

    assert make_pages._signature("sample", sample) == "sample(first, *, second='x')"
    assert make_pages._prose(sample) == (
        "Do a thing.\n\n\n**Args**\n\n- `first`: The one, which is\n  long.\n- `second`: The other.\n\n\n"
        "**Returns**\n\nA number.\n\n\n**Example**\n\n```python\n>>> sample(1)\n2\n```\n"
    )


def test_the_skill_has_a_name_a_description_and_every_question_of_the_how_to_page():
    skill, how_to = (ROOT / "SKILL.md").read_text("utf-8"), (DOCS / "how-to.md").read_text("utf-8")
    head = re.match(r"---\nname: (\S+)\ndescription: ([^:\n]+)\n---\n", skill)
    assert head
    assert head[1] == "torchlens_viz"
    assert len(head[2]) < 500
    questions = re.findall(r"^## (.*)$", how_to, re.MULTILINE)
    assert len(questions) >= 10
    assert all(f"## {question}" in skill for question in questions)
    assert set(blocks(how_to)) <= set(blocks(skill))


# Links.


def dead_links(path: Path) -> list[str]:
    """The links of a page that lead to no file, or to no heading of it."""
    text = re.sub(r"^```.*?^```$", "", path.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", link):
            continue
        target, _, anchor = link.partition("#")
        there = (path.parent / target) if target else path
        if not there.exists() or (anchor and anchor not in anchors(there)):
            dead.append(link)
    return dead


def anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", path.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "path",
    [README, ROOT / "CONTRIBUTING.md", ROOT / "SKILL.md", ROOT / "llms.txt", *DOCS.glob("*.md")],
    ids=lambda path: path.name,
)
def test_links_lead_somewhere(path):
    assert dead_links(path) == []


def test_dead_links_are_found(tmp_path):
    page = tmp_path / "a.md"
    page.write_text("# A b\n[x](b.md) [y](a.md) [z](#a-b) [w](#c) [v](http://nowhere.invalid)\n", "utf-8")
    assert dead_links(page) == ["b.md", "#c"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the machinery that builds sites
def test_the_site_builds_without_a_warning(tmp_path):
    commands = pytest.importorskip("mkdocs.commands.build")
    pytest.importorskip("material")
    from mkdocs.config import load_config

    commands.build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path)))  # strict: a warning raises
    pages = {path.parent.name or "index" for path in tmp_path.glob("*/index.html")}
    assert set(PAGES) - {"index"} <= pages
    home = (tmp_path / "index.html").read_text("utf-8")
    assert "fonts.googleapis.com" not in home
