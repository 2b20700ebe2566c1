"""What an assertion has found, in words: how many, which, where the worst is, and what was allowed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import torch

from torchlens_viz.arguments import plain
from torchlens_viz.hooks.layout import marked_dim
from torchlens_viz.stats.channels import ChannelStats

_SHOWN: Final = 5
COMPARED: Final = ("mean", "std", "min", "max", "zero_fraction")
"""The fields of statistics that are compared."""


def share(count: int, total: int, what: str) -> str:
    """Say how many of how many: "3 of 64 channels (4.7%)"."""
    return f"{count:,} of {total:,} {what}{'s' if total != 1 else ''} ({_percent(count, total)})"


def some(texts: Sequence[str]) -> str:
    """List the first few, and how many more there are."""
    more = f" and {len(texts) - _SHOWN:,} more" if len(texts) > _SHOWN else ""
    return ", ".join(texts[:_SHOWN]) + more


def nonfinite(label: str, value: torch.Tensor | ChannelStats) -> str | None:
    """Say which values are NaN or infinite, or None where all are finite."""
    if isinstance(value, ChannelStats):
        counts = value.nonfinite.tolist()
        return _spoilt(label, counts, int(value.count.sum())) if any(counts) else None
    values = plain(value.detach())
    is_bad = ~values.isfinite()
    if not is_bad.any():
        return None
    found = marked_dim(value)
    dim = 1 if found is None else found
    per_channel = is_bad.movedim(dim, 0).flatten(1).sum(1) if is_bad.ndim > 1 else is_bad.sum().view(1)
    first = tuple(is_bad.nonzero()[0].tolist())
    text = _spoilt(label, per_channel.tolist(), values.numel())
    return f"{text}\n  first: {values[first].item():.6g} at index {first}"


def differences(
    label: str,
    actual: torch.Tensor | ChannelStats,
    expected: torch.Tensor | ChannelStats,
    *,
    rtol: float,
    atol: float,
) -> list[str]:
    """Say where `actual` and `expected` differ by more than the tolerance; nothing where they do not."""
    if isinstance(actual, ChannelStats) and isinstance(expected, ChannelStats):
        pairs = [
            (f"{label}: {name}", getattr(actual, name), getattr(expected, name), "channel")
            for name in COMPARED
        ]
    elif isinstance(actual, torch.Tensor) and isinstance(expected, torch.Tensor):
        pairs = [(label, actual, expected, "value")]
    else:
        return [f"{label}: a {type(actual).__name__} where a {type(expected).__name__} was expected"]
    spoilt = [nonfinite(label, actual), nonfinite(f"{label} as expected", expected)]
    return [text for text in spoilt if text] or list(_unlike(pairs, rtol, atol))


def _unlike(
    pairs: Sequence[tuple[str, torch.Tensor, torch.Tensor, str]], rtol: float, atol: float
) -> Iterator[str]:
    for label, actual, expected, what in pairs:
        if actual.shape != expected.shape:
            yield f"{label}: shape {tuple(actual.shape)} where {tuple(expected.shape)} was expected"
            continue
        ours, theirs = (_plain(side) for side in (actual, expected))
        distance, allowed = (ours - theirs).abs(), atol + rtol * theirs.abs()
        is_bad = distance > allowed
        if not is_bad.any():
            continue
        count = int(is_bad.sum())
        flat = int(torch.where(is_bad, distance, -1).argmax())
        worst = tuple(
            int(place) for place in torch.unravel_index(torch.tensor(flat, device="cpu"), ours.shape)
        )
        got, wanted, gap = (side[worst].item() for side in (ours, theirs, distance))
        place = f"channel {worst[0]}" if what == "channel" else f"index {worst}"
        relative = f", or {100 * gap / abs(wanted):.3g}% of what was expected" if wanted else ""
        yield (
            f"{label}: {share(count, ours.numel(), what)} {'differs' if count == 1 else 'differ'} by more "
            f"than {atol:g} + {rtol:g} * abs(expected)\n"
            f"  worst: {got:.6g} where {wanted:.6g} was expected, at {place}; "
            f"the difference is {gap:.6g}{relative}"
        )


def _plain(values: torch.Tensor) -> torch.Tensor:
    there = plain(values.detach().to("cpu"))
    return there if there.is_complex() else there.double()


def _spoilt(label: str, counts: Sequence[int], total: int) -> str:
    bad = [f"{place} ({n:,} value{'s' if n > 1 else ''})" for place, n in enumerate(counts) if n]
    count = sum(counts)
    head = f"{label}: {share(count, total, 'value')} {'is' if count == 1 else 'are'} NaN or infinite"
    if len(counts) == 1:
        return head
    return f"{head}, in {len(bad):,} of {len(counts):,} channels\n  channels: {some(bad)}"


def _percent(count: int, total: int) -> str:
    percent = 100 * count / total
    return f"{percent:.1f}%" if percent >= 0.05 else f"{percent:.1g}%"
