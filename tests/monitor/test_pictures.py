"""Kernels and maps are drawn on one scale for a whole training."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.monitor.training import Recorder, build, events
from tests.pixels import colours
from torchlens_viz import Monitor, RunningStats, capture, feature_grid, kernel_grid


@pytest.mark.parametrize("every", [1, 2])
def test_the_scale_of_a_picture_stays_the_same(probe, every):
    net, board = build(), Recorder()
    monitor = Monitor(net, board, probe=probe, every=every, strict=True, scales={"maps/3": (-1, 3)})
    monitor.step(0)
    scales = monitor.scales
    assert scales["maps/3"] == (-1, 3)
    assert scales["kernels/0"] == pytest.approx(
        (-2 * net[0].weight.abs().max().item(), scales["kernels/0"][1])
    )
    with torch.no_grad():
        net[0].weight *= 5
    monitor.step(2)
    assert monitor.scales == scales
    share = (net[0].weight.abs() > scales["kernels/0"][1]).float().mean().item()
    assert share > 0.1
    title = f"kernels/0: scale of step 0, {share:.1%} beyond"
    ours = kernel_grid(net, value_range=scales["kernels/0"], max_tiles=64, title=title, legend=False)
    board_image = board.last("kernels/0").transpose(1, 2, 0)
    height = 16 + colours(kernel_grid(net, max_tiles=64)).shape[0]
    assert np.array_equal(board_image[:height, : ours.width], colours(ours)[:height])


def test_a_scale_is_not_taken_from_what_has_none(probe):
    net, board = build(), Recorder()
    monitor = Monitor(net, board, probe=probe, every=1, strict=True, alarm=None, headroom=1.5)
    with torch.no_grad():
        net[0].weight.zero_()
        net[0].bias.fill_(float("nan"))
    monitor.step(0)
    assert not {"kernels/0", "maps/0", "maps/3"} & set(monitor.scales)
    assert board.last("health/0/nonfinite") == 16 * 6 * 100
    assert np.isnan(board.last("health/0/mean"))
    assert not board.steps("health/0/values")
    with torch.no_grad():
        net[0].weight.fill_(2.0)
        net[0].bias.zero_()
    monitor.step(1)
    assert monitor.scales["kernels/0"] == (-3.0, 3.0)


def test_unsigned_maps_begin_at_zero_and_large_ones_are_averaged():
    net, board = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU()), Recorder()
    net[0].weight.data.fill_(1.0)
    batch = torch.rand(1, 1, 100, 130)
    with Monitor(net, board, layers=nn.ReLU, strict=True, headroom=1.0) as monitor, monitor.watch(0):
        shown = net(batch).detach()
    shown = F.avg_pool2d(shown[0][None], 5, ceil_mode=True)
    ordered = np.sort(shown.numpy().ravel())
    cut = (len(ordered) - 1) // 200  # the outermost 0.5 % do not count
    assert cut == 5
    assert monitor.scales == {"maps/1": (0.0, ordered[-1 - cut].item())}
    title = "maps/1: scale of step 0; averaged 5 x 5"
    ours = feature_grid(
        shown, nrow=2, upscale=1, value_range=monitor.scales["maps/1"], legend=True, title=title
    )
    logged = board.last("maps/1").transpose(1, 2, 0)
    assert np.array_equal(np.broadcast_to(logged, (*logged.shape[:2], 3)), colours(ours))
    assert not board.steps("kernels/1")


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 200, 1),
        nn.Conv2d(200, 150, 1),
        nn.Conv3d(2, 70, 3),
        nn.Conv1d(5, 7, 3),
        nn.ConvTranspose2d(4, 70, 2),
        nn.Conv2d(1, 4, 3).half(),
        nn.Conv2d(4, 4, 3).double(),
    ],
    ids=repr,
)
def test_kernels_of_every_kind_are_drawn_within_the_limit(layer):
    board = Recorder()
    Monitor(layer, board, layers=lambda name, module: True, alarm=None, strict=True).step(0)
    (entry,) = board.entries
    assert entry[1] == "kernels/model"
    assert entry[2].dtype == np.uint8
    assert entry[2].shape[1] * entry[2].shape[2] < 1_000_000


def test_layers_that_are_no_pictures_are_logged_in_numbers(probe):
    net, board = build(), Recorder()
    monitor = Monitor(net, board, layers=[0, nn.Linear], probe=probe, strict=True)
    monitor.step(0)
    tags = {tag for _, tag, *_ in board.entries}
    assert {"kernels/0", "maps/0", "health/7/mean", "health/7/values"} <= tags
    assert not {"kernels/7", "maps/7"} & tags


def test_a_layer_with_two_names_is_shown_once(probe):
    conv = nn.Conv2d(3, 3, 3)
    net, board = nn.Sequential(conv, nn.ReLU(), conv), Recorder()
    Monitor(net, board, probe=probe, strict=True).step(0)
    assert {tag for _, tag, *_ in board.entries if tag.startswith(("kernels", "maps"))} == {
        "kernels/0",
        "maps/0",
    }
    seen = RunningStats()
    with torch.no_grad(), capture(net, "0") as acts:
        net(probe)
    for values in acts.calls("0"):
        seen.update(values)
    assert board.last("health/0/std") == pytest.approx(seen.compute().pooled().std.item())


def test_values_beyond_all_bounds_do_not_take_the_maps_with_them(tmp_path, probe):
    net = nn.Sequential(nn.Conv2d(3, 2, 3))
    net[0].weight.data *= 1e22
    with Monitor(net, tmp_path, probe=probe, alarm=None, strict=True) as monitor:
        monitor.step(0)
    assert set(events(tmp_path).Tags()["images"]) == {"kernels/0", "maps/0", "probe/inputs"}
