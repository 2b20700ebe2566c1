"""The monitor as a callback of Lightning, with the real Trainer."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::Warning:lightning"),
]


@pytest.fixture
def lightning(monkeypatch):
    return pytest.importorskip("lightning.pytorch")


def module_of(lightning):
    class Classifier(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(
                nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
            )

        def forward(self, images):
            return self.net(images)

        def training_step(self, batch, index):
            images, labels = batch
            return nn.functional.cross_entropy(self.net(images), labels)

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.01)

    return Classifier()


def fit(lightning, folder, callbacks, **options):
    torch.manual_seed(1)
    data = TensorDataset(torch.randn(48, 3, 8, 8), torch.randint(2, (48,)))
    options = {"logger": False, "max_epochs": 2} | options
    trainer = lightning.Trainer(
        accelerator="cpu",
        callbacks=callbacks,
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    module = module_of(lightning)
    trainer.fit(module, DataLoader(data, batch_size=8, shuffle=True))
    return trainer, module


def events(folder):
    return EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()


def hooks(module):
    return sum(len(part._forward_hooks) for part in module.modules())


@pytest.mark.parametrize("has_probe", [True, False])
def test_the_callback_logs_and_leaves_the_training_as_it_is(lightning, tmp_path, has_probe):
    from torchlens_viz.monitor.lightning import MonitorCallback

    probe = torch.randn(16, 3, 8, 8) if has_probe else None
    callback = MonitorCallback(tmp_path / "logs", probe=probe, every=5, strict=True)
    _, module = fit(lightning, tmp_path, [callback])
    _, plain = fit(lightning, tmp_path, [])
    for name, value in plain.state_dict().items():
        assert torch.equal(value, module.state_dict()[name]), name
    read = events(tmp_path / "logs")
    assert [event.step for event in read.Images("maps/net.0")] == [0, 5, 10]
    assert [event.step for event in read.Scalars("health/net.0/mean")] == [0, 5, 10]
    assert hooks(module) == 0


def test_the_writer_of_the_trainers_logger_is_used(lightning, tmp_path):
    from torchlens_viz.monitor.lightning import MonitorCallback

    loggers = pytest.importorskip("lightning.pytorch.loggers")
    logger = loggers.TensorBoardLogger(tmp_path, name="run", version="")
    callback = MonitorCallback(every=4, module=lambda module: module.net, strict=True)
    fit(lightning, tmp_path, [callback], logger=logger, accumulate_grad_batches=2)
    read = events(tmp_path / "run")
    assert [event.step for event in read.Images("kernels/0")] == [0, 4]


def test_an_alarm_ends_the_training(lightning, tmp_path):
    from torchlens_viz.monitor.lightning import MonitorCallback

    class Spoil(lightning.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 3:
                pl_module.net[0].weight.data.fill_(float("nan"))

    heard = []
    callback = MonitorCallback(tmp_path / "logs", every=1, stop=True, alarm=heard.append)
    trainer, _ = fit(lightning, tmp_path, [Spoil(), callback])
    assert [(trouble.kind, trouble.layer, trouble.step) for trouble in heard] == [("nonfinite", "net.0", 3)]
    assert trainer.global_step == 4


def test_an_error_in_training_takes_the_hooks_off(lightning, tmp_path):
    from torchlens_viz.monitor.lightning import MonitorCallback

    counts = []

    class Fail(lightning.Callback):
        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            counts.append(hooks(pl_module))
            raise ZeroDivisionError("planted")

        def on_exception(self, trainer, pl_module, exception):
            counts.append(hooks(pl_module))

    callback = MonitorCallback(tmp_path / "logs", every=1)
    with pytest.raises(ZeroDivisionError, match="planted"):
        fit(lightning, tmp_path, [callback, Fail()])
    assert counts == [1, 0]


def test_an_epoch_that_is_skipped_leaves_no_hook(lightning, tmp_path):
    from torchlens_viz.monitor.lightning import MonitorCallback

    class Skip(lightning.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            return -1

    callback = MonitorCallback(tmp_path / "logs", every=1)
    _, module = fit(lightning, tmp_path, [callback, Skip()], max_epochs=1)
    assert hooks(module) == 0


def test_no_writer_is_said_with_what_to_pass(lightning, tmp_path):
    from torchlens_viz.monitor.lightning import MonitorCallback

    with pytest.raises(ValueError, match="`writer` must be given where the Trainer has no TensorBoardLogger"):
        fit(lightning, tmp_path, [MonitorCallback()])


def test_a_missing_lightning_is_said_with_what_to_install():
    code = (
        "import sys; sys.modules['lightning'] = sys.modules['lightning.pytorch'] = None\n"
        "import torchlens_viz as tv; tv.Monitor\n"
        "try: import torchlens_viz.monitor.lightning\n"
        "except tv.TorchlensVizError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 'pip install "torchlens_viz[lightning]"' in done.stdout
