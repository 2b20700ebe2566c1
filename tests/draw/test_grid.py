"""`make_grid` against torchvision's, and every difference that is promised."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.utils import make_grid as torchvision_grid

from torchlens_viz import make_grid
from torchlens_viz.draw.grid import compose
from torchlens_viz.errors import InvalidArgumentError, InvalidTypeError

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]


def same_pixels(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal in dtype, shape and every value; which sign a zero has depends on the kernel that found it."""
    return actual.dtype == expected.dtype and torch.equal(actual, expected)


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, ...]:
    height, width = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    channels = draw(st.sampled_from([1, 2, 3, 4, 5]))
    return draw(
        st.sampled_from(
            [(height, width), (channels, height, width), (draw(st.integers(1, 19)), channels, height, width)]
        )
    )


@st.composite
def images(draw: st.DrawFn, dtypes: list[torch.dtype]) -> torch.Tensor:
    shape, dtype = draw(shapes()), draw(st.sampled_from(dtypes))
    seed = draw(st.integers(0, 2**32 - 1))
    generator = torch.Generator().manual_seed(seed)
    if not dtype.is_floating_point:
        return torch.randint(0, 100, shape, generator=generator).to(dtype)
    scale = draw(st.sampled_from([1e-7, 1e-3, 1.0, 300.0]))
    tensor = (torch.randn(shape, generator=generator) * scale).to(dtype)
    return draw(
        st.sampled_from([tensor, tensor * 0, -(tensor * 0), tensor.relu(), tensor.mT.contiguous().mT])
    )


PLAIN = st.fixed_dictionaries(
    {"nrow": st.integers(1, 21), "padding": st.integers(0, 5), "pad_value": st.sampled_from([0.0, 0.5, 1.0])}
)
RANGES = st.one_of(st.none(), st.tuples(st.floats(-2, 0), st.floats(0, 2)), st.just((0, 1)))


@settings(max_examples=300, deadline=None)
@given(tensor=images(FLOATS + INTEGERS), options=PLAIN)
def test_plain_grid_has_torchvisions_pixels(tensor, options):
    if not tensor.is_floating_point():
        options = {**options, "pad_value": int(options["pad_value"])}
    expected = torchvision_grid(tensor, **options)
    assert same_pixels(make_grid(tensor, **options), expected)


@settings(max_examples=600, deadline=None)
@given(tensor=images(FLOATS), options=PLAIN, scale_each=st.booleans(), value_range=RANGES)
def test_normalised_grid_has_torchvisions_pixels(tensor, options, scale_each, value_range):
    options = {**options, "normalize": True, "scale_each": scale_each, "value_range": value_range}
    expected = torchvision_grid(tensor, **options)
    assert same_pixels(make_grid(tensor, **options), expected)


@given(st.lists(st.integers(0, 255), min_size=1, max_size=9), st.sampled_from([1, 3]))
def test_list_of_images_is_a_batch(values, channels):
    batch = [torch.full((channels, 2, 3), float(value)) for value in values]
    assert same_pixels(make_grid(batch), torchvision_grid(batch))


def test_every_argument_may_be_given_by_position():
    tensor = torch.randn(5, 3, 4, 4)
    arguments = (3, 1, True, (-1, 1), True, 0.5)
    assert same_pixels(make_grid(tensor, *arguments), torchvision_grid(tensor, *arguments))


def test_pixel_check_can_fail():
    assert not same_pixels(torch.tensor([1.0]), torch.tensor([1.0]).nextafter(torch.tensor(2.0)))
    assert not same_pixels(torch.tensor([0.0]), torch.tensor([0.0], dtype=torch.float64))


# The differences, row by row.


@pytest.mark.parametrize("scale_each", [False, True])
def test_non_finite_values_do_not_disturb_the_range(scale_each):
    clean = torch.randn(4, 1, 3, 3).clamp(-1, 1)
    clean[:, 0, 0, 0], clean[:, 0, 0, 1] = -1.0, 1.0  # every image has the same range
    dirty = clean.clone()
    dirty[0, 0, 2, 0], dirty[1, 0, 2, 1], dirty[2, 0, 2, 2] = math.nan, math.inf, -math.inf
    options = {"normalize": True, "scale_each": scale_each, "padding": 0, "nrow": 4}
    expected = make_grid(clean, **options)
    expected[:, 2, 0], expected[:, 2, 4], expected[:, 2, 8] = math.nan, 1.0, 0.0
    torch.testing.assert_close(make_grid(dirty, **options), expected, rtol=0, atol=0, equal_nan=True)
    poisoned = torchvision_grid(dirty, **options)
    assert not torch.equal(poisoned.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("dtype", FLOATS)
def test_image_without_a_finite_value_leaves_the_others_alone(dtype):
    batch = torch.stack([torch.full((1, 2, 2), math.nan), torch.tensor([[[0.0, 1.0], [2.0, 4.0]]])]).to(dtype)
    grid = make_grid(batch, normalize=True, scale_each=True, padding=0)
    assert grid[0, :, :2].isnan().all()
    assert grid[0, :, 2:].tolist() == [[0.0, 0.25], [0.5, 1.0]]


@pytest.mark.parametrize("dtype", [*INTEGERS, torch.bool])
def test_integers_are_normalised_in_float32(dtype):
    batch = torch.randint(0, 2 if dtype is torch.bool else 100, (5, 3, 4, 4)).to(dtype)
    expected = torchvision_grid(batch.float(), normalize=True, scale_each=True)
    assert same_pixels(make_grid(batch, normalize=True, scale_each=True), expected)


def test_range_under_the_narrowest_is_not_stretched():
    batch = torch.tensor([0.0, 1e-6]).reshape(2, 1, 1, 1)
    assert make_grid(batch, normalize=True).max().item() == pytest.approx(0.1)


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4)])
def test_empty_batch_raises_with_its_shape(shape):
    with pytest.raises(ValueError, match=rf"at least one image.*\({shape[0]}, {shape[1]}, 4, 4\)"):
        make_grid(torch.empty(shape))


def test_batch_of_one_is_an_unpadded_copy():
    batch = torch.rand(1, 3, 4, 5)
    grid = make_grid(batch, padding=2)
    assert torch.equal(grid, batch[0])
    grid.zero_()
    assert batch.sum() > 0


def test_value_range_may_be_a_list():
    batch = torch.randn(3, 1, 4, 4)
    expected = torchvision_grid(batch, normalize=True, value_range=(-1, 1))
    assert same_pixels(make_grid(batch, normalize=True, value_range=[-1, 1]), expected)


# What it leaves alone, and what it refuses.


@pytest.mark.parametrize("options", [{}, {"normalize": True}, {"normalize": True, "scale_each": True}])
def test_input_is_never_changed(options):
    batch = torch.randn(3, 1, 4, 4, requires_grad=True)
    before = batch.detach().clone()
    grid = make_grid(batch, **options)
    assert torch.equal(batch, before)
    assert not grid.requires_grad
    grid.fill_(7)
    assert torch.equal(batch, before)


@pytest.mark.parametrize(
    ("tensor", "options", "message"),
    [
        (torch.zeros(2, 2, 2, 2, 2), {}, r"got shape \(2, 2, 2, 2, 2\)"),
        (torch.zeros(3), {}, r"got shape \(3,\)"),
        ([], {}, "got an empty list"),
        ([torch.zeros(1, 2, 2), torch.zeros(1, 3, 3)], {}, "images of one shape"),
        (torch.zeros(2, 1, 2, 2), {"nrow": 0}, "`nrow` .* at least 1, got 0"),
        (torch.zeros(2, 1, 2, 2), {"padding": -1}, "`padding` must not be negative, got -1"),
        (torch.zeros(2, 1, 0, 2), {"normalize": True}, "at least one pixel"),
        (torch.zeros(2, 1, 2, 2), {"normalize": True, "value_range": (1,)}, r"must be \(low, high\)"),
    ],
)
def test_bad_values_raise_one_clear_message(tensor, options, message):
    with pytest.raises(ValueError, match=message):
        make_grid(tensor, **options)


@pytest.mark.parametrize("tensor", ["image", [torch.zeros(1, 2, 2), "image"], np.zeros((2, 2))])
def test_what_is_no_tensor_raises_type_error(tensor):
    with pytest.raises(TypeError, match="must be a tensor or a list of tensors"):
        make_grid(tensor)


def test_complex_numbers_raise_type_error():
    with pytest.raises(TypeError, match="real values"):
        make_grid(torch.zeros(2, 1, 2, 2, dtype=torch.complex64), normalize=True)


BATCH = torch.ones(2, 3, 4, 4)


@pytest.mark.parametrize("options", [{}, {"normalize": True}])
@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (
            BATCH.to_sparse(),
            r"`tensor` must be a dense tensor, got layout torch\.sparse_coo; .*`\.to_dense\(\)`",
        ),
        (BATCH[:1].to_sparse(), r"must be a dense tensor, got layout torch\.sparse_coo"),
        ([BATCH[0], BATCH[1].to_sparse()], r"must be a dense tensor, got layout torch\.sparse_coo"),
        (BATCH.to_mkldnn(), r"must be a dense tensor, got layout torch\._mkldnn"),
    ],
)
def test_what_is_not_dense_raises_type_error(tensor, options, message):
    with pytest.raises(InvalidTypeError, match=message):
        make_grid(tensor, **options)


@pytest.mark.filterwarnings("ignore:.*nested:UserWarning")
def test_nested_tensors_raise_type_error():
    nested = torch.nested.nested_tensor([torch.ones(3, 4, 4), torch.ones(3, 4, 5)])
    with pytest.raises(
        InvalidTypeError, match=r"`tensor` must be one dense tensor, got a nested one; .*unbind"
    ):
        make_grid(nested)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (BATCH.to("meta"), r"`normalize` needs values, got a tensor on meta; load its values"),
        (BATCH.to(torch.float8_e5m2), r"`normalize` needs .*, got torch\.float8_e5m2; pass `\.float\(\)`"),
    ],
)
def test_what_cannot_be_normalised_raises_and_is_laid_out_as_torchvision_does(tensor, message):
    with pytest.raises(InvalidTypeError, match=message):
        make_grid(tensor, normalize=True)
    actual, expected = make_grid(tensor), torchvision_grid(tensor)
    assert (actual.shape, actual.dtype, actual.device) == (expected.shape, expected.dtype, expected.device)
    assert actual.is_meta or torch.equal(actual.float(), expected.float())


@pytest.mark.filterwarnings("ignore:.*quantize:UserWarning", "ignore:.*deprecated:DeprecationWarning")
def test_quantised_tensors_raise_but_for_the_batch_of_one_that_torchvision_takes():
    batch = torch.quantize_per_tensor(BATCH, 0.5, 0, torch.qint8)
    with pytest.raises(InvalidTypeError, match=r"`tensor` must hold plain .*qint8; pass `\.dequantize\(\)`"):
        make_grid(batch)
    with pytest.raises(InvalidTypeError, match=r"`normalize` needs plain .*qint8; pass `\.dequantize\(\)`"):
        make_grid(batch, normalize=True)
    assert torch.equal(make_grid(batch[:1]), torchvision_grid(batch[:1]))


@given(st.integers(1, 7), st.integers(1, 4), st.integers(1, 5), st.integers(0, 3))
def test_enlarged_tiles_are_repeated_pixels(count, upscale, columns, padding):
    tiles = torch.arange(count * 6, dtype=torch.uint8).reshape(count, 1, 2, 3)
    enlarged = tiles.repeat_interleave(upscale, 2).repeat_interleave(upscale, 3)
    options = {"columns": columns, "padding": padding, "pad_value": 255}
    assert torch.equal(compose(tiles, upscale=upscale, **options), compose(enlarged, **options))


@pytest.mark.parametrize("upscale", [1, 3])
@pytest.mark.parametrize("channels", [1, 3])
def test_channels_last_is_the_same_grid_pixel_by_pixel_in_memory(channels, upscale):
    tiles = torch.randint(0, 256, (7, channels, 4, 5), dtype=torch.uint8)
    options = {
        "columns": 3,
        "padding": 2,
        "pad_value": 9,
        "upscale": upscale,
        "header": 3,
        "gap": 1,
        "frame": 7,
    }
    grid = compose(tiles, channels_last=True, **options)
    assert torch.equal(grid, compose(tiles, **options))
    assert grid.movedim(0, 2).is_contiguous()


@pytest.mark.cuda
@pytest.mark.parametrize("options", [{}, {"normalize": True}, {"normalize": True, "scale_each": True}])
def test_cuda_grid_is_torchvisions_within_rounding(options):
    batch = torch.randn(17, 3, 9, 9, device="cuda")
    torch.testing.assert_close(make_grid(batch, **options), torchvision_grid(batch, **options))


@pytest.mark.parametrize("limits", [(1, 0), (0, float("nan")), (float("-inf"), 1)])
def test_limits_that_are_none_are_refused(limits):
    with pytest.raises(InvalidArgumentError, match=r"`value_range` must be .* low <= high, both finite"):
        make_grid(BATCH, normalize=True, value_range=limits)


def test_a_grid_that_no_memory_holds_is_refused_before_it_is_made():
    with pytest.raises(InvalidArgumentError, match=r"the grid would have 160,064 x 160,064 pixels; use less"):
        make_grid(torch.rand(64, 3, 8, 8), padding=20_000)
