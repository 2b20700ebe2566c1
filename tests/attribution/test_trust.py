"""`Explanation.trust`: what a score keeps and loses, and whether a heatmap shows what was learnt."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch
from scipy import ndimage
from torch import nn

from tests.attribution.planted import PLANTED, twice_and_only_left_counts
from tests.nets import seeded
from torchlens_viz import explain
from torchlens_viz.attribution.trust import blur, hottest, rank_correlation, redrawn
from torchlens_viz.attribution.twin import Twin


def test_rank_correlation_is_scipys_with_ties():
    one = seeded(3, 5, 6).mul(2).round().float()
    other = (one + seeded(3, 6, 5).reshape(3, 5, 6).float()).mul(2).round()
    expected = [
        scipy.stats.spearmanr(a.ravel(), b.ravel())[0]
        for a, b in zip(one.numpy(), other.numpy(), strict=True)
    ]
    assert rank_correlation(one, other).tolist() == pytest.approx(expected)


def test_rank_correlation_with_what_has_no_ranks_is_nan():
    maps = torch.arange(4.0).view(1, 2, 2)
    assert torch.isnan(rank_correlation(maps, torch.ones(1, 2, 2))).all()
    assert torch.isnan(rank_correlation(maps, torch.full((1, 2, 2), torch.nan))).all()
    assert rank_correlation(maps, maps).item() == pytest.approx(1.0)
    assert rank_correlation(maps, -maps).item() == pytest.approx(-1.0)


def test_the_hottest_pixels_are_a_fifth_or_fewer():
    maps = torch.arange(20.0).view(1, 4, 5)
    assert hottest(maps, 0.2).flatten().nonzero().flatten().tolist() == [16, 17, 18, 19]
    spike = torch.zeros(1, 4, 5)
    spike[0, 1, 1] = 1.0
    assert hottest(spike, 0.2).nonzero().tolist() == [[0, 1, 1]]
    assert not hottest(torch.ones(1, 4, 5), 0.2).any()


def test_blurring_is_a_gaussian_and_keeps_what_is_constant():
    image = torch.zeros(1, 1, 61, 81)
    image[0, 0, 30, 40] = 1.0
    expected = ndimage.gaussian_filter(image[0, 0].double().numpy(), 0.05 * 61, truncate=9.0)
    np.testing.assert_allclose(blur(image)[0, 0].numpy(), expected, atol=1e-6)
    assert torch.allclose(blur(torch.full((1, 2, 9, 9), 3.0)), torch.tensor(3.0))


@pytest.mark.parametrize("truth", PLANTED)
def test_evidence_that_was_found_carries_the_whole_score(truth):
    planted = PLANTED[truth]()
    trust = explain(planted.net, planted.image, planted.target, method="integrated_gradients").trust
    assert trust.kept.item() > 0.9
    assert trust.lost.item() > 0.9


def test_a_heatmap_beside_the_evidence_is_told():
    planted = twice_and_only_left_counts()
    mirrored = explain(planted.net, planted.image.flip(3), 0, method="gradcam", layer="maps")
    assert abs(mirrored.trust.kept.item()) <= 1.0 or torch.isnan(mirrored.trust.kept).all()
    image = planted.image.clone()
    net = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.Flatten(2), Picks())
    net[0].weight.data = torch.tensor([1.0, -1.0]).view(2, 1, 1, 1)
    beside = explain(net, image.abs(), 0, method="eigencam", layer="0")
    assert beside.trust.kept.isfinite().all()


class Picks(nn.Module):
    """Scores the first channel."""

    def forward(self, flat: torch.Tensor) -> torch.Tensor:
        return flat[:, :1].square().mean(2)


def test_scores_are_told_between_those_of_the_image_and_of_its_blur():
    net = nn.Sequential(nn.Flatten(), nn.Linear(100, 1, bias=False))
    nn.init.zeros_(net[1].weight)
    net[1].weight.data[0, 55] = 2.0
    image = torch.zeros(1, 1, 10, 10)
    image[0, 0, 5, 5] = 1.0
    found = explain(net, image, 0, method="integrated_gradients")
    # The one pixel that counts is the hottest: shown or hidden, it is all.
    assert found.trust.kept.item() == pytest.approx(1.0)
    assert found.trust.lost.item() == pytest.approx(1.0)
    assert found.trust.blurred.item() == pytest.approx(2 * blur(image)[0, 0, 5, 5].item())


def trained() -> tuple[nn.Sequential, torch.Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(6 * 64, 3),
    ).eval()  # fmt: skip
    return net, torch.rand(4, 1, 16, 16)


def test_random_weights_are_drawn_from_the_layer_upwards_and_nowhere_else():
    net, images = trained()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    twin = Twin(net, channel_dim=None, grid=None)
    for layer, changed in (("3", {"3", "6"}), ("4", {"3", "6"}), ("6", {"6"}), (None, {"0", "3", "6"})):
        other = redrawn(twin, images, layer, 0).model.state_dict()
        assert {
            name.partition(".")[0] for name in other if not torch.equal(other[name], before[name])
        } == changed
        for name in ("3.weight", "6.weight"):
            assert other[name].std().item() == pytest.approx(before[name].std().item(), rel=0.15)
        again = redrawn(twin, images, layer, 0).model.state_dict()
        assert all(torch.equal(other[name], again[name]) for name in other)
    assert all(torch.equal(net.state_dict()[name], before[name]) for name in before)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")
def test_weights_of_a_part_in_torchscript_are_drawn_too():
    net, images = trained()
    scripted = nn.Sequential(net[0], torch.jit.script(net[1:])).eval()
    other = redrawn(Twin(scripted, channel_dim=None, grid=None), images, None, 0).model.state_dict()
    expected = redrawn(Twin(net, channel_dim=None, grid=None), images, None, 0).model.state_dict()
    assert [value.shape for value in other.values()] == [value.shape for value in expected.values()]
    assert all(map(torch.equal, other.values(), expected.values()))
    assert explain(scripted, images, 1, method="gradient").trust.rank_correlation.isfinite().all()


def test_weights_that_attention_uses_without_calling_their_module_are_drawn_too():
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Conv2d(1, 4, 2, 2)
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            tokens = self.embed(images).flatten(2).transpose(1, 2)
            return self.attention(tokens, tokens, tokens, need_weights=False)[0].mean(1) * self.scale

    net = Attends()
    other = redrawn(Twin(net, channel_dim=None, grid=None), torch.rand(1, 1, 4, 4), "attention", 0).model
    assert not torch.equal(other.attention.out_proj.weight, net.attention.out_proj.weight)
    assert not torch.equal(other.attention.in_proj_weight, net.attention.in_proj_weight)
    assert torch.equal(other.embed.weight, net.embed.weight)
    assert torch.equal(other.scale, net.scale)


def test_a_heatmap_that_ignores_the_weights_above_is_told():
    net, images = trained()
    guided, eigen = (
        explain(net, images, 1, method=method, **options).trust.rank_correlation
        for method, options in (("guided", {}), ("eigencam", {"layer": "0"}))
    )
    # The first layer's maps change with its own weights, and with none of those above.
    same = rank_correlation(*[explain(net, images, 1, method="eigencam", layer="0").heatmaps] * 2)
    assert same.tolist() == pytest.approx([1.0] * 4)
    assert (eigen.abs() < 0.9).all()
    assert (guided.abs() <= 1).all()


def test_a_target_that_finds_nothing_in_a_blurred_image_makes_nan():
    net, images = trained()

    def target(output: torch.Tensor) -> torch.Tensor:
        if not torch.equal(output, expected):
            raise IndexError("no box")
        return output[:, 0]

    with torch.no_grad():
        expected = net(images)
    found = explain(net, images, target, method="hirescam", layer="4")
    for figure in (found.trust.kept, found.trust.lost, found.trust.rank_correlation):
        assert torch.isnan(figure).all()
