"""A copy has the weights of now and nothing of the original's; what cannot be copied so is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import torchlens_viz as tv
from torchlens_viz import explain, maximize, project, survey
from torchlens_viz.errors import InvalidTypeError
from torchlens_viz.models.copying import private_copy


class Anew(nn.Module):
    """Copies itself to a module with weights of its own."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def __deepcopy__(self, memo):
        return type(self)()

    def forward(self, x):
        return self.conv(x)


class Itself(Anew):
    def __deepcopy__(self, memo):
        return self


class PartItself(Anew):
    """As a singleton that is handed on."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(Itself())


class Another(Anew):
    def __deepcopy__(self, memo):
        return nn.Conv2d(3, 4, 3)


IMAGES = torch.rand(2, 3, 8, 8)
USES = {
    "maximize": lambda model: maximize(model, "conv", 1, size=8, steps=2),
    "project": lambda model: project(model, "conv", IMAGES[:1], 1),
    "explain": lambda model: explain(model, IMAGES[:1], lambda output: output.flatten(1)[:, 0]),
    "survey": lambda model: survey(
        model,
        [IMAGES],
        "conv",
        progress=False,
        target=lambda output, batch: output.flatten(1)[:, 0],
    ),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("kind", [Anew, Itself, PartItself, Another])
def test_a_model_that_copies_itself_to_something_else_is_refused(kind, use):
    model, state = kind(), torch.get_rng_state()
    before = {name: (id(each), each.detach().clone()) for name, each in model.named_parameters()}
    with pytest.raises(InvalidTypeError, match=r"copy.deepcopy makes something else \(`.*` differs\)"):
        USES[use](model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(id(each) == before[name][0] for name, each in model.named_parameters())
    assert all(torch.equal(each, before[name][1]) for name, each in model.named_parameters())
    assert all(module.training for module in model.modules())
    assert type(model).__name__ == kind.__name__  # no cut has been made in it
    assert model(torch.rand(1, 3, 8, 8)).shape == (1, 4, 6, 6)


class Faithful(Anew):
    """A `__deepcopy__` of its own that copies what there is."""

    def __deepcopy__(self, memo):
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        made.__dict__ = copy.deepcopy(self.__dict__, memo)
        return made


class Closing(nn.Module):
    """Runs a part by a function that closes over it, and another by one that closes over the model."""

    def __init__(self):
        super().__init__()
        norm = nn.BatchNorm2d(4)
        self.conv, self.norm, self.drop = nn.Conv2d(3, 4, 3), norm, nn.Dropout(0.5)
        self.by_part = lambda x, *, factor=2: factor * norm(x)
        self.by_model = lambda x: self.drop(x)
        with torch.no_grad():
            norm.running_mean.copy_(torch.tensor([1.0, 2, 3, 4]))

    def forward(self, x):
        return self.by_model(self.by_part(self.conv(x)))


@pytest.mark.parametrize("kind", [Faithful, Closing])
def test_a_copy_stands_for_the_model_and_leaves_it_alone(kind):
    torch.manual_seed(0)
    model = kind()
    before = {name: each.detach().clone() for name, each in model.state_dict().items()}
    result = maximize(model, "", [0, 3], size=8, steps=3, precision="float32")
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    assert all(module.training for module in model.modules())
    model.eval()
    told = model(result.images).detach().mean((2, 3))[[0, 1], [0, 3]]
    torch.testing.assert_close(result.scores, told)


def test_functions_of_a_copy_run_the_copy():
    model = Closing()
    twin = private_copy(model, torch.Tensor.clone)
    calls = []
    handle = model.norm.register_forward_hook(lambda *_: calls.append("the model's"))
    twin.norm.register_forward_hook(lambda *_: calls.append("the copy's"))
    twin(torch.rand(1, 3, 8, 8))
    handle.remove()
    assert calls == ["the copy's"]
    assert model.by_part.__closure__[0].cell_contents is model.norm


@pytest.mark.parametrize("nested", [False, True])
def test_what_torch_fx_traced_is_copied(nested):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval()
    traced = torch.fx.symbolic_trace(plain)
    model, of, prefix = (nn.Sequential(traced), nn.Sequential(plain), "0.") if nested else (traced, plain, "")
    image = torch.rand(3, 10, 10, generator=torch.Generator().manual_seed(0))

    def score(output):
        return output[:, 1].mean((1, 2))

    for method in ("gradient", "gradcam"):
        options = {"method": method, **({"layer": f"{prefix}3"} if method == "gradcam" else {})}
        found, expected = (tv.explain(each, image, score, **options) for each in (model, of))
        assert torch.equal(found.heatmaps, expected.heatmaps)
    found, expected = (
        tv.maximize(each, f"{prefix}3", [1], size=10, steps=3, progress=False) for each in (model, of)
    )
    assert torch.equal(found.images, expected.images)
