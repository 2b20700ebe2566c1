"""See inside a convolutional network in one line, and hold what you see in a test.

Every public name is imported on first use, so that `import torchlens_viz` costs next to nothing and pulls
in neither torchvision nor any optional package.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what `_HOME` and `_DOORS` say, for type checkers; tests/test_face.py holds the two equal
    from torchlens_viz import errors as errors
    from torchlens_viz import objectives as objectives
    from torchlens_viz import testing as testing
    from torchlens_viz.ablation.ablate import ablate as ablate
    from torchlens_viz.ablation.result import Ablation as Ablation
    from torchlens_viz.ascent.fourier import FixedSpectrum as FixedSpectrum
    from torchlens_viz.ascent.fourier import Fourier as Fourier
    from torchlens_viz.ascent.maximize import maximize as maximize
    from torchlens_viz.ascent.method import Classic as Classic
    from torchlens_viz.ascent.method import Normalized as Normalized
    from torchlens_viz.ascent.parametrization import Pixels as Pixels
    from torchlens_viz.ascent.result import Maximization as Maximization
    from torchlens_viz.ascent.transforms import Transforms as Transforms
    from torchlens_viz.atlas.report import report as report
    from torchlens_viz.atlas.top_projections import top_projections as top_projections
    from torchlens_viz.attribution.explain import explain as explain
    from torchlens_viz.attribution.explanation import Explanation as Explanation
    from torchlens_viz.attribution.project import project as project
    from torchlens_viz.attribution.projection import Projection as Projection
    from torchlens_viz.comparison.compare import compare as compare
    from torchlens_viz.comparison.result import Comparison as Comparison
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
    from torchlens_viz.hooks.activations import Activations as Activations
    from torchlens_viz.hooks.activations import InputOutput as InputOutput
    from torchlens_viz.hooks.activations import Inputs as Inputs
    from torchlens_viz.hooks.capture import capture as capture
    from torchlens_viz.monitor.health import Trouble as Trouble
    from torchlens_viz.monitor.monitor import Monitor as Monitor
    from torchlens_viz.overview.layers import layers as layers
    from torchlens_viz.overview.table import LayerRow as LayerRow
    from torchlens_viz.overview.table import LayerTable as LayerTable
    from torchlens_viz.receptive.find import receptive_field as receptive_field
    from torchlens_viz.stats.channels import ChannelStats as ChannelStats
    from torchlens_viz.stats.running import RunningStats as RunningStats
    from torchlens_viz.trackers.folder import FolderWriter as FolderWriter

__version__ = "0.1.0"

_HOME = {  # the module that defines each public name
    "Activations": "hooks.activations",
    "capture": "hooks.capture",
    "Inputs": "hooks.activations",
    "InputOutput": "hooks.activations",
    "ChannelStats": "stats.channels",
    "RunningStats": "stats.running",
    "kernel_grid": "grids.kernels",
    "save_kernel_grid": "grids.kernels",
    "feature_grid": "grids.features",
    "save_feature_grid": "grids.features",
    "pair_grid": "grids.pairs",
    "save_pair_grid": "grids.pairs",
    "overlay_grid": "grids.overlay",
    "save_overlay_grid": "grids.overlay",
    "save_kernel_sheets": "grids.folders",
    "save_feature_maps": "grids.folders",
    "make_grid": "draw.grid",
    "receptive_field": "receptive.find",
    "layers": "overview.layers",
    "LayerRow": "overview.table",
    "LayerTable": "overview.table",
    "maximize": "ascent.maximize",
    "Maximization": "ascent.result",
    "Normalized": "ascent.method",
    "Classic": "ascent.method",
    "Transforms": "ascent.transforms",
    "Pixels": "ascent.parametrization",
    "Fourier": "ascent.fourier",
    "FixedSpectrum": "ascent.fourier",
    "project": "attribution.project",
    "Projection": "attribution.projection",
    "explain": "attribution.explain",
    "Explanation": "attribution.explanation",
    "report": "atlas.report",
    "survey": "dataset.survey",
    "Survey": "dataset.result",
    "ablate": "ablation.ablate",
    "Ablation": "ablation.result",
    "compare": "comparison.compare",
    "Comparison": "comparison.result",
    "top_projections": "atlas.top_projections",
    "Monitor": "monitor.monitor",
    "Trouble": "monitor.health",
    "FolderWriter": "trackers.folder",
    "LayerNotFoundError": "errors",
    "TorchlensVizError": "errors",
}
_DOORS = frozenset({"errors", "objectives", "testing"})  # modules that are public as a whole

__all__ = [*_HOME]


if not TYPE_CHECKING:  # type checkers know the names from above, and must report a misspelt one

    def __getattr__(name: str) -> object:
        if name in _DOORS:
            return importlib.import_module(f"{__name__}.{name}")
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_DOORS})
