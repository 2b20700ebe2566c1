"""Faults that people plant without meaning to, each with the cause that the alarm names."""

from __future__ import annotations

import re
from contextlib import nullcontext

import pytest
import torch
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from torch import nn

from tests.monitor.training import Recorder, events, take_step
from torchlens_viz import Monitor
from torchlens_viz.errors import LayerNotFoundError
from torchlens_viz.monitor.health import MonitorWarning


def convolutional():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4),
    )  # fmt: skip


def normalised():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4),
    )  # fmt: skip


def dense():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(3 * 16 * 16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)
    )


def batch_of(step):
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(32, 3, 16, 16, generator=generator)
    labels = (images[:, 0].mean((1, 2)) > 0).long() + 2 * (images[:, 1].mean((1, 2)) > 0).long()
    return images, labels


def train(net, *, lr=0.05, adam=False, steps=30, spoil=None, watch=False, **options):
    """Train, and return what the alarm said."""
    troubles, board = [], Recorder()
    optimiser = (
        torch.optim.Adam(net.parameters(), lr=lr)
        if adam
        else torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    )
    probe = None if watch else batch_of(999)[0][:16]
    monitor = Monitor(net, board, probe=probe, every=2, alarm=troubles.append, strict=True, **options)
    for step in range(steps):
        images, labels = batch_of(step)
        if spoil is not None:
            images = spoil(step, net, images)

        take_step(net, optimiser, images, labels, monitor, step, watch=watch)
    return troubles


@pytest.mark.parametrize("watch", [False, True])
@pytest.mark.parametrize("adam", [False, True])
@pytest.mark.parametrize("make", [convolutional, normalised, dense])
def test_a_healthy_training_is_silent(make, adam, watch):
    torch.manual_seed(0)
    assert train(make(), lr=3e-3 if adam else 0.05, adam=adam, watch=watch) == []


def scaled(factor, *, biases=1.0):
    def spoil(step, net, images):
        if step == 0:
            with torch.no_grad():
                for module in net.modules():
                    if isinstance(module, nn.Conv2d | nn.Linear):
                        module.weight *= factor
                        if module.bias is not None:
                            module.bias *= biases
        return images

    return spoil


def nan_in_a_picture(step, net, images):
    if step == 10:
        images[3, 1, 4, 4] = torch.nan
    return images


def nan_in_a_weight(step, net, images):
    if step == 10:
        next(m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)).weight.data[1] = torch.nan
    return images


def biases_far_below(step, net, images):
    if step == 10:
        [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)][1].bias.data.fill_(-50.0)
    return images


def pictures_of_bytes(step, net, images):
    return images * 1e6


def pictures_of_nothing(step, net, images):
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.bias.data.zero_()
    return images * 0


def growing(step, net, images):
    if step >= 4:
        with torch.no_grad():
            [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)][1].weight.mul_(1.35)
    return images


@pytest.mark.parametrize("make", [convolutional, dense])
@pytest.mark.parametrize(
    ("spoil", "watch", "lr", "cause", "words"),
    [
        (scaled(1e-3), False, 0.05, "initialisation", "too small"),
        (scaled(1e-3, biases=0.0), True, 0.05, "initialisation", "too small"),
        (scaled(1e-2), True, 0.05, "initialisation", "too small"),
        (scaled(100.0), True, 1e-9, "initialisation", "too large"),
        (scaled(100.0), False, 1e-9, "initialisation", "too large"),
        (nan_in_a_picture, True, 0.05, "input", "what the network was given has NaN or Inf"),
        (nan_in_a_weight, True, 0.05, "weights", "`weight` has NaN or Inf, while"),
        (None, False, 5.0, "learning rate", "learning rate"),
        (None, True, 5.0, "learning rate", "learning rate"),
        (biases_far_below, True, 0.05, "bias", "the biases of `"),
        (pictures_of_bytes, True, 1e-12, "input", "normalise the data"),
        (pictures_of_nothing, True, 0.0, "input", "is zero"),
        (growing, True, 0.0, "weights", "times what it was at first: the weights of `3` have grown"),
    ],
)  # fmt: skip
def test_the_first_alarm_names_the_cause(make, spoil, watch, lr, cause, words):
    torch.manual_seed(0)
    layers = nn.Linear if make is dense else nn.Conv2d
    options = {"std_range": (1e-6, 1e4)}
    troubles = train(make(), lr=lr, spoil=spoil, watch=watch, layers=layers, **options)
    assert troubles
    assert troubles[0].cause == cause, troubles[0]
    assert words in troubles[0].message


def test_what_an_alarm_says_stands_in_the_log_and_each_figure_of_all_layers_in_one_chart(tmp_path):
    net = convolutional()
    net[3].weight.data[0, 0, 0, 0] = torch.inf
    told = []
    with Monitor(net, tmp_path, probe=batch_of(0)[0], alarm=told.append, norms=True, name="net") as monitor:
        monitor.step(0)
    read = events(tmp_path)
    (tag,) = [tag for tag in read.Tags()["tensors"] if tag.startswith("alarms/")]
    assert tag == "alarms/net/nonfinite/text_summary"
    (event,) = read.Tensors(tag)
    assert event.tensor_proto.string_val[0].decode() == f"**weights**: {told[0].message}"
    layout = read.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    charts = Layout.FromString(layout).category[0]
    found = {chart.title: list(chart.multiline.tag) for chart in charts.chart}
    tags = read.Tags()["scalars"]
    for what in ("mean", "std", "zero_fraction", "dead", "dead_fraction", "nonfinite", "weight_norm"):
        (pattern,) = found[what]
        assert [tag for tag in tags if re.search(pattern, tag)] == [
            f"health/net/{layer}/{what}" for layer in (0, 3, 6)
        ]


def test_without_a_convolution_what_has_weights_is_watched():
    board = Recorder()
    attention = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    Monitor(attention, board, probe=torch.randn(4, 5, 8), strict=True, std_range=(0, 9)).step(0)
    assert {tag for _, tag, _, _ in board.entries if tag.endswith("/std")} == {
        f"health/{layer}/std" for layer in ("self_attn", "linear1", "linear2")
    }
    with pytest.raises(LayerNotFoundError, match="the model has no Conv2d"):
        Monitor(nn.Sequential(nn.ReLU()), board)


def test_a_monitor_that_sees_nothing_says_so():
    net = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU())
    with pytest.warns(MonitorWarning, match="it ends without a step, so that nothing was logged"):
        Monitor(net, Recorder()).close()
    with pytest.warns(MonitorWarning, match="there is no `probe`, so that `step` logs kernels alone"):
        Monitor(net, Recorder(), every=1).step(0)


class Nothing(nn.Module):
    def forward(self, x):
        return None


class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.nothing, self.idle = Nothing(), nn.ReLU()

    def forward(self, x):
        self.nothing(x)
        return x


def test_a_layer_that_puts_out_no_tensor_is_told_from_one_that_did_not_run():
    model = Holder()
    for layer, words in (("nothing", "`nothing` put out no tensor"), ("idle", "`idle` did not run")):
        monitor = Monitor(model, Recorder(), layers=layer, every=1)
        with pytest.warns(MonitorWarning, match=f"step 0: {words}"), monitor.watch(0):
            model(torch.rand(1, 3, 4, 4))


def nan_labels(output, labels):
    return nn.functional.cross_entropy(output, labels) * torch.nan


def logarithm_of_zero(output, labels):
    return -(output.softmax(1) * 0).log().mean()


def division_by_zero(output, labels):
    return (nn.functional.cross_entropy(output, labels, reduction="none") / (labels - labels)).mean()


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.into, self.cells, self.head = nn.Linear(48, 16), nn.GRU(16, 8, batch_first=True), nn.Linear(8, 4)

    def forward(self, images):
        return self.head(self.cells(self.into(images.movedim(1, 2).flatten(2)))[0][:, -1])


@pytest.mark.parametrize("loss", [nan_labels, logarithm_of_zero, division_by_zero])
@pytest.mark.parametrize("watch", [False, True])
@pytest.mark.parametrize("make", [convolutional, normalised, dense, Recurrent])
def test_a_loss_that_is_not_finite_is_told_from_a_spoilt_weight(make, watch, loss):
    """From the fifth step on; what such a step leaves is NaN in all weights, whichever the layer."""
    torch.manual_seed(0)
    net, troubles = make(), []
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-3)
    probe = None if watch else batch_of(999)[0]
    monitor = Monitor(net, Recorder(), probe=probe, every=2, alarm=troubles.append, strict=True)
    for step in range(8):
        images, labels = batch_of(step)
        with monitor.watch(step) if watch else nullcontext():
            optimiser.zero_grad()
            (nn.functional.cross_entropy if step < 5 else loss)(net(images), labels).backward()
            optimiser.step()
        if not watch:
            monitor.step(step)
    (trouble,) = troubles
    assert (trouble.cause, trouble.kind, trouble.step) == ("loss", "nonfinite", 6)
    assert (
        "all weights have NaN or Inf at once, as a step leaves them where the loss is not" in trouble.message
    )


def test_weights_that_were_never_finite_are_not_blamed_on_a_loss():
    net, troubles = dense(), []
    for parameter in net.parameters():
        parameter.data.fill_(torch.nan)
    Monitor(net, Recorder(), probe=batch_of(0)[0], every=1, alarm=troubles.append).step(0)
    assert troubles[0].cause == "weights"
