"""All layers in one pass have the receptive fields that each has in a pass of its own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from torchlens_viz import receptive_field
from torchlens_viz.models.layers import named_layers
from torchlens_viz.receptive.everywhere import receptive_fields


class Residual(nn.Module):
    """Adds in place, so that what the second layer put out is written over."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.second = nn.Conv2d(4, 4, 5, padding=2)
        self.wide = nn.Conv2d(4, 4, 9, padding=4)
        self.unused = nn.Conv2d(1, 1, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps = self.first(images)
        out = self.second(maps)
        out += self.wide(maps)
        return out


def of_all(model: nn.Module, image: torch.Tensor):
    layers = named_layers(model)
    return receptive_fields(model, layers, (image,), {}, dict.fromkeys((name for name, _ in layers), 1))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_one_pass_gives_what_a_pass_per_layer_gives(device):
    net = Residual().to(device)
    found = of_all(net, torch.zeros(1, 3, 24, 20, device=device))
    assert set(found) == {"", "first", "second", "wide"}
    net = Residual()
    for name, field in found.items():
        assert field == receptive_field(net, name, (1, 3, 24, 20)), name
    assert found["second"].size == (11, 11)  # 3 + 2 * 4, and not what was added to it later
    assert found[""].size == (19, 19)


class Stranger(nn.Module):
    """Sorts, which has no rule."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Conv2d(3, 2, 3), nn.Conv2d(2, 2, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.after(self.before(images).sort(-1).values)


def test_what_comes_before_an_unknown_operation_is_known():
    assert set(of_all(Stranger(), torch.zeros(1, 3, 9, 9))) == {"before"}


class Reshaping(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        rows = images.flatten(2).type_as(images)
        return rows.view_as(images) + rows.mean(-1)[..., None, None].expand_as(images)


def test_shapes_and_types_of_other_tensors_are_taken():
    field = of_all(nn.Sequential(nn.Conv2d(3, 2, 3), Reshaping()), torch.zeros(1, 3, 6, 6))["1"]
    assert field.size == (6, 6)  # the mean sees all there is
    assert field.stride == (1.0, 1.0)


def test_several_outputs_constants_and_no_image_have_none():
    class Two(nn.Module):
        def forward(self, images):
            return images, images.new_zeros(1, 1, 2, 2)

    assert of_all(Two(), torch.zeros(1, 3, 4, 4)) == {}
    assert of_all(nn.Linear(3, 2), torch.zeros(1, 3)) == {}


def test_dependence_that_takes_too_much_memory_ends_what_is_known(monkeypatch):
    class Outer(nn.Module):
        """Every position beside every other, as in attention with relative positions."""

        def forward(self, maps):
            rows = maps.flatten(2)
            return (rows[..., None] + rows[:, :, None]).mean(-1)

    net = nn.Sequential(nn.Conv2d(3, 2, 3), Outer(), nn.ReLU())
    image = torch.zeros(1, 3, 12, 12)
    assert set(of_all(net, image)) == {"0", "1", "2", ""}
    monkeypatch.setattr("torchlens_viz.receptive.everywhere._MOST_NUMBERS", 5_000)  # 100 * 100 are needed
    assert set(of_all(net, image)) == {"0"}
