"""A progress bar, for those who asked for one."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, TypeVar, final

from torchlens_viz.arguments import flag
from torchlens_viz.errors import needed

T = TypeVar("T")

# The amount done may be a fraction.
_WHOLE: Final = "{percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} {unit} [{elapsed}<{remaining}{postfix}]"


def is_shown(progress: bool | None) -> bool:
    """Tell whether to show a bar: None shows one where tqdm is installed and somebody can see it."""
    if progress is not None:
        return flag(progress, "progress")
    return importlib.util.find_spec("tqdm") is not None and (sys.stderr.isatty() or _is_notebook())


def _is_notebook() -> bool:
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return type(shell).__name__ == "ZMQInteractiveShell"


def tracked(items: Iterable[T], *, shown: bool, total: int, unit: str) -> Iterator[T]:
    """Pass items on, with a bar on stderr that counts them where `shown`.

    Raises:
        MissingDependencyError: A bar was asked for and tqdm is not installed.
    """
    if not shown:
        return iter(items)
    return iter(_tqdm()(items, total=total, unit=unit))


@final
class Bar:
    """A bar on stderr for work that advances by fractions; within its `with` block.

    Args:
        shown: Whether there is to be one.
        total: How much there is to do.
        unit: Of what.

    Raises:
        MissingDependencyError: A bar was asked for and tqdm is not installed.
    """

    def __init__(self, *, shown: bool, total: int, unit: str) -> None:
        self._bar = _tqdm()(total=total, unit=unit, bar_format=_WHOLE) if shown else None

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def reach(self, amount: float, **figures: str) -> None:
        """Show that `amount` of the total is done, and figures beside it."""
        if self._bar is not None:
            if figures:
                self._bar.set_postfix(figures, refresh=False)
            self._bar.update(amount - self._bar.n)


@contextlib.contextmanager
def counter(*, shown: bool, total: int | None, unit: str) -> Iterator[Callable[[int], object]]:
    """Give a function that adds to a bar on stderr, which shows the rate as well, where `shown`.

    Args:
        shown: Whether there is to be a bar.
        total: How much there is to do, where that is known.
        unit: Of what.

    Raises:
        MissingDependencyError: A bar was asked for and tqdm is not installed.
    """
    bar = _tqdm()(total=total, unit=unit) if shown else None
    try:
        yield (lambda amount: None) if bar is None else bar.update
    finally:
        if bar is not None:
            bar.close()


def _tqdm() -> Any:
    # In a notebook a bar of its own, no red text; without ipywidgets there is none, only a warning.
    has_own = _is_notebook() and importlib.util.find_spec("ipywidgets") is not None
    package = "tqdm.auto" if has_own else "tqdm"
    return needed(package, "`progress=True` needs tqdm", "progress").tqdm
