"""Which class each picture of a folder is of, where each class has a folder of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torchlens_viz.errors import InvalidArgumentError


class Classes(NamedTuple):
    """Which output of a network each picture belongs to.

    Attributes:
        outputs: The output of each folder, by name.
        labels: The output of each picture.
        told: How they were found, in one line.
    """

    outputs: dict[str, int]
    labels: list[int]
    told: str


def classes_of(files: Sequence[Path], folder: Path, *, names: Sequence[str], outputs: int) -> Classes:
    """Find the class of each picture: the first folder on its way.

    A folder belongs to the output of its name, where the model tells names and all folders bear one (case,
    `_` and `-` apart); to the output of its number, where all are numbers; or else, where there are as many
    folders as outputs, to that of its place in the order of names, as in `torchvision.datasets.ImageFolder`.

    Args:
        files: All pictures.
        folder: Where they lie.
        names: What the outputs stand for, in their order; empty where that is not known.
        outputs: How many outputs there are.

    Raises:
        InvalidArgumentError: A picture lies in no folder, or the folders fit the outputs in no way.
    """
    ways = [path.relative_to(folder).parts for path in files]
    bare = next((path for path, way in zip(files, ways, strict=True) if len(way) == 1), None)
    if bare is not None:
        raise InvalidArgumentError(
            f"`--loss` needs a folder of pictures for each class, got {str(bare)!r} outside of any; move it"
        )
    folders = sorted({way[0] for way in ways})
    known = {_spelt(name): place for place, name in enumerate(names)}
    numbers = {int(name) for name in folders if name.isdecimal()}
    if len(known) == len(names) and {_spelt(name) for name in folders} <= known.keys():
        places, how = [known[_spelt(name)] for name in folders], "by name"
    elif len(numbers) == len(folders) and max(numbers) < outputs:
        places, how = [int(name) for name in folders], "by number"
    elif len(folders) == outputs:
        places, how = list(range(outputs)), "in the order of names"
    else:
        unknown = ", ".join(repr(name) for name in folders if _spelt(name) not in known)
        raise InvalidArgumentError(
            "`--loss` needs a folder for each class, named as the output is or by its number, or as many "
            f"folders as outputs; got {len(folders):,} for {outputs:,} outputs, and there is no output "
            f"{unknown[:200]}; rename the folders"
        )
    found = dict(zip(folders, places, strict=True))
    few = ", ".join(f"{name!r} is output {place}" for name, place in list(found.items())[:3])
    more = f" and {len(found) - 3:,} more" if len(found) > 3 else ""
    return Classes(found, [found[way[0]] for way in ways], f"classes {how}: {few}{more}")


def _spelt(name: str) -> str:
    return name.replace("_", " ").replace("-", " ").casefold()
