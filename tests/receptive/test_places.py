"""Places: where positions stand after they were moved about, against gradients and closed forms."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torchlens_viz.receptive.field import ReceptiveField
from torchlens_viz.receptive.find import receptive_field
from torchlens_viz.receptive.places import Grid, Place, standings

Move = Callable[[torch.Tensor], torch.Tensor]


class Moved(nn.Module):
    """Two convolutions, and between them whatever moves positions; all weights are equal."""

    def __init__(self, move: Move, after: nn.Module | None = None) -> None:
        super().__init__()
        self.before = nn.Conv2d(2, 4, 3, stride=2, padding=1)
        self.move = move
        self.after = nn.Identity() if after is None else after
        for parameter in self.parameters():
            nn.init.constant_(parameter, 0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(self.move(self.before(x)))


def measured_center(
    model: nn.Module, shape: tuple[int, ...], position: tuple[int, int], *, last: bool
) -> tuple[float, ...]:
    """Return the middle of the pixels that a position's gradient falls on, weighed by it."""
    image = torch.ones(shape, dtype=torch.float64, requires_grad=True)
    output = model.double()(image)
    output = output.movedim(-1, 1) if last else output
    (gradient,) = torch.autograd.grad(output[0, :, position[0], position[1]].sum(), image)
    weights = gradient.abs().sum((0, 1))
    rows, columns = (torch.arange(size, dtype=torch.float64) for size in shape[2:])
    total = weights.sum()
    return float((weights.sum(1) * rows).sum() / total), float((weights.sum(0) * columns).sum() / total)


def check_centers(
    model: nn.Module, *, last: bool = False, shape: tuple[int, ...] = (1, 2, 32, 48)
) -> ReceptiveField:
    """Hold the centres of positions whose windows lie within the image to those of their gradients."""
    field = receptive_field(model, "", shape)
    assert field.is_exact
    rows, columns = field.map_shape
    for position in [(rows // 2, columns // 2), (rows // 2, columns // 2 + 1), (rows // 2 - 1, columns // 3)]:
        expected = measured_center(model, shape, position, last=last)
        assert field.center(position) == pytest.approx(expected, abs=1e-6)
    return field


def merged(x: torch.Tensor) -> torch.Tensor:
    """Return four neighbours as channels of one position, as Swin does: (N, H, W, C) -> (N, H/2, W/2, 4C)."""
    parts = [x[:, 0::2, 0::2, :], x[:, 1::2, 0::2, :], x[:, 0::2, 1::2, :], x[:, 1::2, 1::2, :]]
    return torch.cat(parts, -1)


def gathered(x: torch.Tensor) -> torch.Tensor:
    """Return the same by one reshape."""
    n, rows, columns, channels = x.shape
    return x.view(n, rows // 2, 2, columns // 2, 2, channels).permute(0, 1, 3, 4, 2, 5).flatten(3)


def windows(x: torch.Tensor, side: int = 4) -> torch.Tensor:
    """Return (N, H, W, C) as windows (N * windows, side * side, C)."""
    n, rows, columns, channels = x.shape
    x = x.view(n, rows // side, side, columns // side, side, channels)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, side * side, channels)


def whole(x: torch.Tensor, rows: int, columns: int, side: int = 4) -> torch.Tensor:
    """Return windows as the map (N, H, W, C) they were cut from."""
    x = x.view(-1, rows // side, columns // side, side, side, x.shape[-1])
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, rows, columns, x.shape[-1])


def through_windows(x: torch.Tensor) -> torch.Tensor:
    x = torch.roll(x.permute(0, 2, 3, 1), (-2, -2), (1, 2))
    back = whole(windows(x).relu(), *x.shape[1:3])
    return torch.roll(back, (2, 2), (1, 2)).permute(0, 3, 1, 2)


LAST = (0, 2, 3, 1)
FIRST = (0, 3, 1, 2)


@pytest.mark.parametrize(
    ("move", "stride"),
    [
        (lambda x: x.permute(LAST)[:, 0::2, 1::2, :].permute(FIRST), (4.0, 4.0)),
        (lambda x: x.permute(LAST)[:, :, 3:, :].permute(FIRST), (2.0, 2.0)),
        (lambda x: x.permute(LAST)[:, 1::3].permute(FIRST), (6.0, 2.0)),
        (lambda x: x.transpose(2, 3)[:, :, ::2].transpose(2, 3), (2.0, 4.0)),
        (lambda x: x.movedim(1, -1)[..., ::2, :].movedim(-1, 1), (2.0, 4.0)),
        (lambda x: merged(x.permute(LAST)).permute(FIRST), (4.0, 4.0)),
        (lambda x: gathered(x.permute(LAST)).permute(FIRST), (4.0, 4.0)),
        (lambda x: x.flatten(2).transpose(1, 2).transpose(1, 2).view(x.shape)[..., 1:], (2.0, 2.0)),
        (lambda x: x.flatten(2)[..., : x.shape[2] * x.shape[3]].unflatten(2, x.shape[2:]), (2.0, 2.0)),
        (through_windows, (2.0, 2.0)),
        (lambda x: x.view(*x.shape[:2], x.shape[2] // 2, 2, x.shape[3]).mean(3), (4.0, 2.0)),
        (lambda x: F.pad(x.permute(LAST), (0, 0, 3, 0, 2, 1)).permute(FIRST), (2.0, 2.0)),
        (lambda x: x + F.pad(x.permute(LAST), (0, 0, 0, 0, 0, 0)).permute(FIRST), (2.0, 2.0)),
        (lambda x: torch.cat([x[:, :, :1], x], 2)[:, :, 1:], (2.0, 2.0)),
        (lambda x: torch.einsum("nchw->nhwc", x)[:, ::2].permute(FIRST), (4.0, 2.0)),
        (lambda x: torch.stack(x.unbind(2), 2)[..., ::2], (2.0, 4.0)),
    ],
    ids=[
        *(
            "slices",
            "begun later",
            "rows alone",
            "transposed",
            "movedim",
            "merged",
            "gathered",
            "tokens",
            "flat",
        ),
        *("windows", "pooled by hand", "padded", "residual", "joined", "einsum", "unbound"),
    ],
)
def test_positions_stand_where_their_gradients_fall(move, stride):
    assert check_centers(Moved(move)).stride == stride
    channels = move(torch.zeros(1, 4, 16, 24)).shape[1]
    follow = nn.Conv2d(channels, 3, 3, padding=1)  # what comes after looks along the right axes
    assert check_centers(Moved(move, follow)).stride == stride
    assert check_centers(Moved(lambda x: move(x).permute(LAST)), last=True).stride == stride


def test_slices_with_channels_last_agree_with_the_closed_form():
    # A 3x3 window with stride 2 and padding 1 stands over pixel 2i; every second of them from the third on.
    field = receptive_field(
        Moved(lambda x: x.permute(LAST)[:, 0::2, 3::2].permute(FIRST)), "", (1, 2, 32, 48)
    )
    assert field.stride == (4.0, 4.0)
    assert field.center((0, 0)) == (0.0, 6.0)
    assert field.center((5, 2)) == (20.0, 14.0)
    assert field.start == (-1, 5)


def test_a_mirrored_map_is_followed():
    field = check_centers(Moved(lambda x: x.flip(3)))
    assert field.stride == (2.0, -2.0)
    assert field.center((0, 0)) == (0.0, 46.0)


def test_positions_that_lie_unevenly_divide_the_image():
    rolled = receptive_field(Moved(lambda x: torch.roll(x, 3, 2)), "", (1, 2, 32, 48))
    assert rolled.stride == (2.0, 2.0)
    assert rolled.center((0, 0)) == (0.5, 0.0)  # the middle of the first of 16 equal parts
    doubled = receptive_field(Moved(lambda x: x.repeat_interleave(2, 2)), "", (1, 2, 32, 48))
    assert (doubled.stride, doubled.center((0, 0))) == ((1.0, 2.0), (0.0, 0.0))


def test_what_was_pooled_keeps_the_distance_of_what_it_is_resized_to():
    def through_one(x: torch.Tensor) -> torch.Tensor:
        return F.interpolate(x.mean((2, 3), keepdim=True), size=x.shape[2:])

    field = receptive_field(Moved(through_one), "", (1, 2, 32, 48))
    assert field.stride == (2.0, 2.0)
    assert field.center((0, 0)) == (0.0, 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(224, 224), (230, 250)])
@pytest.mark.parametrize("name", ["swin_t", "swin_v2_t"])
def test_every_stage_of_swin_stands_on_its_patches(name, size):
    models = pytest.importorskip("torchvision.models")
    model = models.get_model(name, weights=None).eval()
    for layer, stride in {"features.1": 4, "features.3": 8, "features.5": 16, "permute": 32}.items():
        field = receptive_field(model, layer, (1, 3, *size))
        assert field.is_exact
        assert field.stride == (stride, stride)
        # The middle of a patch; each merges the four before it.
        assert field.center((0, 0)) == ((stride - 1) / 2, (stride - 1) / 2)
        assert field.center((2, 3)) == ((stride - 1) / 2 + 2 * stride, (stride - 1) / 2 + 3 * stride)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(224, 224), (250, 240)])
def test_a_norm_that_permutes_and_permutes_back_changes_nothing(size):
    models = pytest.importorskip("torchvision.models")
    model = models.convnext_tiny(weights=None).eval()
    for layer, stride in {"features.0": 4, "features.2": 8, "features.4": 16, "features.7": 32}.items():
        field = receptive_field(model, layer, (1, 3, *size))
        assert (field.is_exact, field.stride) == (True, (stride, stride))
        assert field.center((0, 0)) == ((stride - 1) / 2, (stride - 1) / 2)


def test_places_tell_along_which_dimension_an_axis_lies():
    shape = (1, 2, 4, 6)
    rows, columns = (Place.along(dim, shape, Grid(1.5, 4.0)) for dim in (2, 3))
    moved = [place.moved(lambda number: number.permute(LAST)[:, 1::2]) for place in (rows, columns)]
    first, second = standings(moved)
    assert (first.dim, first.grid) == (1, Grid(5.5, 8.0))
    assert (second.dim, second.grid) == (2, Grid(1.5, 4.0))
    mixed = [place.moved(lambda number: number.flatten(2)) for place in (rows, columns)]
    assert [how.grid for how in standings(mixed)] == [None, None]
    assert standings([Place.at(shape, Grid(3.0, 8.0))] * 2)[0] == (2, Grid(3.0, 8.0), False)
