"""Class activation maps: by hand, on planted truths, and beside captum and grad-cam."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.attribution.conftest import METHODS
from tests.attribution.planted import PLANTED, share_inside
from tests.nets import seeded
from torchlens_viz import explain
from torchlens_viz.attribution import cam
from torchlens_viz.attribution.goal import Goal
from torchlens_viz.attribution.twin import Twin

PEERS = {
    "gradcam": "GradCAM",
    "gradcam++": "GradCAMPlusPlus",
    "hirescam": "HiResCAM",
    "layercam": "LayerCAM",
    "eigencam": "EigenCAM",
    "ablationcam": "AblationCAM",
}


@pytest.fixture
def net() -> nn.Sequential:
    """A classifier with large gradients, so that what peers add to denominators does not count."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(8 * 64, 5),
    ).eval()  # fmt: skip
    with torch.no_grad():
        model[6].weight *= 300
        model[6].bias += 20
    return model


def test_by_hand_on_two_positions():
    values = torch.tensor([[[[1.0, 2.0]], [[4.0, 0.0]]]])
    gradients = torch.tensor([[[[3.0, -1.0]], [[-2.0, 0.5]]]])
    # weights 1 and -0.75: 1 - 3 and 2 + 0
    assert cam.gradcam(values, gradients).tolist() == [[[0.0, 2.0]]]
    # 3 - 8 and -2 + 0
    assert cam.hirescam(values, gradients).tolist() == [[[0.0, 0.0]]]
    # 3 + 0 and 0 + 0
    assert cam.layercam(values, gradients).tolist() == [[[3.0, 0.0]]]
    # weights 3 / (2 + 3 * 3) and 0.5 / (2 + 4 * 0.5)
    weights = 3 / 11, 0.5 / 4
    expected = [weights[0] + 4 * weights[1], 2 * weights[0]]
    torch.testing.assert_close(cam.gradcam_plus_plus(values, gradients), torch.tensor([[expected]]))


def test_plus_plus_has_no_pole_where_a_channel_sums_below_zero():
    values, gradients = torch.tensor([[[[-2.0, 0.0]]]]), torch.tensor([[[[1.0, 1.0]]]])
    assert cam.gradcam_plus_plus(values, gradients).tolist() == [[[0.0, 0.0]]]
    assert cam.gradcam_plus_plus(-values, gradients).tolist() == [[[1.0, 0.0]]]  # 2 * 1 / (2 + 2 * 1)


def test_the_first_component_is_that_of_the_covariance_and_grows_with_the_mean():
    values = seeded(2, 5, 4, 6).float()
    values[:, 0] += 3 * seeded(2, 4, 6).float()
    found = cam.eigencam(values)
    for sample, heatmap in zip(values.double().numpy(), found.numpy(), strict=True):
        rows = sample.reshape(5, -1).T
        centred = rows - rows.mean(0)
        _, vectors = np.linalg.eigh(centred.T @ centred)
        component = centred @ vectors[:, -1]
        component *= np.sign(component @ centred.mean(1))
        np.testing.assert_allclose(heatmap.ravel(), component.clip(0), atol=1e-5)


def test_maps_without_variation_have_no_component():
    assert cam.eigencam(torch.full((1, 3, 2, 2), 4.0)).tolist() == [[[0.0, 0.0], [0.0, 0.0]]]


@pytest.mark.parametrize("method", ["gradcam", "gradcam++", "hirescam", "layercam", "ablationcam"])
@pytest.mark.parametrize("truth", PLANTED)
def test_planted_evidence_is_found(method, truth):
    planted = PLANTED[truth]()
    found = explain(planted.net, planted.image, planted.target, method=method, layer="maps")
    share = share_inside(found.heatmaps[0], planted.region)
    # Weights of whole channels cannot tell where in the image a channel counts.
    is_told = method in ("hirescam", "layercam") or truth != "twice, left counts"
    assert share >= 0.95 if is_told else 0.4 < share < 0.6


@pytest.mark.parametrize("truth", PLANTED)
def test_planted_evidence_is_found_at_the_pixels(truth):
    planted = PLANTED[truth]()
    for method in ("integrated_gradients", "guided"):
        found = explain(planted.net, planted.image, planted.target, method=method)
        assert share_inside(found.heatmaps[0], planted.region) >= 0.95
    # The gradient is as large where it speaks against the class, by a half of what the class itself has.
    found = explain(planted.net, planted.image, planted.target, method="gradient")
    has_rival = "two classes" in truth or "the same" in truth
    assert share_inside(found.heatmaps[0], planted.region) == pytest.approx(
        2 / 3 if has_rival else 1, abs=0.01
    )


def test_the_page_has_every_method_and_every_planted_truth():
    page = (Path(__file__).parents[2] / "docs" / "explain.md").read_text("utf-8")
    truths, demo = (
        page.partition(f"<!-- {name}, by explain_quality.py: begin -->")[2].partition("<!--")[0].strip()
        for name in ("planted truths", "demo network")
    )
    assert truths.splitlines()[0] == f"| method | {' | '.join(PLANTED)} |"
    for table in (truths, demo):
        assert [line.split("|")[1].strip(" `") for line in table.splitlines()[2:]] == [*METHODS]


def test_the_measure_of_planted_truths_can_fail():
    planted = PLANTED["one occurrence"]()
    assert share_inside(torch.ones(48, 48), planted.region) == pytest.approx(64 / 48**2)
    assert share_inside(torch.zeros(48, 48), planted.region) == 0.0


@pytest.mark.parametrize("method", PEERS)
@pytest.mark.filterwarnings("ignore")
def test_agrees_with_the_grad_cam_package(net, method):
    peers = pytest.importorskip("pytorch_grad_cam")
    targets = pytest.importorskip("pytorch_grad_cam.utils.model_targets")
    images, classes = torch.rand(2, 3, 16, 16), [2, 3]
    twin, goal = Twin(net, channel_dim=None, grid=None), Goal(classes, 2)
    scores, (maps,) = twin.maps(images, ["4"], goal)
    if method == "ablationcam":
        ours = cam.ablationcam(twin, images, maps, goal, scores)
    elif method == "eigencam":
        ours = cam.eigencam(maps.values)
    else:
        ours = cam.BY_GRADIENT[method](maps.values, maps.gradients)
    with contextlib.redirect_stderr(io.StringIO()), getattr(peers, PEERS[method])(net, [net[4]]) as peer:
        peer.get_target_width_height = lambda images: (8, 8)  # its maps, before they are stretched
        theirs = torch.from_numpy(peer(images, [targets.ClassifierOutputTarget(each) for each in classes]))
    # The sign of their component is anybody's guess; of maps turned around, ours is turned around too.
    turned = cam.eigencam(-maps.values)
    for mine, opposite, other in zip(ours, turned, theirs, strict=True):
        is_turned = method == "eigencam" and (mine * other).sum() < 1e-6
        mine = opposite if is_turned else mine
        mine = (mine - mine.min()) / (mine.max() - mine.min()).clamp(min=1e-12)
        torch.testing.assert_close(mine, other, rtol=0, atol=2e-6)


def test_gradcam_agrees_with_captum(net):
    attr = pytest.importorskip("captum.attr")
    images, classes = torch.rand(2, 3, 16, 16), torch.tensor([2, 3])
    theirs = attr.LayerGradCam(net, net[4]).attribute(images, target=classes, relu_attributions=True)
    _, (maps,) = Twin(net, channel_dim=None, grid=None).maps(images, ["4"], Goal(classes, 2))
    torch.testing.assert_close(cam.gradcam(maps.values, maps.gradients), theirs[:, 0].detach())


def ablated_by_hand(net: nn.Sequential, images: torch.Tensor, layer: int, target: int) -> torch.Tensor:
    """Grad-cam's weights, one channel and one image at a time."""
    rows = []
    with torch.no_grad():
        for image in images:
            maps = net[: layer + 1](image[None])
            score = net[layer + 1 :](maps)[0, target]
            heatmap = torch.zeros(maps.shape[2:])
            for channel in range(maps.shape[1]):
                without = maps.clone()
                without[:, channel] = 0
                lost = score - net[layer + 1 :](without)[0, target]
                heatmap += lost / score.abs() * maps[0, channel]
            rows.append(heatmap.relu())
    return torch.stack(rows)


@pytest.mark.parametrize("sign", [1, -1])
def test_ablation_is_what_it_is_by_hand(net, sign):
    with torch.no_grad():
        net[6].weight *= sign
        net[6].bias *= sign
    images = torch.rand(3, 3, 16, 16)
    twin, goal = Twin(net, channel_dim=None, grid=None), Goal(2, 3)
    scores, (maps,) = twin.maps(images, ["4"], goal, gradients=False)
    found = cam.ablationcam(twin, images, maps, goal, scores)
    torch.testing.assert_close(found, ablated_by_hand(net, images, 4, 2), rtol=1e-4, atol=1e-5)
    by_function = Goal(lambda output: output[:, 2] * 1, 3)
    torch.testing.assert_close(
        cam.ablationcam(twin, images, maps, by_function, scores), found, rtol=1e-4, atol=1e-5
    )


class CountsImages(nn.Module):
    """Cannot go on with a batch that has grown within it."""

    def __init__(self, net: nn.Sequential) -> None:
        super().__init__()
        self.net = net
        self.rows: list[int] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.rows.append(len(images))
        return self.net[5:](self.net[:5](images)[: len(images)])


def test_a_network_whose_batch_may_not_grow_is_ablated_all_the_same(net):
    images = torch.rand(2, 3, 16, 16)
    expected = explain(net, images, 1, method="ablationcam", layer="4").heatmaps
    counting = CountsImages(net)
    assert torch.allclose(
        explain(counting, images, 1, method="ablationcam", layer="net.4").heatmaps, expected, atol=1e-5
    )


def test_several_maps_become_the_maximum_of_their_shares():
    left, right = torch.tensor([[[2.0, 1.0]], [[0.0, 0.0]]]), torch.tensor([[[0.0, 8.0]], [[0.0, 1.0]]])
    assert cam.fused([left, right]).tolist() == [[[1.0, 1.0]], [[0.0, 1.0]]]
    assert cam.fused([left]) is left


def test_eigencam_of_maps_that_are_not_finite_is_nan_for_these_alone():
    values = torch.rand(3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    alone = cam.eigencam(values[[0, 2]])
    values[1, 2, 3, 4] = torch.inf
    found = cam.eigencam(values)
    assert found[1].isnan().all()
    torch.testing.assert_close(found[[0, 2]], alone)
