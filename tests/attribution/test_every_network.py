"""Ten networks through `explain` and `project`: right or refused, and nothing has changed after."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from tests.attribution.test_networks import _memory_goes_back, standing  # noqa: F401
from tests.attribution.test_project_networks import by_hand
from torchlens_viz import explain, project
from torchlens_viz.errors import InvalidArgumentError

models = pytest.importorskip("torchvision.models")


class Network(NamedTuple):
    """What to ask of a network.

    Attributes:
        layer: Whose maps are explained.
        deep: A layer to project from.
        refused: What the rules for ReLUs are not defined for on the way to the score, by its words.
        refused_at: The same on the way to `deep`.
        target: What is explained.
        dim: The dimension that counts channels in what the layers put out.
        options: Of the network.
    """

    layer: str
    deep: str
    refused: str = ""
    refused_at: str = ""
    target: Any = 7
    dim: int = 1
    options: dict[str, Any] = {}  # noqa: RUF012


def of_the_mask(output: dict[str, torch.Tensor]) -> torch.Tensor:
    return output["out"][:, 3].mean((1, 2))


def of_the_best_box(boxes: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    return torch.stack([each["scores"].max() for each in boxes])


NETWORKS = {
    "resnet18": Network("layer3", "layer2"),
    "vgg16": Network("features.22", "features.10"),
    "densenet121": Network("features.denseblock3", "features.denseblock1"),
    "mobilenet_v3_small": Network("features.8", "features.2", "applies hardswish", "applies hardswish"),
    "googlenet": Network("inception4e", "inception3a", options={"init_weights": True}),
    "swin_t": Network("features.5", "features.1", "applies softmax", "applies softmax", dim=3),
    "vit_b_16": Network("conv_proj", "conv_proj", "applies multi_head", options={"image_size": 64}),
    "convnext_tiny": Network("features.5", "features.1", "applies gelu", "applies gelu"),
    "fcos_resnet50_fpn": Network(
        "backbone.body.layer4", "backbone.body.layer2", "applies sigmoid", target=of_the_best_box,
        options={"weights_backbone": None, "min_size": 64, "max_size": 96, "score_thresh": 0.0},
    ),
    "deeplabv3_resnet50": Network(
        "backbone.layer4", "backbone.layer2", target=of_the_mask, options={"weights_backbone": None}
    ),
}  # fmt: skip


def plus_plus(values: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    positive, total = gradients.relu(), values.sum((1, 2), keepdim=True).clamp(min=0)
    squares = positive**2
    shares = squares / (2 * squares + total * positive**3).clamp(min=1e-30)
    return ((shares * positive).sum((1, 2), keepdim=True) * values).sum(0).relu()


PARTS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "gradcam++": plus_plus,
    "gradcam": lambda values, gradients: (gradients.mean((1, 2), keepdims=True) * values).sum(0).relu(),
    "hirescam": lambda values, gradients: (gradients * values).sum(0).relu(),
    "layercam": lambda values, gradients: (gradients.relu() * values).sum(0).relu(),
}


def state_of(model: nn.Module) -> dict[str, Any]:
    """All that may not change: what is in the model, its modes and hooks, gradients, switches and numbers."""
    switches = (
        torch.backends.cudnn, torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None),
    )  # fmt: skip
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {
        "values": [(name, each.detach().clone()) for name, each in tensors],
        "the same memory": [(name, each.data_ptr(), each._version) for name, each in tensors],
        "gradients": [(name, each.grad) for name, each in model.named_parameters()],
        "requires_grad": [each.requires_grad for each in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "kinds": [type(module) for module in model.modules()],
        "hooks": [
            {name: [*value] for name, value in vars(module).items() if name.endswith("_hooks")}
            for module in model.modules()
        ],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "numbers": torch.get_rng_state(),
        "switches": [(each.allow_tf32 if hasattr(each, "allow_tf32") else None) for each in switches],
        "modes of torch": (
            torch.is_grad_enabled(), torch.get_default_dtype(), torch.is_autocast_enabled("cpu"),
            torch.are_deterministic_algorithms_enabled(),
        ),
    }  # fmt: skip


def is_same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(is_same, one, other))
    return bool(one == other)


def as_it_is_trained(name: str, options: dict[str, Any]) -> nn.Module:
    """A network in training, some of it frozen, with a gradient and a hook of the caller's."""
    torch.manual_seed(0)
    model = models.get_model(name, weights=None, **options).train()
    for parameter in [*model.parameters()][::5]:
        parameter.requires_grad_(False)
    if name == "vit_b_16":
        nn.init.normal_(model.heads.head.weight)  # zero as it is built
    trained = next(each for each in model.parameters() if each.requires_grad)
    trained.grad = torch.ones_like(trained)
    model.register_forward_hook(lambda module, args, output: pytest.fail("a hook of the caller's ran"))
    return model


def expected_of(model: nn.Module, layer: str, images: torch.Tensor, target: Any) -> tuple[torch.Tensor, ...]:
    """Score, gradient at the pixels, maps and gradients there, by plain autograd on an eager copy."""
    twin = copy.deepcopy(model).eval()
    twin._forward_hooks.clear()
    kept = {}
    twin.get_submodule(layer).register_forward_hook(lambda module, args, output: kept.update(maps=output))
    leaf = images.clone().requires_grad_()
    output = twin(leaf * 1)
    score = target(output) if callable(target) else output[:, target]
    at_pixels, at_maps = torch.autograd.grad(score.sum(), [leaf, kept["maps"]])
    return score.detach(), at_pixels, kept["maps"].detach(), at_maps


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the model has forward hooks that are not its own:UserWarning")
@pytest.mark.parametrize("name", NETWORKS)
def test_explain_and_project_are_right_or_refuse_and_leave_no_trace(name):
    asked, images = NETWORKS[name], torch.rand(1, 3, 64, 64 if name == "vit_b_16" else 96)
    model = as_it_is_trained(name, asked.options)
    score, at_pixels, maps, at_maps = expected_of(model, asked.layer, images, asked.target)
    before = state_of(model)

    # At the layer, by the formulas, each value where its position stands.
    values, gradients = (each.movedim(asked.dim, 1)[0] for each in (maps, at_maps))
    for method, part in PARTS.items():
        found = explain(model, images, asked.target, method=method, layer=asked.layer)
        torch.testing.assert_close(found.scores, score, rtol=1e-4, atol=1e-6)
        by_formula = part(values.double(), gradients.double()).float()
        if name == "vit_b_16":
            heatmap = nn.functional.interpolate(by_formula[None, None], (64, 64), mode="bilinear")[
                0, 0
            ].numpy()
        else:
            heatmap = standing(model_without_hook(model), asked.layer, by_formula.double().numpy())
        size = max(float((gradients * values).abs().sum(0).max()), float(by_formula.max()))
        np.testing.assert_allclose(found.heatmaps[0].numpy(), heatmap, rtol=0, atol=1e-4 * size)
    found = explain(model, images, asked.target, method="eigencam", layer=asked.layer)
    assert bool((found.heatmaps >= 0).all())
    assert bool(found.heatmaps.any())

    # At the pixels.
    found = explain(model, images, asked.target, method="gradient")
    strength = at_pixels.abs().amax(1)
    torch.testing.assert_close(found.heatmaps, strength, rtol=1e-3, atol=1e-4 * float(strength.max()))
    if asked.refused:
        with pytest.raises(InvalidArgumentError, match=re.escape(asked.refused)):
            explain(model, images, asked.target, method="guided")
    else:
        assert explain(model, images, asked.target, method="guided").heatmaps.any()

    # From units.
    for rule in ("gradient", "deconvnet", "guided"):
        if asked.refused_at and rule != "gradient":
            with pytest.raises(InvalidArgumentError, match=re.escape(asked.refused_at)):
                project(model, asked.deep, images, [1], rule=rule)
            continue
        seen = project(model, asked.deep, images, [1], rule=rule)
        place = tuple(seen.positions[0].tolist())
        if asked.dim == 1:
            expected = by_hand(model_without_hook(model), asked.deep, images[0], 1, place, rule)
            scale = float(expected.abs().amax())
            torch.testing.assert_close(seen.images[0], expected, rtol=1e-3, atol=1e-4 * scale)

    after = state_of(model)
    assert [key for key in before if not is_same(before[key], after[key])] == []


def model_without_hook(model: nn.Module) -> nn.Module:
    """A copy that may run."""
    twin = copy.deepcopy(model).eval()
    twin._forward_hooks.clear()
    return twin


def test_the_guard_against_traces_can_fail():
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1))
    for change, key in (
        (lambda: model.register_forward_hook(print), "hooks"),
        (lambda: model[1].eval(), "modes"),
        (lambda: model(torch.rand(2, 1, 2, 2)).sum().backward(), "gradients"),
        (lambda: model[0].requires_grad_(False), "requires_grad"),
        (lambda: torch.rand(1), "numbers"),
        (lambda: model[1].running_mean.add_(1), "values"),
    ):
        before = state_of(model)
        change()
        assert key in [key for key, value in before.items() if not is_same(value, state_of(model)[key])]
        model._forward_hooks.clear()
