"""Which tracker a writer belongs to, told by what it is: nothing is imported that is not there already."""

from __future__ import annotations

import importlib
from typing import Any, Final

# The class of a run, where it is defined -> the adapter that writes to it.
_RUNS: Final = {
    ("wandb", "Run"): ("torchlens_viz.trackers.wandb_run", "WandbWriter"),
    ("mlflow", "Run"): ("torchlens_viz.trackers.mlflow_run", "MlflowWriter"),
    ("trackio", "Run"): ("torchlens_viz.trackers.trackio_run", "TrackioWriter"),
    ("aim", "Run"): ("torchlens_viz.trackers.aim_run", "AimWriter"),
}


def is_run(writer: Any) -> bool:
    """Tell whether something is a run of a tracker that is known here."""
    return _adapter_of(writer) is not None


def adapted(writer: Any) -> Any:
    """Return what writes to a run of Weights & Biases, MLflow, trackio or Aim as a `SummaryWriter` would.

    Args:
        writer: A run, or any other writer, which is returned as it is.
    """
    found = _adapter_of(writer)
    if found is None:
        return writer
    module, name = found
    return getattr(importlib.import_module(module), name)(writer)


def _adapter_of(writer: Any) -> tuple[str, str] | None:
    kinds = ((kind.__module__.partition(".")[0], kind.__name__) for kind in type(writer).__mro__)
    return next((_RUNS[kind] for kind in kinds if kind in _RUNS), None)
