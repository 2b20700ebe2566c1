"""Who is shown a bar: those who asked, and those who can see it."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from torchlens_viz import maximize, survey
from torchlens_viz.errors import MissingDependencyError
from torchlens_viz.progress import is_shown


class ZMQInteractiveShell:
    """What IPython calls the shell of a notebook."""


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)


def test_asked_or_not_the_answer_is_that_of_the_caller(terminal):
    assert is_shown(True)
    assert not is_shown(False)


def test_by_default_whoever_sits_at_a_terminal_sees_one(terminal):
    assert is_shown(None)


def test_by_default_nobody_sees_one_in_a_file():
    assert not sys.stderr.isatty()
    assert not is_shown(None)


def test_by_default_a_notebook_shows_one(monkeypatch):
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=ZMQInteractiveShell))
    assert is_shown(None)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: None))
    assert not is_shown(None)


def run_survey(progress):
    survey(nn.Conv2d(1, 1, 1), [torch.zeros(2, 1, 2, 2)], "", progress=progress)


def run_maximize(progress):
    maximize(nn.Conv2d(1, 1, 1), "", 0, size=4, steps=1, progress=progress)


@pytest.mark.parametrize("run", [run_survey, run_maximize])
def test_without_tqdm_a_bar_is_missed_only_by_who_demands_it(terminal, monkeypatch, run):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(MissingDependencyError, match=r"`progress=True` needs tqdm, which is not installed"):
        run(True)
    run(None)
    run(False)


@pytest.mark.parametrize(("run", "unit"), [(run_survey, "images"), (run_maximize, "channels")])
def test_at_a_terminal_both_show_one_by_default(capsys, monkeypatch, run, unit):
    run(None)
    assert unit not in capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    run(None)
    assert unit in capsys.readouterr().err
