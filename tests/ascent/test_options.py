"""What `maximize` is given: the batch that has room, and bad input that is refused by name."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.nets import ascend, same_ascent, small_net
from torchlens_viz import objectives
from torchlens_viz.ascent.fourier import Fourier
from torchlens_viz.ascent.maximize import maximize
from torchlens_viz.ascent.method import Normalized
from torchlens_viz.errors import (
    CaptureError,
    CaptureMemoryError,
    InvalidArgumentError,
    InvalidTypeError,
    LayerNotFoundError,
)

# Ways to run out of memory.


class Hungry(nn.Module):
    """Takes at most `most` images at a time."""

    def __init__(self, most, error, *, only_with_gradient=False):
        super().__init__()
        self.net = small_net()
        self.most, self.error, self.only_with_gradient = most, error, only_with_gradient

    def forward(self, x):
        if len(x) > self.most and (torch.is_grad_enabled() or not self.only_with_gradient):
            raise self.error
        return self.net(x)


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
    MemoryError(),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_where_memory_runs_out_the_batch_is_halved_to_the_same_result(error):
    expected = ascend(batch_size=1)
    for most in (1, 2, 3):
        model = Hungry(most, error)
        same_ascent(ascend(model, "net.2", batch_size=7), expected)


def test_no_image_is_lost_where_memory_runs_out_as_they_begin(monkeypatch):
    from torchlens_viz.backprop.scorer import Scorer

    whole = Scorer.sensitivity

    def hungry(self, images, channels):
        if len(channels) > 1:
            raise MemoryError
        return whole(self, images, channels)

    expected = ascend(threshold=0.02, batch_size=1)
    monkeypatch.setattr(Scorer, "sensitivity", hungry)
    same_ascent(ascend(threshold=0.02, batch_size=7), expected)


@pytest.mark.parametrize("only_with_gradient", [False, True])
@pytest.mark.parametrize("batch_size", [4, "auto"])
def test_where_not_even_one_image_has_room_the_error_says_so(batch_size, only_with_gradient):
    model = Hungry(0, ERRORS[0], only_with_gradient=only_with_gradient)
    with pytest.raises(CaptureMemoryError, match="choose a smaller `size`, an earlier layer"):
        ascend(model, "net.2", batch_size=batch_size)


def test_other_errors_of_the_network_are_not_taken_for_lack_of_memory():
    model = Hungry(1, RuntimeError("something else"))
    with pytest.raises(RuntimeError, match="something else"):
        ascend(model, "net.2", batch_size=2)


# Bad input.


VALUE, TYPE = InvalidArgumentError, InvalidTypeError


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"layer": "9"}, LayerNotFoundError, "no layer is named `9`"),
        ({"layer": nn.Conv2d}, VALUE, "`layer` must find one layer, got 2"),
        ({"channels": 7}, VALUE, "`channels` must be indices from 0 to 6, got 7"),
        ({"channels": [0, -1]}, VALUE, "`channels` must be indices from 0 to 6, got -1"),
        ({"channels": []}, VALUE, "`channels` must choose at least one"),
        ({"channels": "a"}, TYPE, "`channels` must be an int or a list of ints"),
        ({"size": 0}, VALUE, "`size` must be a number of pixels or"),
        ({"size": 1.5}, VALUE, "`size` must be a number of pixels or"),
        ({"size": (4, 5, 6, 7)}, VALUE, "`size` must be a number of pixels or"),
        ({"size": (4, 5, 6)}, VALUE, r"cannot take images of shape \(3, 4, 5, 6\).*another `size`"),
        ({"size": (9,)}, VALUE, r"cannot take images of shape \(3, 9\).*another `size`"),
        ({"size": 2}, VALUE, r"cannot take images of shape \(3, 2, 2\).*choose another `size`"),
        ({"steps": 0}, VALUE, "`steps` must be at least 1, got 0"),
        ({"steps": 2.0}, TYPE, "`steps` must be an int, got 2.0"),
        ({"steps": True}, TYPE, "`steps` must be an int, got True"),
        ({"batch_size": 0}, VALUE, "`batch_size` must be at least 1, got 0"),
        ({"batch_size": "all"}, TYPE, "`batch_size` must be an int, got 'all'"),
        ({"lr": 0}, VALUE, "`lr` must be above 0, got 0"),
        ({"lr": float("nan")}, VALUE, "`lr` must be finite, got nan"),
        ({"lr": "fast"}, TYPE, "`lr` must be a number, got 'fast'"),
        ({"threshold": float("inf")}, VALUE, "`threshold` must be finite, got inf"),
        ({"threshold": "high"}, TYPE, "`threshold` must be a number, got 'high'"),
        ({"seed": "42"}, TYPE, "`seed` must be an int, got '42'"),
        ({"seed": -1, "method": "classic"}, VALUE, "`seed` must be from 0 to 2"),
        ({"method": "keras"}, VALUE, '`method` must be "normalized", "classic", Normalized'),
        ({"method": "classic", "transforms": "robust"}, VALUE, "has neither `parametrization`"),
        ({"method": "classic", "parametrization": "maco"}, VALUE, "has neither `parametrization`"),
        ({"parametrization": "pixel"}, VALUE, "`parametrization` must be one of 'pixels'"),
        ({"transforms": "strong"}, VALUE, "`transforms` must be one of 'none'"),
        ({"objective": "median"}, VALUE, "`objective` must be one of 'mean'"),
        ({"objective": objectives.channel(9)}, VALUE, "`channel` must be an index from 0 to 6"),
        ({"objective": objectives.neuron(position=(9, 0))}, VALUE, "`position` must lie in maps"),
        ({"objective": objectives.direction([1.0])}, VALUE, "a weight for each of the layer's 7"),
        ({"objective": objectives.diversity()}, VALUE, "needs channels that are named several"),
        (
            {"objective": objectives.channel() + objectives.diversity(), "channels": [1, 2]},
            VALUE,
            "needs channels that are named several",
        ),
        ({"objective": lambda s: s.activation().mean()}, VALUE, "must give one number per image"),
        ({"objective": lambda s: s.channels.float()}, VALUE, "has no gradient path to the image"),
        ({"objective": objectives.channel(layer="x")}, LayerNotFoundError, "no layer is named `x`"),
        ({"precision": "float16"}, VALUE, '`precision` must be "auto", "float32" or "bfloat16"'),
        ({"image": torch.full((3, 12, 12), 2.0)}, VALUE, "`image` must have values from 0 to 1"),
        ({"image": torch.full((3, 12, 12), torch.nan)}, VALUE, "`image` must hold finite values"),
        ({"image": torch.rand(12, 12)}, VALUE, "`image` must be one image"),
        ({"image": "cat.png"}, TYPE, "`image` must be a tensor or a picture"),
        ({"image": torch.rand(4, 12, 12)}, VALUE, r"cannot take images of shape \(4, 12, 12\)"),
        ({"method": Normalized(references=torch.rand(3, 12, 12))}, VALUE, r"must be images \(R, 3, 12"),
        ({"method": Normalized(references=[1])}, VALUE, r"`references` must be images .*, got \["),
        (
            {"method": Normalized(references=torch.randn(2, 3, 12, 12))},
            VALUE,
            "`references` must have values from 0 to 1, as before `preprocess`",
        ),
        ({"channel_dim": 0}, VALUE, "`channel_dim` must be a dimension after the first"),
        ({"channel_dim": 4}, VALUE, "`channel_dim` must be a dimension of what `2` puts out, got 4"),
        ({"preprocess": lambda x: x.detach()}, VALUE, "has no gradient path to the image"),
        ({"preprocess": lambda x: x[0, 0, 0]}, VALUE, "`preprocess` must make a batch of a batch"),
        (
            {"preprocess": lambda x: x[:, :2]},
            VALUE,
            r"cannot take images of shape \(3, 12, 12\) \(after `preprocess`, \(2, 12, 12\)\)",
        ),
        (
            {"parametrization": Fourier(decorrelate=True), "image": torch.rand(1, 12, 12)},
            VALUE,
            "cannot take images|`decorrelate` must be False",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name(options, error, match):
    with pytest.raises(error, match=match):
        ascend(**options)


def test_only_modules_are_maximised():
    with pytest.raises(InvalidTypeError, match=r"`model` must be a torch.nn.Module, got function"):
        maximize(lambda x: x, "0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        traced = torch.jit.trace(small_net(), torch.rand(1, 3, 12, 12))
    with pytest.raises(CaptureError, match="the model is TorchScript"):
        maximize(traced, "0")


def test_a_layer_that_does_not_run_is_refused():
    model = small_net()
    model.add_module("unused", nn.Conv2d(3, 3, 1))
    model.forward = lambda x: model[0](x)
    with pytest.raises(CaptureError, match="`unused` does not run on this input"):
        ascend(model, "unused")


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda x: (x, x), "a tuple"),
        (lambda x: x.mean((1, 2, 3)), "float32 of shape"),
        (lambda x: x.long(), "int64 of shape"),
    ],
)
def test_a_layer_must_put_out_one_tensor_with_channels(make, kind):
    class Odd(nn.Module):
        def forward(self, x):
            return make(x)

    with pytest.raises(InvalidArgumentError, match=f"`layer` must put out one tensor .*got {kind}"):
        ascend(nn.Sequential(nn.Conv2d(3, 2, 3), Odd()), "1")


def test_a_layer_that_folds_windows_into_the_batch_is_refused():
    class Windows(nn.Module):
        def __init__(self):
            super().__init__()
            self.dense = nn.Linear(3 * 6 * 6, 5)

        def forward(self, x):
            return self.dense(F.unfold(x, 6, stride=6).mT.flatten(0, 1))

    with pytest.raises(InvalidArgumentError, match=r"one row per image.*shape \(4, 5\) from `dense`"):
        ascend(Windows(), "dense")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"size": 10**6},
            r"`size` of 1,000,000 x 1,000,000 pixels needs .* GiB .* are free; choose a smaller",
        ),
        ({"steps": 10**9}, r"`steps` must be at most 1000000, got 1000000000"),
    ],
)
def test_what_no_memory_holds_is_refused_before_work_begins(options, message):
    with pytest.raises(InvalidArgumentError, match=message):
        maximize(nn.Sequential(nn.Conv2d(3, 2, 3)), "0", **options)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_layer_in_a_part_that_is_checkpointed_the_old_way_says_so():
    class Old(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Sequential(nn.ReLU(), nn.Conv2d(4, 2, 3))

        def forward(self, x):
            return checkpoint(self.b, self.a(x), use_reentrant=True)

    with pytest.raises(InvalidArgumentError, match=r"at `b\.1` has no gradient .* `use_reentrant=True`"):
        maximize(Old(), "b.1", [0], size=12, steps=1)
