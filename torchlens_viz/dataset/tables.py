"""Statistics and top inputs as plain numbers: nested lists, rows, a data frame."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from torchlens_viz.errors import MissingDependencyError
from torchlens_viz.stats.channels import ChannelStats
from torchlens_viz.stats.topk import Top

_FIGURES: Final = ("mean", "std", "min", "max", "zero_fraction", "nonfinite", "count")


def lists_of(stats: ChannelStats, top: Top | None) -> dict[str, Any]:
    """Return what is known of one layer as lists, one entry per channel."""
    found: dict[str, Any] = {figure: getattr(stats, figure).tolist() for figure in _FIGURES}
    if stats.histogram is not None:
        found |= {"bins": list(stats.bins or ()), "histogram": stats.histogram.tolist()}
    if top is not None:
        found["top"] = {part: getattr(top, part).tolist() for part in ("values", "samples", "positions")}
    return found


def rows_of(stats: Mapping[str, ChannelStats], top: Mapping[str, Top]) -> list[dict[str, Any]]:
    """Return a row per channel: layer, channel, its statistics, its highest peak and the input's index."""
    rows: list[dict[str, Any]] = []
    for name, each in stats.items():
        columns = {figure: getattr(each, figure).tolist() for figure in _FIGURES}
        best = top.get(name)
        for channel in range(each.channels):
            row = {"layer": name, "channel": channel}
            row |= {figure: values[channel] for figure, values in columns.items()}
            if best is not None and best.values.shape[1]:
                row["top_value"] = best.values[channel, 0].item()
                row["top_sample"] = int(best.samples[channel, 0])
            rows.append(row)
    return rows


def frame_of(rows: list[dict[str, Any]]) -> Any:
    """Return rows as a pandas DataFrame.

    Raises:
        MissingDependencyError: pandas is not installed.
    """
    try:
        import pandas as pd
    except ImportError as error:
        raise MissingDependencyError(
            "`to_frame` needs pandas, which is not installed; run `python -m pip install pandas`, or use "
            "`rows()` or `to_dict()`"
        ) from error
    return pd.DataFrame(rows)
