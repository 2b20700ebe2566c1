"""When the alarm of a monitor goes off, at which step, and with which figures."""

from __future__ import annotations

import warnings

import pytest
import torch

from tests.monitor.training import Recorder, build, train
from tests.nets import hook_count
from torchlens_viz import Monitor, RunningStats
from torchlens_viz.monitor.health import Figures, MonitorWarning, Trouble


class StopTrainingError(Exception):
    pass


def stop(trouble: Trouble) -> None:
    raise StopTrainingError(str(trouble))


def test_a_healthy_training_raises_no_alarm(probe):
    net = build()
    train(net, 12, Monitor(net, Recorder(), probe=probe, every=1, alarm=stop, strict=True))


@pytest.mark.parametrize("watch", [False, True])
def test_a_nan_raises_the_alarm_at_its_step(probe, watch):
    def spoil(step, net, images):
        if step == 3:
            with torch.no_grad():
                net[3].weight[2, 0, 1, 1] = float("nan")

    net = build()
    monitor = Monitor(net, Recorder(), probe=None if watch else probe, every=1, alarm=stop)
    count = 800 if watch else 1600
    # Within the step one channel is hit; after it the gradient has spread NaN to every weight, and the first
    # layer is where it comes up.
    message = (
        rf"^step 3: `3` puts out {count} values that are NaN or infinite: its `weight` has NaN or Inf"
        if watch
        else "^step 3: `0` puts"
    )
    with pytest.raises(StopTrainingError, match=message):
        train(net, 6, monitor, spoil=spoil, watch=watch)
    assert hook_count(net) == 0


def test_a_dead_layer_raises_the_alarm_at_its_step(probe):
    def spoil(step, net, images):
        if step == 4:
            net[3].bias.data.fill_(-100.0)

    net = build()
    message = r"^step 4: 20 channels of `3` \(100\.0%\) are dead, at most 90\.0% are expected"
    with pytest.raises(StopTrainingError, match=message):
        train(net, 6, Monitor(net, Recorder(), probe=probe, every=2, alarm=stop), spoil=spoil)


def test_a_learning_rate_that_is_far_too_high_raises_the_alarm_at_once(probe):
    losses = []

    def note(trouble):
        losses.append(trouble)
        raise StopTrainingError

    net = build()
    monitor = Monitor(net, Recorder(), probe=probe, every=1, alarm=note, std_range=(1e-3, 10))
    train(build(), 6, Monitor(build(), Recorder(), probe=probe, every=1, alarm=stop, std_range=(1e-3, 10)))
    with pytest.raises(StopTrainingError):
        train(net, 6, monitor, lr=50.0)
    (trouble,) = losses
    assert trouble.step <= 2
    assert trouble.kind in ("std", "dead", "nonfinite")


def test_a_std_out_of_bounds_raises_the_alarm_with_its_figures(probe):
    net, troubles = build(), []
    bounds = {"std_range": (0.01, 10), "max_update": 1e9}
    monitor = Monitor(net, Recorder(), probe=probe, every=1, alarm=troubles.append, **bounds)
    monitor.step(0)
    for step, factor in enumerate((1e3, 1.0, 1e-3)):  # the second changes nothing: it was said
        net[3].weight.data *= factor
        monitor.step(20 + 2 * step)
    net[3].bias.data.zero_()
    net[3].weight.data *= 1e-4
    monitor.step(90)
    assert [(t.kind, t.layer, t.step) for t in troubles] == [("std", "3", 20), ("std", "3", 90)]
    assert troubles[0].figures.std > 10
    assert troubles[0].message.startswith(
        f"step 20: the std of `3` is {troubles[0].figures.std:.4g}, outside [0.01, 10]: the weights of `3` "
        "have grown"
    )


def test_the_alarm_warns_with_layer_and_step_unless_told_otherwise(probe):
    net = build()
    with torch.no_grad():
        net[0].bias[1] = float("inf")
    with pytest.warns(MonitorWarning) as caught:
        Monitor(net, Recorder(), probe=probe).step(0)
    assert [str(warning.message) for warning in caught] == [
        "step 0: `0` puts out 1,600 values that are NaN or infinite, and so does 1 more of 2 layers: its "
        "`bias` has NaN or Inf, while what the network is given is finite"
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Monitor(net, Recorder(), probe=probe, alarm=None).step(0)


def test_figures_are_of_the_finite_values():
    stats = RunningStats()
    stats.update(torch.tensor([[[1.0, torch.nan]], [[3.0, 0.0]]]))
    figures = Figures.of([stats.compute()])
    assert (figures.mean, figures.nonfinite, figures.dead) == (pytest.approx(4 / 3), 1, 0)
    assert figures.zero_fraction == pytest.approx(1 / 3)


def test_an_alarm_that_raises_keeps_the_other_troubles_for_the_next_look(probe):
    net, told = build(), []
    for place in (0, 3):
        net[place].weight.data.zero_()
        net[place].bias.data.fill_(-1e3)

    def alarm(trouble):
        told.append(trouble.layer)
        raise StopTrainingError

    monitor = Monitor(net, Recorder(), probe=probe, every=1, alarm=alarm, std_range=(0, 1e9))
    for step in range(2):
        with pytest.raises(StopTrainingError):
            monitor.step(step)
    assert told == ["0", "3"]


def test_a_channel_with_infinity_is_not_dead():
    stats = RunningStats()
    stats.update(torch.tensor([[-1.0, -1.0], [torch.inf, -1.0]]))
    assert Figures.of([stats.compute()]).dead == 1
