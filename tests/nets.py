"""What several rooms test with: small networks, what is found on them, and when two results are the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrizations

from torchlens_viz import ChannelStats, RunningStats, Survey, capture
from torchlens_viz.ascent.maximize import maximize


class Repeats(nn.Module):
    """Calls its only layer twice, which bears two names, and another never."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1)
        self.alias = self.conv
        self.unused = nn.Conv2d(2, 2, 1)

    def forward(self, value):
        return self.conv(self.conv(value)[:, :, ::2])


class Gives(nn.Module):
    """Puts out what a function makes of the input."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, value):
        return self.make(value)


class Given(nn.Module):
    """A network whose layer puts out what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


class Catches(nn.Module):
    """Goes on to the next of three layers where one fails."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(1, 1, 1) for _ in range(3))
        self.ran = []

    def forward(self, value):
        for name in ("first", "second", "third"):
            try:
                value = getattr(self, name)(value)
                self.ran.append(name)
            except Exception:
                pass
        return value


class Residual1d(nn.Module):
    """Two convolutions along a signal, and a way around them."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv1d(inputs, outputs, 7, stride, padding=3, bias=False)
        self.bn1 = nn.BatchNorm1d(outputs)
        self.conv2 = nn.Conv1d(outputs, outputs, 7, padding=3, bias=False)
        self.bn2 = nn.BatchNorm1d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Conv1d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResNet1d(nn.Sequential):
    """A classifier of signals (N, leads, L), as for electrocardiograms."""

    def __init__(self, leads: int = 12, classes: int = 5):
        super().__init__()
        self.stem = nn.Conv1d(leads, 8, 15, 2, padding=7, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool1d(3, 2, padding=1)
        self.layer1 = Residual1d(8, 8, 1)
        self.layer2 = Residual1d(8, 16, 2)
        self.mean = nn.AdaptiveAvgPool1d(1)
        self.flat = nn.Flatten()
        self.fc = nn.Linear(16, classes)


class UNet3d(nn.Module):
    """Labels every voxel of a volume (N, channels, D, H, W): down, up, and a way around."""

    def __init__(self, channels: int = 1, classes: int = 2):
        super().__init__()
        self.entry = nn.Sequential(nn.Conv3d(channels, 4, 3, padding=1), nn.ReLU(inplace=True))
        self.down = nn.Sequential(nn.Conv3d(4, 8, 3, 2, padding=1), nn.ReLU(inplace=True))
        self.up = nn.ConvTranspose3d(8, 4, 2, 2)
        self.head = nn.Conv3d(8, classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        fine = self.entry(x)
        return self.head(torch.cat([fine, self.up(self.down(fine))], dim=1))


class Noisy(nn.Module):
    """Draws a random number on every run, in eval mode too."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand_like(x) * 0


def small_net(*, bias: bool = True) -> nn.Sequential:
    """Two convolutions, each with its ReLU, the last of them in place; always the same weights."""
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=bias), nn.ReLU(), nn.Conv2d(6, 7, 3), nn.ReLU(inplace=True)
    ).eval()


def mixed_model(middle: nn.Module) -> nn.Sequential:
    """A model with some parts in training mode and some not."""
    model = nn.Sequential(
        nn.BatchNorm2d(3), nn.Dropout(0.5), middle, parametrizations.spectral_norm(nn.Conv2d(3, 4, 3))
    )
    model.train()
    model[0].eval()
    return model


def everything(name: str, module: nn.Module) -> bool:
    """Select every layer."""
    return True


def hook_count(model: nn.Module) -> int:
    """Count the forward hooks on all modules."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def instance_state(model: nn.Module) -> list[set[str]]:
    """Name what every module holds, and so whatever somebody has left there."""
    return [set(module.__dict__) for module in model.modules()]


def snapshot(model: nn.Module) -> tuple[dict[str, torch.Tensor], list[bool], list[bool]]:
    """What may not change in a model: its state, its modes, and which parameters are trained."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    return (
        state,
        [module.training for module in model.modules()],
        [each.requires_grad for each in model.parameters()],
    )


def assert_as_before(model: nn.Module, before: tuple) -> None:
    """Hold that a model is as the snapshot of it, without hooks and gradients."""
    after = snapshot(model)
    assert after[1:] == before[1:]
    for name, value in after[0].items():
        assert torch.equal(value, before[0][name]), name
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def recorded(model: nn.Module, layers: Any, *inputs: torch.Tensor) -> Any:
    """Record what layers put out for one input after the other."""
    with torch.no_grad(), capture(model, layers) as acts:
        for batch in inputs:
            model(batch)
    return acts


def passed_on(maps: torch.Tensor, name: str = "seen") -> Any:
    """Record `maps` (N, C, H, W) as what a layer put out."""
    model = nn.Sequential()
    model.add_module(name, nn.Identity())
    return recorded(model, name, maps)


def seeded(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Normal random numbers, always the same."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def gathered(*parts: torch.Tensor, **options) -> RunningStats:
    """Running statistics of the parts together."""
    stats = RunningStats(**options)
    for part in parts:
        stats.update(part)
    return stats


def stats_of(*parts: torch.Tensor, **options) -> ChannelStats:
    """Statistics of the parts together."""
    return gathered(*parts, **options).compute()


def numpys_statistics(values: torch.Tensor, channel_dim: int = 1) -> dict[str, np.ndarray]:
    """Two passes in float64 over the finite values of each channel, by numpy."""
    rows = values.double().movedim(channel_dim, 0).flatten(1).numpy()
    found = {name: [] for name in ("mean", "std", "min", "max", "zero_fraction", "nonfinite", "count")}
    for row in rows:
        kept = row[np.isfinite(row)]
        nothing = kept.size == 0
        found["mean"].append(np.nan if nothing else kept.mean())
        found["std"].append(np.nan if nothing else np.sqrt(((kept - kept.mean()) ** 2).mean()))
        found["min"].append(np.nan if nothing else kept.min())
        found["max"].append(np.nan if nothing else kept.max())
        found["zero_fraction"].append(np.nan if nothing else (kept == 0).mean())
        found["nonfinite"].append(row.size - kept.size)
        found["count"].append(row.size)
    return {name: np.array(column) for name, column in found.items()}


def assert_statistics_right(stats: ChannelStats, values: torch.Tensor, channel_dim: int = 1) -> None:
    """Hold statistics against numpy's two passes, to the precision of float64."""
    expected = numpys_statistics(values, channel_dim)
    for name in ("min", "max", "zero_fraction", "nonfinite", "count"):
        np.testing.assert_array_equal(getattr(stats, name).numpy(), expected[name], err_msg=name)
    scale = np.nan_to_num(np.abs([expected["mean"], expected["std"]])).max(0)
    assert np.all(np.isnan(expected["mean"]) == np.isnan(stats.mean.numpy()))
    for name in ("mean", "std"):
        known = ~np.isnan(expected[name])
        is_near = np.abs(getattr(stats, name).numpy() - expected[name])[known] <= 1e-12 * scale[known]
        assert is_near.all(), (name, getattr(stats, name), expected[name])
    seen = expected["std"] > 1e-12 * scale  # numpy's own rounding makes a spread of what is constant
    np.testing.assert_allclose(stats.std.numpy()[seen], expected["std"][seen], rtol=1e-6)


def ascend(model=None, layer="2", channels=None, **options):
    """`maximize` with a few small steps unless told otherwise."""
    size = {} if "image" in options else {"size": 12}
    options = {**size, "steps": 10, "precision": "float32", **options}
    return maximize(small_net() if model is None else model, layer, channels, **options)


def same_ascent(left, right, *, atol=1e-4):
    """Say that two results are the same to the tolerance that batches of other sizes leave in float32."""
    assert left.channels.tolist() == right.channels.tolist()
    assert left.status == right.status
    torch.testing.assert_close(left.images, right.images, rtol=0, atol=atol)
    torch.testing.assert_close(left.scores, right.scores, rtol=1e-4, atol=atol)
    torch.testing.assert_close(left.history, right.history, rtol=1e-4, atol=atol, equal_nan=True)
    torch.testing.assert_close(left.means, right.means, rtol=1e-4, atol=atol)


quiet = {"progress": False}


def same_survey(one: Survey, other: Survey, *, rtol: float = 1e-12) -> None:
    """Assert that two surveys agree: exactly but for the moments, which depend on the order of sums."""
    assert (one.samples_seen, one.not_called) == (other.samples_seen, other.not_called)
    for name, stats in one.stats.items():
        for figure, values in stats.to_dict().items():
            if isinstance(values, torch.Tensor):
                exact = figure not in ("mean", "std")
                torch.testing.assert_close(
                    values,
                    getattr(other.stats[name], figure),
                    rtol=0 if exact else rtol,
                    atol=0 if exact else 1e-13,
                    equal_nan=True,
                )
        for part in ("values", "samples", "positions"):
            ours, theirs = (getattr(each.top[name], part) for each in (one, other))
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def contents(folder: Path) -> dict[str, bytes | None]:
    """All files and folders beneath a folder, and what the files hold."""
    return {str(place): place.read_bytes() if place.is_file() else None for place in folder.rglob("*")}
