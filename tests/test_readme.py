"""Every Python snippet of the README runs, on a small network with the layer names that it uses.

A snippet from the middle of a script gets the names it takes for granted from `prelude`; what it makes, it
makes in a folder of its own. Nothing is downloaded.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from PIL import Image
from torch import nn
from torchvision.transforms import Normalize
from torchvision.transforms.functional import to_tensor

import torchlens_viz
from torchlens_viz.testing.baseline import ActivationRegression

README = (Path(__file__).parent.parent / "README.md").read_text("utf-8")


def snippets(text: str) -> dict[str, str]:
    """The Python blocks of a page, each under the heading it stands below; more than one are numbered."""
    found: dict[str, str] = {}
    for section in re.split(r"^#+ ", text, flags=re.MULTILINE)[1:]:
        heading = section.partition("\n")[0]
        for number, block in enumerate(
            re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
        ):
            found[f"{heading} {number + 1}" if number else heading] = block
    return found


def run(snippet: str, names: dict[str, Any]) -> dict[str, Any]:
    """Run a snippet among these names; return them with those it made."""
    exec(compile(snippet, "README.md", "exec"), names)
    return names


SNIPPETS = snippets(README)


class Net(nn.Module):
    """A network with the layers that the README names."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2),
            nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(inplace=True), nn.Identity(),
            nn.Identity(), nn.Identity(), nn.Identity(),
            nn.Identity(), nn.Conv2d(8, 64, 3, padding=1), nn.ReLU(inplace=True),
        )  # fmt: skip
        self.encoder = nn.Sequential()
        self.encoder.add_module("ln", nn.LayerNorm(64))
        self.head = nn.Sequential()
        self.head.add_module("conv", nn.Conv2d(64, 8, 1))
        self.classifier = nn.Sequential(*(nn.Identity() for _ in range(6)), nn.Linear(8, 300))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # every channel fires, as in a network that learnt something
                nn.init.kaiming_normal_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps = nn.functional.interpolate(self.features(images), size=14)
        tokens = self.encoder(maps.flatten(2).mT)
        return self.classifier(self.head(tokens.mT.unflatten(2, (14, 14))).mean((2, 3)))


def prelude(heading: str) -> dict[str, Any]:
    """What a snippet takes for granted: imports, a model, data."""
    torch.manual_seed(0)
    public = {name: getattr(torchlens_viz, name) for name in torchlens_viz.__all__}
    model = Net().eval()
    images = torch.randn(32, 3, 28, 28)
    with torch.no_grad(), torchlens_viz.capture(model, ["features.0", "encoder.ln"]) as acts:
        model(images[:1])
    batches = images.split(16)

    def train_on(batch: torch.Tensor, labels: torch.Tensor) -> None:
        model.zero_grad()
        nn.functional.cross_entropy(model(batch), labels).backward()

    is_labelled = "trains" in heading or "worth" in heading
    return {
        **public,
        "maximize": partial(torchlens_viz.maximize, size=16, steps=3),  # a climb of seconds, not of minutes
        "torch": torch,
        "nn": nn,
        "Normalize": Normalize,
        "to_tensor": to_tensor,
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
        "model": model,
        "other": model,
        "testing": torchlens_viz.testing,
        "image": images[:1],
        "images": images,
        "batch": images,
        "dataset": images,
        "loader": [(batch, torch.arange(16)) for batch in batches] if is_labelled else batches,
        "train_on": train_on,
        "acts": acts,
        "photograph": Image.linear_gradient("L").resize((28, 28)).convert("RGB"),
    }


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    alexnet = torchvision.models.alexnet
    monkeypatch.setattr(torchvision.models, "alexnet", lambda weights: alexnet(weights=None))


def test_every_python_block_is_a_snippet():
    assert len(SNIPPETS) == README.count("```python") >= 7


@pytest.mark.parametrize("heading", SNIPPETS)
def test_a_snippet_of_the_readme_runs(heading, activations):
    names = run(SNIPPETS[heading], prelude(heading))
    for name in [name for name in names if name.startswith("test_")]:
        for overwrite in (True, False):  # a baseline is written, and then compared with
            names[name](activations, ActivationRegression(Path("baselines"), name, overwrite=overwrite))


def test_files_that_the_readme_says_are_written_are_there():
    run(SNIPPETS["torchlens_viz"], {})
    with Image.open("kernels.png") as kernels, Image.open("maps.png") as maps:
        assert kernels.mode == "RGB"
        assert (
            maps.height > kernels.height
        )  # 64 maps of 55 x 55 with a legend, 64 kernels of 11 x 11, enlarged
    run(SNIPPETS["Sheets"], prelude("Sheets"))
    assert sorted(path.name for path in Path("kernels").iterdir()) == [
        "features.0", "features.10", "features.3", "head.conv"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("snippet", "error"),
    [
        ("capture(model, nn.Conv2d, unheard_of=1)\n", TypeError),
        ("found.grid()\n", NameError),
        ('acts["features.77"]\n', torchlens_viz.errors.LayerNotCapturedError),
        ("kernel_grid(model", SyntaxError),
    ],
)
def test_the_runner_can_fail(snippet, error):
    page = f"# A page\n```\n1 +\n```\n## Part\n```python\n{snippet}```\n"
    assert list(snippets(page)) == ["Part"] or error is SyntaxError
    with pytest.raises(error, match=r"unheard_of|found|features\.77|never closed"):
        run(snippet, prelude("Part"))
