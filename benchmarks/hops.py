"""How data walks: what of the package a value passes on its way through three of its functions.

    python benchmarks/hops.py            # PYTHONPATH says which version of the package is looked at

Three walks, each made once before to warm up (imports and caches): an activation through `feature_grid`; a
model through `capture` (entering the block, one forward pass in which one layer is recorded, and leaving);
two channels through `maximize`, two steps on a network of two convolutions.

What is counted, with `sys.setprofile` in the calling thread, are entries into functions of the package:
methods, properties and closures too, but not lambdas, comprehensions, class bodies, what `dataclass`
generates, or anything outside the package.

- hops: entries where the walk passes from one module to another. The caller is the nearest function of the
  package further up, so that a hook that torch calls counts as called by who ran the model; the first entry,
  from here, counts. Ten calls of one function in another module are ten hops.
- between rooms: those of them that pass from one room to another. Rooms are the first folders; a module at
  the door is a room of its own, and in a flat package each module is.
- functions: the different functions entered, however often; modules, rooms: where these stand.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType

import torch
from torch import nn

import torchlens_viz
from torchlens_viz import capture, feature_grid, maximize

PACKAGE = Path(torchlens_viz.__file__).parent


def entries(walk: Callable[[], object]) -> list[tuple[CodeType | None, CodeType]]:
    """Caller and callee of every entry into a function of the package, in order; None is who is outside."""
    found: list[tuple[CodeType | None, CodeType]] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and is_ours(frame.f_code):
            above = frame.f_back
            while above is not None and not is_ours(above.f_code):
                above = above.f_back
            found.append((above and above.f_code, frame.f_code))

    sys.setprofile(note)
    try:
        walk()
    finally:
        sys.setprofile(None)
    return found


def is_ours(code: CodeType) -> bool:
    return code.co_filename.startswith(str(PACKAGE)) and not code.co_name.startswith("<")


def module_of(code: CodeType) -> Path:
    return Path(code.co_filename).relative_to(PACKAGE).with_suffix("")


def walks() -> dict[str, Callable[[], object]]:
    torch.manual_seed(0)
    activation, image = torch.rand(1, 4, 14, 14), torch.rand(1, 3, 16, 16)
    net = nn.Sequential(nn.Conv2d(3, 4, 5), nn.ReLU(), nn.Conv2d(4, 8, 3)).eval()

    def record() -> None:
        with torch.no_grad(), capture(net, "0"):
            net(image)

    return {
        "`activation` through `feature_grid`": lambda: feature_grid(activation),
        "the same with labels and legend": lambda: feature_grid(activation, labels=True, legend=True),
        "`model` through `capture`": record,
        "`channels` through `maximize`": lambda: maximize(net, "2", [0, 5], size=16, steps=2),
    }


def main() -> None:
    print(f"{PACKAGE}\n\n| walk | hops | between rooms | functions | modules | rooms | which rooms |")
    print("|---|--:|--:|--:|--:|--:|---|")
    for name, walk in walks().items():
        walk()
        found = entries(walk)
        steps = [(caller and module_of(caller), module_of(callee)) for caller, callee in found]
        hops = [(source, end) for source, end in steps if source != end]
        between = sum(source is None or source.parts[0] != end.parts[0] for source, end in hops)
        functions = {callee for _, callee in found}
        modules = {module_of(callee) for callee in functions}
        rooms = sorted({module.parts[0] for module in modules})
        which = ", ".join(rooms) if len(rooms) < 12 else "..."
        figures = f"{len(hops)} | {between} | {len(functions)} | {len(modules)} | {len(rooms)}"
        print(f"| {name} | {figures} | {which} |")


if __name__ == "__main__":
    main()
