"""See inside a convolutional network in one line, and hold what you see in a test.

Every public name is imported on first use, so that `import torchlens_viz` costs next to nothing and pulls
in neither torchvision nor any optional package.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torchlens_viz import testing as testing
    from torchlens_viz.ascent.maximize import maximize as maximize
    from torchlens_viz.ascent.result import Maximization as Maximization
    from torchlens_viz.dataset.result import Survey as Survey
    from torchlens_viz.dataset.survey import survey as survey
    from torchlens_viz.draw.grid import make_grid as make_grid
    from torchlens_viz.errors import LayerNotFoundError as LayerNotFoundError
    from torchlens_viz.errors import TorchlensVizError as TorchlensVizError
    from torchlens_viz.grids.features import feature_grid as feature_grid
    from torchlens_viz.grids.features import save_feature_grid as save_feature_grid
    from torchlens_viz.grids.folders import save_feature_maps as save_feature_maps
    from torchlens_viz.grids.folders import save_kernel_sheets as save_kernel_sheets
    from torchlens_viz.grids.kernels import kernel_grid as kernel_grid
    from torchlens_viz.grids.kernels import save_kernel_grid as save_kernel_grid
    from torchlens_viz.grids.overlay import overlay_grid as overlay_grid
    from torchlens_viz.grids.overlay import save_overlay_grid as save_overlay_grid
    from torchlens_viz.grids.pairs import pair_grid as pair_grid
    from torchlens_viz.grids.pairs import save_pair_grid as save_pair_grid
    from torchlens_viz.hooks.capture import Activations as Activations
    from torchlens_viz.hooks.capture import capture as capture
    from torchlens_viz.monitor.monitor import Monitor as Monitor
    from torchlens_viz.stats.channels import ChannelStats as ChannelStats
    from torchlens_viz.stats.running import RunningStats as RunningStats

__version__ = "0.1.0"

_HOME = {
    "Activations": "hooks.capture",
    "ChannelStats": "stats.channels",
    "LayerNotFoundError": "errors",
    "Maximization": "ascent.result",
    "Monitor": "monitor.monitor",
    "RunningStats": "stats.running",
    "Survey": "dataset.result",
    "TorchlensVizError": "errors",
    "capture": "hooks.capture",
    "feature_grid": "grids.features",
    "kernel_grid": "grids.kernels",
    "make_grid": "draw.grid",
    "maximize": "ascent.maximize",
    "overlay_grid": "grids.overlay",
    "pair_grid": "grids.pairs",
    "save_feature_grid": "grids.features",
    "save_feature_maps": "grids.folders",
    "save_kernel_grid": "grids.kernels",
    "save_kernel_sheets": "grids.folders",
    "save_overlay_grid": "grids.overlay",
    "save_pair_grid": "grids.pairs",
    "survey": "dataset.survey",
}

__all__ = [
    "Activations",
    "ChannelStats",
    "LayerNotFoundError",
    "Maximization",
    "Monitor",
    "RunningStats",
    "Survey",
    "TorchlensVizError",
    "capture",
    "feature_grid",
    "kernel_grid",
    "make_grid",
    "maximize",
    "overlay_grid",
    "pair_grid",
    "save_feature_grid",
    "save_feature_maps",
    "save_kernel_grid",
    "save_kernel_sheets",
    "save_overlay_grid",
    "save_pair_grid",
    "survey",
]

_MODULES = frozenset({"objectives", "testing"})  # public as a whole


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
