"""Entering a survey of many layers against entering one bare `capture` of the same layers.

A survey is entered when its loader is asked for the first batch: the layers are found, the hooks stand, and
nothing has run. A block for each layer would show here: twice the layers would take four times as long.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from torchlens_viz import capture, survey


class EnteredError(Exception):
    """The survey has asked for its first batch."""


class Door:
    """A loader that ends the survey where its first batch would come."""

    def __iter__(self) -> Door:
        return self

    def __next__(self) -> torch.Tensor:
        raise EnteredError


def enter_survey(model: nn.Module) -> None:
    with pytest.raises(EnteredError):
        survey(model, Door(), nn.Conv2d, progress=False)


def enter_capture(model: nn.Module) -> None:
    with capture(model, nn.Conv2d, copy=False, reduce=lambda tensor: None):
        pass


@pytest.mark.parametrize("layers", [100, 200, 400])
def test_entering_a_survey_of_a_chain_of(layers, versus):
    model = nn.Sequential(*(nn.Conv2d(1, 1, 1) for _ in range(layers))).eval()
    # The capture stands in the place of ours, so that the ratio says how many of it a survey takes to enter.
    versus(
        lambda: enter_capture(model),
        lambda: enter_survey(model),
        target="the same at each length",
        note="survey / bare capture",
    )
