"""The pytest plugin: activations of a model in one call, and their statistics against a baseline.

Installing the package is enough. Nothing heavy is imported before a fixture is used.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pytest

if TYPE_CHECKING:
    from torch import nn

    from torchlens_viz.hooks.activations import Activations
    from torchlens_viz.models.layers import Selector
    from torchlens_viz.testing.baseline import ActivationRegression


class Record(Protocol):
    """What the fixture `activations` is."""

    def __call__(self, model: nn.Module, x: Any, layers: Selector, **options: Any) -> Activations:
        """Run the model once, and return what the layers put out."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that renews baselines."""
    parser.getgroup("torchlens_viz").addoption(
        "--activations-overwrite",
        action="store_true",
        help="write the baselines of activation_regression.check(...) anew",
    )


@pytest.fixture
def activations() -> Record:
    """Return a function `activations(model, x, layers, **options)` that runs a model and gives `Activations`.

    The model runs once, in eval mode and without gradients; afterwards it is in the mode it was in. `x` is
    what it takes: a tuple holds several arguments, a dict arguments by name. The options are `capture`'s.
    """
    from torchlens_viz.hooks.capture import capture
    from torchlens_viz.models.state import inference
    from torchlens_viz.nested import cloned

    def record(model: nn.Module, x: Any, layers: Selector, **options: Any) -> Activations:
        with inference(model), capture(model, layers, **options) as acts:
            given = cloned(x)  # the model may work in place on what it gets
            if isinstance(given, dict):
                model(**given)
            else:
                model(*(given if isinstance(given, tuple) else (given,)))
        return acts

    return record


@pytest.fixture
def activation_regression(request: pytest.FixtureRequest) -> ActivationRegression:
    """Return an object whose `check(acts)` compares the statistics of every channel with a baseline.

    The baseline is `<module>/<test>.json` beside the test's file; `pytest --activations-overwrite` writes it.
    """
    from torchlens_viz.testing.baseline import ActivationRegression

    module = Path(request.path)
    test = request.node.nodeid.partition("::")[2] or request.node.name
    overwrite = bool(request.config.getoption("activations_overwrite"))
    return ActivationRegression(module.with_suffix(""), test, overwrite=overwrite)
