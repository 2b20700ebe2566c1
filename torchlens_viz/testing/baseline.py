"""Statistics of activations against a baseline in a small file that people can read."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, Final, final

import torch

from torchlens_viz.arguments import integer
from torchlens_viz.errors import ArchiveError, InvalidArgumentError, reason_of
from torchlens_viz.files.paths import replacing, require_regular, safe_name
from torchlens_viz.stats.channels import ChannelStats
from torchlens_viz.testing.messages import COMPARED, differences, nonfinite
from torchlens_viz.testing.subjects import Globs, Subject, read, statistics_of

_FORMAT: Final = "torchlens_viz.baseline/1"
_OPTION: Final = "--activations-overwrite"
_MOST_SHOWN: Final = 20  # differences; what comes after the first layers follows from them


@final
class ActivationRegression:
    """Compares what a test sees with what it saw when its baseline was written; see the fixture."""

    def __init__(self, folder: Path, test: str, *, overwrite: bool) -> None:
        self._folder = folder
        self._test = test
        self._overwrite = overwrite
        self._used: set[str] = set()

    def check(
        self,
        acts: Subject,
        *,
        name: str | None = None,
        rtol: float = 1e-3,
        atol: float = 1e-5,
        layers: Globs = None,
        channel_dim: int | None = None,
    ) -> None:
        """Assert that the statistics of every channel are those of the baseline.

        The mean, std, min, max and zero fraction are compared, and the number of values. The baseline holds
        six digits. NaN and Inf fail, also where a baseline is being written.

        Args:
            acts: Activations, a tensor, statistics or a survey; see `torchlens_viz.testing`.
            name: What to add to the name of the baseline, which is the test's, where a test has several.
            rtol: How far a number may be off, as a share of what is expected.
            atol: How far it may be off besides.
            layers: Names or globs of the layers that count.
            channel_dim: The dimension that counts channels, where there are tensors; None is what `capture`
                found where it handed a tensor out, else 1.

        Raises:
            AssertionError: They differ, or there is no baseline yet.
            ArchiveError: The baseline cannot be read or written.
        """
        __tracebackhide__ = True
        names = [self._test] if name is None else [self._test, name]
        path = self._folder / f"{'.'.join(map(_file_name, names))}.json"
        if path.name in self._used:
            raise InvalidArgumentError(
                f"`name` must differ from that of the other checks in this test, got {name!r} once more"
            )
        self._used.add(path.name)
        found = {_plain(reading.label): statistics_of(reading, channel_dim) for reading in read(acts, layers)}
        spoilt = [text for label, stats in found.items() if (text := nonfinite(label, stats))]
        if spoilt:
            raise AssertionError("\n".join(spoilt))
        if self._overwrite:
            _write(path, self._test, found)
            return
        if not path.exists():
            raise AssertionError(
                f"there is no baseline {_near(path)}; run `pytest {_OPTION}` to write it, and commit it"
            )
        failures = _compare(found, _read(path), rtol, atol)
        if failures:
            head = f"{len(failures)} differences from the baseline {_near(path)}"
            more = len(failures) - _MOST_SHOWN
            shown = failures[:_MOST_SHOWN] + ([f"... and {more:,} more, further on"] if more > 0 else [])
            tail = f"where this is meant, run `pytest {_OPTION}` to renew it"
            raise AssertionError("\n".join([head, *shown, tail]))


def _compare(
    found: dict[str, ChannelStats], expected: dict[str, ChannelStats], rtol: float, atol: float
) -> list[str]:
    failures = [f"{label}: there, and not in the baseline" for label in found if label not in expected]
    for label, wanted in expected.items():
        stats = found.get(label)
        if stats is None:
            failures.append(f"{label}: in the baseline, and not there")
            continue
        if stats.channels == wanted.channels and not torch.equal(stats.count.cpu(), wanted.count):
            ours, theirs = int(stats.count[0]), int(wanted.count[0])
            failures.append(f"{label}: {ours:,} values per channel where {theirs:,} were expected")
        failures += differences(label, stats, wanted, rtol=rtol, atol=atol)
    return failures


def _plain(label: str) -> str:
    """Return a label without the backticks around the name of a layer, which may have some of its own."""
    name, tick, rest = label.rpartition("`")
    return name[1:] + rest if tick else label


def _file_name(test: str) -> str:
    """Return the name of a test as that of a file; names that had to be changed differ by a hash."""
    plain = test.replace("::", ".").replace("[", "-").removesuffix("]")
    safe = safe_name(plain)
    is_plain = safe == plain and test.count("[") <= 1 and "]" not in test[:-1]
    return safe if is_plain else f"{safe}-{hashlib.sha256(test.encode()).hexdigest()[:8]}"


def _write(path: Path, test: str, found: dict[str, ChannelStats]) -> None:
    rows = []
    for label, stats in found.items():
        lines = [f'      "values": {int(stats.count[0])}']
        for name in COMPARED:
            rounded = [float(f"{value:.6g}") for value in getattr(stats, name).tolist()]
            lines.append(f'      "{name}": {json.dumps(rounded)}')
        rows.append(f"    {json.dumps(label)}: {{\n" + ",\n".join(lines) + "\n    }")
    head = f'{{\n  "format": {json.dumps(_FORMAT)},\n  "test": {json.dumps(test)},\n  "layers": {{\n'
    text = head + ",\n".join(rows) + "\n  }\n}\n"
    with replacing(path, ArchiveError) as temporary:
        temporary.write_text(text, "utf-8")


def _read(path: Path) -> dict[str, ChannelStats]:
    try:
        require_regular(path, ArchiveError, remedy=f"run `pytest {_OPTION}` to renew it")
        content = json.loads(path.read_text("utf-8"))
        if content["format"] != _FORMAT:
            raise ValueError(f"its format is {content['format']!r}, not {_FORMAT!r}")
        return {label: _stats(fields) for label, fields in content["layers"].items()}
    except ArchiveError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ArchiveError(
            f"cannot read the baseline {_near(path)}: {reason_of(error)}; run `pytest {_OPTION}` to renew it"
        ) from error


def _stats(fields: dict[str, Any]) -> ChannelStats:
    columns: dict[str, Any] = {
        name: torch.tensor(fields[name], dtype=torch.float64, device="cpu") for name in COMPARED
    }
    shapes = {tuple(column.shape) for column in columns.values()}
    if len(shapes) != 1 or len(shape := shapes.pop()) != 1:
        raise ValueError("its columns are not of one length")
    count = torch.full(
        shape, integer(fields["values"], "values", most=2**62), dtype=torch.int64, device="cpu"
    )
    return ChannelStats(**columns, count=count, nonfinite=torch.zeros_like(count))


def _near(path: Path) -> str:
    relative = os.path.relpath(path)
    return repr(str(path) if relative.startswith("..") else relative)
