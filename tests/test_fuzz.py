"""Bad input, by counting: with whatever it is called, the library works or raises an error of its own.

What is tried is drawn with fixed seeds. What an error says is tested where it is raised; here is counted what
comes out raw: anything but a `TorchlensVizError`. An input that takes many seconds counts as well.
"""

from __future__ import annotations

import io
import random
import re
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch

from tests import hostile, hostile_files, hostile_words
from torchlens_viz.errors import InvalidTypeError

ARGUMENTS, FILES, COMMANDS = 1200, 400, 400


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A current folder in which everything may be written."""
    monkeypatch.chdir(tmp_path)
    hostile_words.make_folder(tmp_path)
    return tmp_path


def test_arguments_are_refused_by_errors_of_our_own(folder):
    chosen = random.Random(0).sample(hostile.arguments(), ARGUMENTS)
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        found = {case: wrong for case in chosen if (wrong := hostile.try_argument(*case))}
    assert len(found) < ARGUMENTS / 100, found


def test_damaged_files_are_read_or_refused(folder):
    (folder / "files").mkdir()
    files = hostile_files.make_files(folder / "files")
    found = {}
    for number in range(FILES):
        kind = sorted(files)[number % len(files)]
        path, read = files[kind]
        whole = path.read_bytes()
        path.write_bytes(hostile_files.damaged(whole, path.name, random.Random(number)))
        if wrong := hostile.raw(lambda read=read, path=path: read(path)):
            found[kind, number] = wrong
        path.write_bytes(whole)
    assert found == {}


def test_whole_files_are_read(folder):
    (folder / "files").mkdir()
    for path, read in hostile_files.make_files(folder / "files").values():
        read(path)


def test_command_lines_end_with_code_2_and_one_line(folder, monkeypatch):
    monkeypatch.syspath_prepend(Path.cwd())
    found = {}
    for number in range(COMMANDS):
        words = hostile_words.command_line(random.Random(number))
        if wrong := hostile_words.try_command(words):
            found[number] = (words, wrong)
    assert found == {}


@pytest.mark.parametrize("command", sorted(hostile_words.COMMANDS))
def test_commands_that_are_well_meant_work(folder, command):
    assert hostile_words.try_command(hostile_words.COMMANDS[command]) is None


@pytest.mark.parametrize(
    ("act", "wrong"),
    [
        (lambda: 1 + "", "TypeError at ?: \"unsupported operand type(s) for +: 'int' and 'str'\""),
        (lambda: torch.ones(2).view(3), "RuntimeError at ?: \"shape '[3]' is invalid"),
        (lambda: assert_false(), "AssertionError at ?: "),
    ],
)
def test_what_comes_out_raw_is_seen(act, wrong):
    assert hostile.raw(act).startswith(wrong)


def assert_false():
    assert not torch.ones(1)


def test_what_hangs_is_seen(monkeypatch):
    monkeypatch.setattr(hostile, "PATIENCE", 1)
    assert re.match("Hangs at", hostile.raw(lambda: [None for _ in iter(int, 1)]))


def test_errors_of_the_library_and_of_the_callers_are_not():
    def ours():
        raise InvalidTypeError("`x` must be another")

    assert hostile.raw(ours) is None
    assert hostile.raw(hostile.refuses) is None
