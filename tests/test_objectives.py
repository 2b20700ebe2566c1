"""Objectives: their values by numpy, how they are written, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from torchlens_viz import objectives
from torchlens_viz.errors import InvalidArgumentError, InvalidTypeError
from torchlens_viz.objectives import (
    Objective,
    Scene,
    channel,
    deepdream,
    direction,
    diversity,
    l2,
    neuron,
    objective_of,
    score,
    total_variation,
)


@pytest.fixture
def scene() -> Scene:
    return Scene(
        images=torch.rand(4, 3, 6, 8),
        channels=torch.tensor([2, 0, 2, 2]),
        target="a",
        activations={"a": torch.randn(4, 5, 3, 4), "b": torch.randn(4, 6), "c": torch.randn(4, 2, 7)},
    )


def values(scene: Scene, layer: str) -> np.ndarray:
    return scene.activations[layer].double().numpy()


def own(scene: Scene, layer: str) -> np.ndarray:
    return values(scene, layer)[np.arange(4), scene.channels.numpy()]


def close(objective: Objective, scene: Scene, expected: np.ndarray) -> None:
    result = objective(scene)
    assert result.dtype == torch.float32
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_a_channel_is_the_mean_or_the_maximum_of_its_map(scene):
    close(channel(), scene, own(scene, "a").mean((1, 2)))
    close(channel(reduce="max"), scene, own(scene, "a").max((1, 2)))
    close(channel(4), scene, values(scene, "a")[:, 4].mean((1, 2)))
    close(channel(1, layer="c"), scene, values(scene, "c")[:, 1].mean(1))


def test_a_dense_layer_has_a_value_per_channel(scene):
    for objective in (channel(layer="b"), channel(layer="b", reduce="max"), neuron(layer="b")):
        close(objective, scene, own(scene, "b"))
    close(channel(5, layer="b"), scene, values(scene, "b")[:, 5])
    close(direction([1, 2, 3, 4, 5, 6], layer="b"), scene, values(scene, "b") @ np.arange(1, 7))


def test_a_neuron_is_one_place_of_a_map_the_middle_one_unless_told(scene):
    close(neuron(), scene, own(scene, "a")[:, 1, 2])
    close(neuron(position=(2, 0)), scene, own(scene, "a")[:, 2, 0])
    close(neuron(1, position=[0, 3]), scene, values(scene, "a")[:, 1, 0, 3])
    close(neuron(1, layer="c", position=[6]), scene, values(scene, "c")[:, 1, 6])


def test_a_direction_is_a_dot_product_over_channels(scene):
    vector = np.array([1.0, -2.0, 0.5, 0.0, 3.0])
    close(direction(vector.tolist()), scene, values(scene, "a").mean((2, 3)) @ vector)
    at = direction(torch.tensor(vector), position=(2, 1))
    close(at, scene, values(scene, "a")[:, :, 2, 1] @ vector)


def test_dreaming_is_the_mean_square_of_a_layer(scene):
    close(deepdream(), scene, (values(scene, "a") ** 2).mean((1, 2, 3)))
    close(deepdream("b"), scene, (values(scene, "b") ** 2).mean(1))


def test_diversity_is_minus_the_mean_cosine_of_gram_matrices_within_a_channel(scene):
    maps = values(scene, "a").reshape(4, 5, 12)
    grams = [(each @ each.T).ravel() for each in maps]
    expected = np.zeros(4)
    for one in (0, 2, 3):
        others = [other for other in (0, 2, 3) if other != one]
        cosines = [
            grams[one] @ grams[other] / np.linalg.norm(grams[one]) / np.linalg.norm(grams[other])
            for other in others
        ]
        expected[one] = -np.mean(cosines)
    close(diversity(), scene, expected)


def test_terms_on_images_are_those_of_numpy(scene):
    images = scene.images.double().numpy()
    rough = np.abs(np.diff(images, axis=2)).sum((1, 2, 3)) + np.abs(np.diff(images, axis=3)).sum((1, 2, 3))
    close(total_variation(), scene, rough / (3 * 6 * 8))
    close(l2(), scene, ((images - 0.5) ** 2).mean((1, 2, 3)))
    close(l2(0.1), scene, ((images - 0.1) ** 2).mean((1, 2, 3)))


def test_the_algebra_is_that_of_numbers(scene):
    a, b, c = (
        own(scene, "a").mean((1, 2)),
        own(scene, "b"),
        ((scene.images.double().numpy() - 0.5) ** 2).mean((1, 2, 3)),
    )
    one, two, three = channel(), channel(layer="b"), l2()
    close(one + two, scene, a + b)
    close(one - two, scene, a - b)
    close(one * two, scene, a * b)
    close(-one, scene, -a)
    close(one / 4, scene, a / 4)
    close(3 * one, scene, 3 * a)
    close(one * 3, scene, 3 * a)
    close(1 - one, scene, 1 - a)
    close(1 + one - 2, scene, a - 1)
    close(2 * (one - (two - three)) * (one + 1), scene, 2 * (a - (b - c)) * (a + 1))


@pytest.mark.parametrize(
    ("objective", "text"),
    [
        (channel(), "channel()"),
        (channel(3, reduce="max"), "channel(3, reduce='max')"),
        (channel(layer="conv1"), "channel(layer='conv1')"),
        (neuron(position=(4, 7)), "neuron(position=(4, 7))"),
        (neuron(2, position=[1]), "neuron(2, position=(1,))"),
        (direction([1, -0.5]), "direction([1, -0.5])"),
        (deepdream("x"), "deepdream(layer='x')"),
        (diversity(), "diversity()"),
        (l2(), "l2()"),
        (l2(0.25), "l2(0.25)"),
        (channel(3) - 0.1 * total_variation(), "channel(3) - 0.1 * total_variation()"),
        (channel() - (l2() + 1), "channel() - (l2() + 1)"),
        (channel() - (l2() - 1), "channel() - (l2() - 1)"),
        (channel() + (l2() - 1), "channel() + l2() - 1"),
        (2 * (channel() + 1), "2 * (channel() + 1)"),
        ((channel() - 1) * (l2() + 2), "(channel() - 1) * (l2() + 2)"),
        (-(channel() + 1), "-1 * (channel() + 1)"),
        (1 - channel() * 2, "1 - channel() * 2"),
        (channel() / 4, "channel() * 0.25"),
        (score(np.sum), "score(sum)"),
    ],
)
def test_an_objective_is_written_as_it_is_made(objective, text):
    assert repr(objective) == text
    names = {name: getattr(objectives, name) for name in ("channel", "neuron", "direction", "deepdream")}
    names |= {"diversity": diversity, "l2": l2, "total_variation": total_variation}
    if "score" not in text:  # and what is written makes the same again
        assert repr(eval(text, names)) == text


def test_what_is_written_has_the_value_of_what_was_made(scene):
    made = [
        channel() - (l2() - 1),
        channel() + (l2() - 1),
        2 * (channel() + 1) * (l2() - 3),
        -(channel() + 1) - -2 * l2(),
        (channel() - 1) - (l2() + 2) * 3 / 2,
    ]
    for objective in made:
        again = eval(repr(objective), {"channel": channel, "l2": l2})
        torch.testing.assert_close(again(scene), objective(scene))


def test_objectives_know_what_they_look_at():
    assert channel().uses_target
    assert not channel(3).uses_target
    assert not direction([1.0]).uses_target
    assert (channel(3) + channel()).uses_target
    assert (channel() + channel(layer="x")).layers == {None, "x"}
    assert total_variation().layers == frozenset()
    assert score(len, layers=["x"]).layers == {None, "x"}
    assert (channel() + diversity()).couples
    assert not channel().couples


@pytest.mark.parametrize(
    ("objective", "linear"),
    [
        (channel(), True),
        (neuron(1), True),
        (direction([1.0, 2.0]), True),
        (2 * channel() - neuron() / 3 + 1, True),
        (channel() * 2, True),
        (channel(reduce="max"), False),
        (channel(layer="x"), False),
        (channel() * channel(), False),
        (channel() + l2(), False),
        (channel() - total_variation(), False),
        (deepdream(), False),
        (diversity(), False),
        (score(len), False),
    ],
)
def test_only_affine_functions_of_the_layer_count_as_linear(objective, linear):
    assert objective.is_linear == linear


def test_names_and_functions_make_objectives():
    assert repr(objective_of("mean")) == "channel()"
    assert repr(objective_of("max")) == "channel(reduce='max')"
    assert repr(objective_of("center")) == "neuron()"
    own = channel(2)
    assert objective_of(own) is own
    assert "<lambda>" in repr(objective_of(lambda scene: scene.images.sum((1, 2, 3))))
    with pytest.raises(InvalidArgumentError, match="`objective` must be one of 'mean', 'max', 'center'"):
        objective_of("sum")


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (
            lambda: channel(reduce="sum"),
            InvalidArgumentError,
            '`reduce` must be "mean" or "max", got \'sum\'',
        ),
        (lambda: channel(layer=3), InvalidTypeError, "`layer` must be a name, got 3"),
        (lambda: direction([]), InvalidArgumentError, "`vector` must be finite numbers"),
        (lambda: direction([[1.0]]), InvalidArgumentError, r"`vector` must be finite numbers.*\(1, 1\)"),
        (lambda: direction([1.0, float("nan")]), InvalidArgumentError, "`vector` must be finite numbers"),
        (lambda: score(3), InvalidTypeError, "`function` must be callable, got 3"),
        (lambda: channel() + "1", InvalidTypeError, "combines with objectives and numbers, got '1'"),
        (lambda: channel() * True, InvalidTypeError, "combines with objectives and numbers, got True"),
        (lambda: None - channel(), InvalidTypeError, "combines with objectives and numbers, got None"),
    ],
)
def test_terms_that_cannot_be_are_refused(make, error, match):
    with pytest.raises(error, match=match):
        make()


@pytest.mark.parametrize(
    ("objective", "match"),
    [
        (channel(5), "`channel` must be an index from 0 to 4 of the layer, got 5"),
        (channel(-1), "`channel` must be an index from 0 to 4 of the layer, got -1"),
        (neuron(position=(3, 0)), r"`position` must lie in maps of \(3, 4\), got \(3, 0\)"),
        (neuron(position=(1,)), r"`position` must lie in maps of \(3, 4\), got \(1,\)"),
        (neuron(position=(-1, 0)), r"`position` must lie in maps of \(3, 4\)"),
        (direction([1.0, 2.0]), "a weight for each of the layer's 5 channels, got 2"),
        (direction([1.0] * 6, layer="b", position=(0,)), r"`position` must lie in maps of \(\)"),
        (score(lambda s: s.activation().mean()), r"one number per image, \(4,\), got \(\)"),
        (score(lambda s: s.activation()), r"one number per image, \(4,\), got \(4, 5, 3, 4\)"),
        (score(lambda s: 3.0), r"one number per image, \(4,\), got float"),
    ],
)
def test_values_that_cannot_be_are_refused(scene, objective, match):
    with pytest.raises(InvalidArgumentError, match=match):
        objective(scene)


def test_gradients_of_the_sum_separate_into_one_per_image(scene):
    objective = channel() - 0.1 * l2() + neuron(1) * channel(layer="b") + deepdream("c")
    maps = scene.activations["a"].requires_grad_()
    objective(scene)[1].backward()
    assert maps.grad[1].abs().sum() > 0
    assert maps.grad[[0, 2, 3]].abs().sum() == 0
