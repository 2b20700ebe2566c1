"""Effects are what gradients say of channels, and what becomes of the loss without them."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.nets import Repeats, assert_as_before, snapshot
from torchlens_viz import Survey, ablate, survey
from torchlens_viz.errors import InvalidArgumentError
from torchlens_viz.stats.comoments import rank_correlation


def net() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 8, 3, stride=2),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    ).eval()


def batches(sizes=(5, 3, 4), size=9):
    generator = torch.Generator().manual_seed(4)
    return [
        (torch.randn(n, 3, size, size, generator=generator), torch.randint(4, (n,), generator=generator))
        for n in sizes
    ]


def found_in(model, data, layers="*", **options) -> Survey:
    return survey(model, data, layers, loss="cross_entropy", progress=False, top_k=0, **options)


def by_hooks(model, data, layer) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """G and P of every input and the activations, (N, C) each, one input after the other in float64."""
    model = copy.deepcopy(model).double().requires_grad_(True)
    gradients, products, means = [], [], []
    for images, labels in data:
        for image, label in zip(images, labels, strict=True):
            kept = []

            def keep(module, args, output, kept=kept):
                output.retain_grad()
                kept.append(output)
                return output.clone()

            handle = model.get_submodule(layer).register_forward_hook(keep)
            F.cross_entropy(model(image[None].double()), label[None]).backward()
            handle.remove()
            maps = [each.detach().reshape(*each.shape[:2], -1) for each in kept]
            slopes = [each.grad.reshape(*each.shape[:2], -1) for each in kept]
            gradients.append(sum(slope.sum((0, 2)) for slope in slopes).numpy())
            products.append(sum((s * m).sum((0, 2)) for s, m in zip(slopes, maps, strict=True)).numpy())
            means.append(torch.cat(maps, 2).mean((0, 2)).numpy())
    return np.array(gradients), np.array(products), np.array(means)


@pytest.mark.parametrize("layer", ["0", "2", "3", "6", "7"])
def test_effects_are_those_of_a_plain_loop_over_inputs(layer):
    model, data = net(), batches()
    found = found_in(model, data)
    gradients, products, means = by_hooks(model, data, layer)
    for by, value in (("zero", np.zeros(means.shape[1])), ("mean", means.mean(0))):
        each = value * gradients - products  # (N, C), of every input
        effect = found.effects.of(layer, by=by)
        np.testing.assert_allclose(effect.change, each.mean(0), rtol=1e-4, atol=1e-8)
        error = each.std(0, ddof=1) / len(each) ** 0.5
        np.testing.assert_allclose(effect.error, error, rtol=1e-3, atol=1e-8)
    assert torch.equal(found.effects[layer], found.effects.of(layer).change)
    assert found.effects[layer].dtype == torch.float64


def test_a_layer_that_runs_twice_counts_with_both_calls():
    torch.manual_seed(0)
    model = nn.Sequential(Repeats(), nn.Flatten(), nn.Linear(2 * 2 * 4, 4))
    data = [(images[:, :2, :4, :4].contiguous(), labels) for images, labels in batches()]
    found = found_in(model, data, ["0.conv", "0.alias"])
    _, products, _ = by_hooks(model, data, "0.conv")
    np.testing.assert_allclose(found.effects["0.conv"], -products.mean(0), rtol=1e-4, atol=1e-8)
    assert torch.equal(found.effects["0.conv"], found.effects["0.alias"])


def test_of_a_linear_loss_the_estimate_is_exact():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 2))

    def loss(output, batch):
        return output[:, 0] * batch[1]

    data = batches()
    found = survey(model, data, "0", loss=loss, progress=False)
    for by in ("zero", "mean"):
        exact = ablate(model, data, "0", loss=loss, by=by)
        effect = found.effects.of("0", by=by)
        np.testing.assert_allclose(effect.change, exact.loss_change, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(effect.error, exact.loss_error, rtol=1e-3, atol=1e-6)


def test_a_channel_that_is_read_with_weight_zero_has_no_effect():
    model = net()
    with torch.no_grad():
        model[0].bias[2] = 100
        model[3].weight[:, 2] = 0
    effects = found_in(model, batches(), "2").effects["2"]
    assert effects[2] == 0
    assert (effects.abs() > 0).sum() == 5


def test_a_frozen_network_and_one_that_is_trained_give_the_same():
    model, data = net(), batches()
    frozen = copy.deepcopy(model).requires_grad_(False)
    with torch.inference_mode():
        one = found_in(frozen, data).effects
    other = found_in(model, data).effects
    assert list(one) == list(other) == ["0", "1", "2", "3", "4", "5", "6", "7"]
    for layer in one:
        np.testing.assert_allclose(one[layer], other[layer], rtol=1e-6, atol=1e-12)


def test_parts_merge_to_the_whole_and_files_hold_effects(tmp_path):
    model, data = net(), batches()
    whole = found_in(model, data)
    first = found_in(model, data[:1])
    second = found_in(model, data[1:], indices=range(5, 12))
    merged = first.merge(second)
    again = Survey.load(whole.save(tmp_path / "found.safetensors"))
    for by in ("zero", "mean"):
        for found in (merged, again):
            for got, expected in zip(found.effects.of("3", by), whole.effects.of("3", by), strict=True):
                np.testing.assert_allclose(got, expected, rtol=1e-12)
    with pytest.raises(InvalidArgumentError, match=r"both must have been surveyed with a `loss`, or neither"):
        first.merge(survey(model, data[1:], "*", indices=range(5, 12), top_k=0, progress=False))


class BrokenOffError(Exception):
    pass


def test_a_survey_that_was_broken_off_goes_on_to_the_same_bits(tmp_path):
    model, data = net(), batches((2, 2, 2, 2))
    whole = found_in(model, data)

    class Loader(list):
        def __iter__(self):
            for number, batch in enumerate(super().__iter__()):
                if number == 3 and not self.is_second:
                    raise BrokenOffError
                yield batch

    loader, path = Loader(data), tmp_path / "begun"
    loader.is_second = False
    with pytest.raises(BrokenOffError):
        found_in(model, loader, checkpoint=path, checkpoint_seconds=0)
    loader.is_second = True
    found = found_in(model, loader, checkpoint=path, checkpoint_seconds=0)
    for layer in whole.effects:
        for got, expected in zip(
            found.effects.of(layer, "mean"), whole.effects.of(layer, "mean"), strict=True
        ):
            assert torch.equal(got, expected)
    with pytest.raises(Exception, match=r"`loss` was 'cross_entropy' and now is None"):
        survey(model, data, "*", top_k=0, progress=False, checkpoint=path)


def test_statistics_and_top_inputs_are_those_of_a_survey_without_a_loss():
    model, data = net(), batches()
    one = survey(model, data, "*", progress=False, loss="cross_entropy")
    other = survey(model, data, "*", progress=False)
    for layer in other.stats:
        assert torch.equal(one.top[layer].samples, other.top[layer].samples)
        np.testing.assert_allclose(one.stats[layer].mean, other.stats[layer].mean, rtol=1e-6, atol=1e-9)
        assert one.dead(layer).tolist() == other.dead(layer).tolist()


def test_the_network_is_as_before():
    model = net().train()
    model[1].eval()
    before = snapshot(model)
    found_in(model, batches())
    assert_as_before(model, before)


def test_without_a_loss_there_are_no_effects():
    found = survey(net(), batches(), "0", progress=False)
    assert found.effects == {}
    with pytest.raises(InvalidArgumentError, match=r"effects need gradients; make the survey with a `loss`"):
        found.effects.of("0")


def test_a_loss_that_depends_on_nothing_is_refused():
    with pytest.raises(InvalidArgumentError, match=r"`loss` must depend on what the layers put out"):
        survey(net(), batches(), "0", loss=lambda out, batch: out.detach()[:, 0], progress=False)
    with pytest.raises(InvalidArgumentError, match=r"`loss` must return one number per input, \(5,\), got"):
        survey(net(), batches(), "0", loss=lambda out, batch: out.mean(), progress=False)
    with pytest.raises(InvalidArgumentError, match=r"`label_of` has no effect without `loss"):
        survey(net(), batches(), "0", label_of=1, progress=False)


def test_a_layer_that_the_loss_does_not_see_has_no_effect():
    class Beside(nn.Module):
        def __init__(self):
            super().__init__()
            self.seen, self.late = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)

        def forward(self, value):
            return (self.seen(value), self.late(value))[0]

    def loss(out, batch):
        return out.sum((1, 2, 3))

    data = [(torch.randn(3, 2, 4, 4), torch.zeros(3))]
    found = survey(Beside(), data, ["seen", "late"], loss=loss, progress=False)
    assert found.effects["late"].tolist() == [0, 0]
    assert (found.effects["seen"] != 0).all()
    with pytest.raises(InvalidArgumentError, match=r"`loss` must depend on .* no gradient leads .* `late`"):
        survey(Beside(), data, "late", loss=loss, progress=False)


@pytest.mark.parametrize("how", ["forward", "layers"])
def test_layers_that_do_not_run_in_the_copy_are_named(how):
    model = net()
    if how == "forward":
        model.forward = lambda value, forward=model.forward: forward(value)  # the original's, in the copy too
    else:
        model.idle = nn.Conv2d(1, 1, 1)
        model.forward = lambda value: nn.Sequential.forward(model[:8], value)
    with pytest.raises(InvalidArgumentError, match=r"none of them did in the copy of the model"):
        found_in(model, batches(), "0" if how == "forward" else "idle")


def test_a_graph_that_begins_before_the_layers_is_gone_back_through():
    model, data = net(), batches()
    expected = found_in(model, data).effects
    given = [(images.clone().requires_grad_(), labels) for images, labels in data]
    found = found_in(model, given).effects
    for layer in expected:
        assert torch.equal(found[layer], expected[layer])
    assert all(images.grad is None for images, _ in given)


def test_target_and_loss_go_together_and_give_what_each_does_alone():
    def target(output, batch):
        return output.gather(1, batch[1][:, None])[:, 0]

    model, data = net(), batches()
    both = survey(model, data, "*", loss="cross_entropy", target=target, progress=False)
    effects = survey(model, data, "*", loss="cross_entropy", progress=False).effects
    relevant = survey(model, data, "*", target=target, progress=False).top_by_relevance
    assert list(both.effects) == list(effects) == list(relevant)
    for layer in effects:
        for ours, theirs in zip(both.effects.of(layer, "mean"), effects.of(layer, "mean"), strict=True):
            assert torch.equal(ours, theirs)
        for part in ("values", "samples", "positions"):
            ours, theirs = (getattr(each[layer], part) for each in (both.top_by_relevance, relevant))
            assert torch.equal(ours, theirs)


def planted(seed: int) -> tuple[nn.Module, list, int, int, tuple[int, int]]:
    """A network of eight channels whose worth is known.

    One carries a class, one is read with weight zero, two say the same; the others are noise, read faintly.
    """
    generator = torch.Generator().manual_seed(seed)
    carrier, idle, one, other = torch.randperm(8, generator=generator)[:4].tolist()
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    )
    labels = torch.arange(30) % 3
    images = F.one_hot(labels, 3).float()[:, :, None, None].expand(-1, -1, 4, 4)
    images = images + 0.1 * torch.rand(30, 3, 4, 4, generator=generator)
    with torch.no_grad():
        model[0].bias.zero_()
        model[0].weight.copy_(0.1 * torch.rand(8, 3, 1, 1, generator=generator))
        model[0].weight[carrier] = torch.eye(3)[0, :, None, None]
        model[0].weight[idle] = 50
        for twin in (one, other):
            model[0].weight[twin] = torch.eye(3)[1, :, None, None]
        model[4].weight.copy_(0.05 * torch.randn(3, 8, generator=generator))
        model[4].bias.zero_()
        model[4].weight[:, idle] = 0
        model[4].weight[:, carrier] = torch.tensor([0.8, -0.8, -0.8])
        for twin in (one, other):
            model[4].weight[:, twin] = torch.tensor([-0.2, 0.2, -0.2])
    return model, [(images, labels)], carrier, idle, (one, other)


@pytest.mark.slow
def test_planted_facts_are_found_in_200_networks_and_what_must_be_missed_is():
    for seed in range(200):
        model, data, carrier, idle, twins = planted(seed)
        found = found_in(model, data, "1")
        effects = found.effects["1"]
        assert found.stats["1"].mean.argmax() == idle  # fires strongest
        assert (effects == 0).nonzero().flatten().tolist() == [idle]
        exact = ablate(model, data, "1", loss="cross_entropy").loss_change
        assert exact.argmax() == carrier
        assert effects.argmax() == carrier
        # Of channels that say the same, each is worth little, and both together more than both by themselves.
        without = copy.deepcopy(model)
        without[4].weight.data[:, twins] = 0
        losses = [F.cross_entropy(each(data[0][0]), data[0][1]).item() for each in (without, model)]
        by_itself = exact[list(twins)].sum()
        assert losses[0] - losses[1] > 1.05 * by_itself > 1.05 * effects[list(twins)].sum()


def test_trust_is_the_rank_correlation_with_what_was_measured():
    model, data = net(), batches()
    found = found_in(model, data, "*")
    last = ablate(model, data, "6", loss=lambda out, batch: F.cross_entropy(out, batch[1], reduction="none"))
    ranks = [np.argsort(np.argsort(each.numpy())) for each in (found.effects["6"], last.loss_change)]
    assert found.effects.trust(last) == pytest.approx(np.corrcoef(*ranks)[0, 1])
    for options, message in (({"channels": [0, 1]}, "got 2 by"), ({"by": "resample"}, 'got 8 by "resample"')):
        exact = ablate(model, data, "6", options.pop("channels", None), loss="cross_entropy", **options)
        with pytest.raises(
            InvalidArgumentError, match=rf"`exact` must be of three channels or more .* {message}"
        ):
            found.effects.trust(exact)


def test_equal_numbers_share_the_mean_of_their_ranks():
    ours, theirs = torch.tensor([1.0, 1.0, 2.0, 3.0]), torch.tensor([4.0, 5.0, 6.0, 6.0])
    expected = np.corrcoef([1.5, 1.5, 3, 4], [1, 2, 3.5, 3.5])[0, 1]
    assert rank_correlation(ours, theirs) == pytest.approx(expected)
    assert np.isnan(rank_correlation(ours, torch.ones(4)))
