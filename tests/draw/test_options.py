"""The drawing options: a misspelt one is named, and `help` lists them all."""

from __future__ import annotations

import inspect

import pytest
import torch

from torchlens_viz import Maximization, feature_grid, kernel_grid, save_feature_grid, save_kernel_sheets
from torchlens_viz.errors import InvalidTypeError


@pytest.mark.parametrize(
    "draw",
    [
        lambda **options: feature_grid(torch.rand(2, 4, 4), **options),
        lambda **options: kernel_grid(torch.rand(2, 3, 4, 4), **options),
        lambda **options: save_feature_grid(torch.rand(2, 4, 4), "none.png", **options),
    ],
)
def test_a_misspelt_option_is_named_with_the_one_that_was_meant(draw):
    with pytest.raises(InvalidTypeError, match=r"there is no option `lables`; did you mean `labels`\?"):
        draw(lables=True)
    with pytest.raises(InvalidTypeError, match=r"no option `xyz`; there are normalize, scale_each, "):
        draw(xyz=1)


@pytest.mark.parametrize("function", [feature_grid, kernel_grid, save_kernel_sheets, Maximization.grid])
def test_help_lists_the_drawing_options(function):
    found = inspect.signature(function).parameters
    assert {"normalize", "scale_each", "value_range", "cmap", "nrow", "padding", "legend", "page"} <= set(
        found
    )
    assert found["padding"].default == 1
    assert not any(each.kind is each.VAR_KEYWORD for each in found.values())
