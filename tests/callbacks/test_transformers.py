"""The monitor as a callback of transformers, with the real Trainer."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from torchlens_viz import FolderWriter
from torchlens_viz.errors import InvalidArgumentError

pytestmark = pytest.mark.filterwarnings("ignore::Warning")
PROBE = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def callbacks():
    pytest.importorskip("accelerate")
    pytest.importorskip("transformers")
    import torchlens_viz.callbacks.transformers as module

    return module


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
        )

    def forward(self, pixel_values, labels=None):
        logits = self.net(pixel_values)
        return {"logits": logits} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}


def fit(folder, callback) -> tuple[nn.Module, int]:
    from transformers import Trainer, TrainingArguments

    images = torch.rand(24, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    data = [{"pixel_values": image, "labels": index % 2} for index, image in enumerate(images)]
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=6, per_device_train_batch_size=4, report_to=[], save_strategy="no",
        use_cpu=True, disable_tqdm=True, seed=3,
    )  # fmt: skip
    model = Classifier()
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[callback] if callback else [])
    trainer.train()
    return model, trainer.state.global_step


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text("utf-8").splitlines()]


def test_a_trainer_logs_the_probe_and_the_training_stays_the_same(tmp_path, callbacks):
    callback = callbacks.MonitorCallback(
        FolderWriter(tmp_path / "log"), probe={"pixel_values": PROBE}, every=2, strict=True
    )
    watched, steps = fit(tmp_path / "a", callback)
    plain, _ = fit(tmp_path / "b", None)
    assert steps == 6
    for one, other in zip(watched.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)
    assert not any(module._forward_hooks for module in watched.modules())
    stds = [line for line in lines(tmp_path / "log") if line["tag"] == "health/net.0/std"]
    assert [line["step"] for line in stds] == [2, 4, 6]
    with torch.no_grad():
        expected = watched.net[0](PROBE).std(correction=0).item()
    assert stds[-1]["value"] == pytest.approx(expected)
    assert callback.monitor is None


def test_an_alarm_ends_the_training(tmp_path, callbacks):
    heard = []
    callback = callbacks.MonitorCallback(
        FolderWriter(tmp_path / "log"), probe=PROBE, every=1, stop=True,
        std_range=(1e3, 1e4), alarm=heard.append, module=lambda model: model.net[0],
    )  # fmt: skip
    _, steps = fit(tmp_path / "a", callback)
    assert steps == 1
    assert heard
    tags = {line["tag"] for line in lines(tmp_path / "log")}
    assert "health/model/std" in tags


def test_without_a_probe_it_is_refused(callbacks):
    with pytest.raises(InvalidArgumentError, match="`probe` must be a batch to show the network, got None"):
        callbacks.MonitorCallback("runs", probe=None)


def test_without_transformers_it_says_what_to_install():
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "try:\n    import torchlens_viz.callbacks.transformers\n"
        "except ImportError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert 'pip install "torchlens_viz[hf]"' in done.stdout
