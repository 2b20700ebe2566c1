"""A model without values, lazy, on the meta device or fake, is refused in one message and stays as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn.parameter import is_lazy

import torchlens_viz as tv
from torchlens_viz import Monitor
from torchlens_viz.errors import InvalidArgumentError, InvalidTypeError

IMAGES = torch.rand(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))
LABELLED = [(IMAGES, torch.tensor([0, 1, 0, 1]))]


def net(head=nn.Linear):
    sizes = (128, 2) if head is nn.Linear else (2,)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.Flatten(), head(*sizes)).eval()


def fake():
    with FakeTensorMode():
        return net()


FOR_VALUES = {
    "maximize": lambda model, _: tv.maximize(model, "0", [0], size=12, steps=1),
    "project": lambda model, _: tv.project(model, "0", IMAGES[0]),
    "explain": lambda model, _: tv.explain(model, IMAGES[0], 0),
    "survey": lambda model, _: tv.survey(model, [IMAGES], "0", progress=False),
    "survey with a loss": lambda model, _: tv.survey(
        model, LABELLED, "0", loss="cross_entropy", progress=False
    ),
    "survey with a file": lambda model, folder: tv.survey(
        model, [IMAGES], "0", checkpoint=folder / "begun", progress=False
    ),
    "ablate": lambda model, _: tv.ablate(model, LABELLED, "0", loss="cross_entropy"),
    "compare": lambda model, _: tv.compare(model, model, IMAGES),
    "overlay_grid": lambda model, _: tv.overlay_grid(model, "0", IMAGES[0]),
    "report": lambda model, folder: tv.report(model, IMAGES[:1], folder / "report.html"),
}
FOR_SHAPES = {
    "layers": lambda model, _: tv.layers(model, IMAGES),
    "receptive_field": lambda model, _: tv.receptive_field(model, "2", (1, 3, 12, 12)),
}


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize("name", [*FOR_VALUES, *FOR_SHAPES, "pair_grid"])
def test_a_lazy_model_is_refused_and_not_given_values(name, tmp_path):
    acts = {**FOR_VALUES, **FOR_SHAPES, "pair_grid": lambda model, _: tv.pair_grid(model, "0", IMAGES[0])}
    model = net(nn.LazyLinear)
    with pytest.raises(
        InvalidArgumentError, match=r"`model` has lazy parameters, .*; run it once on an input"
    ):
        acts[name](model, tmp_path)
    assert is_lazy(model[4].weight)
    assert not list(tmp_path.iterdir())
    model(IMAGES)
    acts[name](model, tmp_path)


@pytest.mark.parametrize("name", FOR_VALUES)
@pytest.mark.parametrize(
    ("make", "what"), [(lambda: net().to("meta"), "on the meta device"), (fake, "made within FakeTensorMode")]
)
def test_a_model_without_values_is_refused(name, make, what, tmp_path):
    with pytest.raises(
        InvalidArgumentError,
        match=rf"`model` must have values, got `0.weight` {what}; build it on cpu, or call",
    ):
        FOR_VALUES[name](make(), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("make", [lambda: net().to("meta"), fake])
def test_kernels_without_values_are_not_drawn(make):
    with pytest.raises(
        InvalidTypeError, match=r"`0` must hold real numbers to draw, .* load its values first"
    ):
        tv.kernel_grid(make())


@pytest.mark.parametrize("name", FOR_SHAPES)
def test_shapes_are_found_without_values(name, tmp_path):
    assert str(FOR_SHAPES[name](net().to("meta"), tmp_path)) == str(FOR_SHAPES[name](net(), tmp_path)) or (
        name == "layers"  # whose times are another
    )


def test_a_model_that_is_loaded_layer_by_layer_is_surveyed_where_it_runs():
    whole, model = net(), net().to("meta")
    model.load_state_dict(whole.state_dict(), assign=True)
    weight = model[0].weight
    model[0].weight = nn.Parameter(weight.detach().to("meta"))
    model[0].register_forward_pre_hook(lambda layer, _: setattr(layer, "weight", weight))
    found = tv.survey(model, [IMAGES], "0", device="cpu", progress=False)
    expected = tv.survey(whole, [IMAGES], "0", progress=False)
    assert torch.equal(found.stats["0"].mean, expected.stats["0"].mean)


@pytest.mark.parametrize("name", [*FOR_VALUES, "monitor"])
@pytest.mark.parametrize("part", ["2.weight", "2.bias", "1.running_mean", "4.weight"])
def test_a_model_that_lacks_some_values_is_refused(name, part, tmp_path):
    """What torch computes with such a weight is whatever stands in memory, without a word."""

    class Writer:
        def add_image(self, *_): ...

        add_scalar = add_histogram = add_image

    def watched(model, _):
        Monitor(model, Writer(), probe=IMAGES, every=1, strict=True).step(0)

    model = net()
    model[1] = nn.BatchNorm2d(4).eval()
    layer, own = model[int(part[0])], part[2:]
    kind = "_buffers" if own.startswith("running") else "_parameters"
    held = getattr(layer, kind)
    kept = held[own]
    held[own] = nn.Parameter(kept.to("meta")) if kind == "_parameters" else kept.to("meta")
    act = {**FOR_VALUES, "monitor": watched}[name]
    with pytest.raises(
        InvalidArgumentError, match=rf"`model` must have values, got `{part}` on the meta device"
    ):
        act(model, tmp_path)
    assert not list(tmp_path.iterdir())
    held[own] = kept
    act(model, tmp_path)


@pytest.mark.parametrize("options", [{"channels": [0]}, {"reduce": tv.RunningStats}, {}])
def test_a_pass_without_values_gives_shapes_or_is_refused(options):
    """It once ended the process: a fake tensor is asked for its device by an operation of its own."""
    with FakeTensorMode():
        model, images = net(), torch.rand(4, 3, 12, 12)

        def run():
            with tv.capture(model, "2", **options) as acts:
                model(images)
            return tuple(acts["2"].shape)

        if "reduce" in options:
            with pytest.raises(InvalidTypeError, match=r"there are no statistics of `2`: .* a meta tensor"):
                run()
        else:
            assert run() == (4, len(options.get("channels", "ab")), 8, 8)


def test_weights_that_come_as_a_layer_runs_are_no_missing_values():
    whole, model = net(), net()
    model.load_state_dict(whole.state_dict())
    weight = model[2].weight
    model[2].weight = nn.Parameter(weight.detach().to("meta"))
    model[2].register_forward_pre_hook(lambda layer, _: setattr(layer, "weight", weight))
    found = tv.survey(model, [IMAGES], "2", progress=False)
    assert torch.equal(found.stats["2"].mean, tv.survey(whole, [IMAGES], "2", progress=False).stats["2"].mean)
