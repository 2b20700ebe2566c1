"""One capture for all layers: whoever looks at them is told which layer each tensor is from."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from torchlens_viz import survey
from torchlens_viz.errors import CaptureError
from torchlens_viz.hooks.capture import Capture
from torchlens_viz.hooks.forward import refuse_unhookable
from torchlens_viz.hooks.sink import Sink, real_tensor
from torchlens_viz.models.layers import select


class Noted(Sink[list[Any]]):
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def open(self, layers: Sequence[str]) -> list[Any]:
        self.told.append(("open", *layers))
        return self.told

    def keep(self, tensor: Any, layer: str) -> str:
        self.told.append(("keep", layer, tuple(tensor.shape)))
        return f"a tensor of {layer}"

    def record(self, names: Sequence[str], kept: Any) -> None:
        self.told.append(("record", *names, kept))

    def close(self) -> None:
        self.told.append(("close",))


def watched(model: nn.Module, layers: Any, sink: Sink[Any], **options: Any) -> Capture[Any]:
    selected = select(model, layers)
    check = partial(refuse_unhookable, model, selected, stop=False, compiled="eager")
    return Capture(model, selected, check, sink, **options)


class Shared(nn.Module):
    """One convolution under two names, which runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.second = nn.Conv2d(1, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


def test_a_sink_hears_of_every_tensor_and_every_call_with_the_layer_s_name():
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU())
    with watched(net, ["0", "1"], Noted()) as told:
        net(torch.zeros(3, 1, 4, 5))
    assert told == [
        ("open", "0", "1"),
        ("keep", "0", (3, 2, 4, 5)),
        ("record", "0", "a tensor of 0"),
        ("keep", "1", (3, 2, 4, 5)),
        ("record", "1", "a tensor of 1"),
        ("close",),
    ]


def test_a_layer_under_two_names_is_one_call_of_both():
    net = Shared()
    with watched(net, ["first", "second"], Noted()) as told:
        net(torch.zeros(1, 1, 2, 2))
    assert [entry for entry in told if entry[0] == "record"] == [
        ("record", "first", "second", "a tensor of first")
    ] * 2


def test_a_sink_is_closed_whatever_happens():
    noted = Noted()
    with pytest.raises(ZeroDivisionError), watched(nn.Conv2d(1, 1, 1), "", noted):
        raise ZeroDivisionError
    assert noted.told[-1] == ("close",)


def test_what_a_sink_raises_ends_the_pass_and_leaves_no_hook():
    class Refusing(Noted):
        def keep(self, tensor: Any, layer: str) -> str:
            raise CaptureError(f"`{layer}` is refused")

    net = nn.Sequential(nn.Conv2d(1, 1, 1))
    with pytest.raises(CaptureError, match="`0` is refused"), watched(net, "0", Refusing()):
        net(torch.zeros(1, 1, 2, 2))
    assert not net[0]._forward_hooks


def test_a_tensor_of_a_transform_is_no_real_tensor():
    def inside(x: torch.Tensor) -> torch.Tensor:
        with pytest.raises(CaptureError, match=r"`conv` ran inside torch\.vmap"):
            real_tensor(x, "conv")
        return x

    torch.vmap(inside)(torch.zeros(2, 3))
    plain = torch.zeros(2)
    assert real_tensor(plain, "conv") is plain


@pytest.mark.parametrize("layers", [3, 30])
def test_a_survey_enters_one_capture_however_many_layers_there_are(layers, monkeypatch):
    net = nn.Sequential(*(nn.Conv2d(1, 1, 1) for _ in range(layers)))
    entered = []
    enter = Capture.__enter__
    monkeypatch.setattr(Capture, "__enter__", lambda self: (entered.append(self), enter(self))[1])
    found = survey(net, [torch.ones(2, 1, 3, 3)], nn.Conv2d, progress=False)
    assert len(entered) == 1
    assert len(found.stats) == layers


def test_a_survey_knows_a_layer_under_both_of_its_names():
    net, images = Shared(), torch.randn(8, 1, 3, 3)
    found = survey(net, images.split(4), ["first", "second"], progress=False)
    assert found.inputs_seen == {"first": 8, "second": 8}
    assert torch.equal(found.stats["first"].mean, found.stats["second"].mean)
    assert torch.equal(found.top["first"].values, found.top["second"].values)
    assert found.stats["first"].count.item() == 2 * 8 * 9
