"""What a tensor, or statistics in its place, is in a few words and numbers."""

from __future__ import annotations

from typing import NamedTuple

import torch

from torchlens_viz.arguments import has_values, plain
from torchlens_viz.stats.channels import ChannelStats


class Summary(NamedTuple):
    """Words for a row of a table."""

    shape: str
    dtype: str = ""
    device: str = ""
    low: str = ""
    mean: str = ""
    high: str = ""


def summary_of(value: torch.Tensor | ChannelStats | None) -> Summary:
    """Return shape, type, place, least value, mean and greatest value in words; "-" for what has none."""
    if value is None:
        return Summary("no tensor")
    if isinstance(value, ChannelStats):
        whole = value.pooled()
        low, mean, high = (f"{field.item():.4g}" for field in (whole.min, whole.mean, whole.max))
        return Summary(f"statistics ({value.channels},)", "float64", str(whole.mean.device), low, mean, high)
    shape = "nested" if value.is_nested else "(" + ", ".join(map(str, value.shape)) + ")"
    try:
        figures = _figures(value.detach())
    except (RuntimeError, TypeError):  # a kind of tensor that cannot tell its values; a table must not fail
        figures = ("-", "-", "-")
    return Summary(shape, str(value.dtype).removeprefix("torch."), str(value.device), *figures)


def _figures(value: torch.Tensor) -> tuple[str, str, str]:
    if value.is_nested or not has_values(value) or value.numel() == 0 or value.is_complex():
        return ("-", "-", "-")
    value = plain(value)
    if not value.is_floating_point():
        value = value.float()
    low, high = value.aminmax()
    mean = value.mean(dtype=torch.promote_types(value.dtype, torch.float32))
    return (f"{low.item():.4g}", f"{mean.item():.4g}", f"{high.item():.4g}")
