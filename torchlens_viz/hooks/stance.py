"""The eager stance of `torch.compile`, held for as long as anybody needs it.

A hook added to a module that has been compiled never fires: the compiled code does not look at hooks again.
`torch.compiler.set_stance("force_eager")` makes compiled code run its Python source, where hooks do fire,
and costs no recompilation afterwards. It is one switch for the whole process and takes effect on
construction, so blocks that overlap without nesting would leave it on, or take it off early: hence the count.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_lock = threading.Lock()
_holders = 0
_stance: Any = None


@contextmanager
def eager_stance() -> Iterator[None]:
    """Run compiled code eagerly, in the whole process, until the last block that asked for it ends."""
    # Importing Dynamo takes a second; where nobody has imported it, nothing has been compiled.
    if "torch._dynamo" not in sys.modules:
        yield
        return
    _acquire()
    try:
        yield
    finally:
        _release()


def _acquire() -> None:
    global _holders, _stance
    with _lock:
        if _holders == 0:
            _stance = torch.compiler.set_stance("force_eager")
        _holders += 1


def _release() -> None:
    global _holders, _stance
    with _lock:
        _holders -= 1
        if _holders == 0:
            _stance.__exit__(None, None, None)
            _stance = None
