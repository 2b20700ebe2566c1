"""A network that ends as soon as certain layers have run, in plain Python or compiled."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from types import FunctionType, MethodType
from typing import Any, Final, Literal, TypeAlias, final

import torch
from torch import nn
from torch.nn import functional as F

from torchlens_viz.errors import CaptureError

Values: TypeAlias = dict[str, torch.Tensor]

_HOOKS: Final = (
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called", "_backward_pre_hooks", "_backward_hooks",
)  # fmt: skip


class _ReachedError(BaseException):
    """Unwinds a forward pass; not an `Exception`, because models may catch those."""


@final
class Cut:
    """What chosen layers put out or take, without what comes after the last of them.

    In the place of each layer stands a shell, for good, so that the model must be a copy that nobody else
    uses. Nothing here but plain Python that Dynamo can follow: the whole network compiles as one graph.

    Args:
        model: The copy.
        layers: Names of modules in it that take or put out a tensor with a row per image. Of a layer that
            runs several times, the first call counts.
        io: Whether to return what the layers put out, or what they take, in which case they do not run.
        is_compiled: Whether `torch.compile` is to be used.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[str], *, io: Literal["input", "output"], is_compiled: bool
    ) -> None:
        self._model = model
        self._layers: Final = tuple(layers)
        self._io = io
        self._found: Values = {}
        self._most_rows = 0
        for name in layers:
            shell = model.get_submodule(name)
            shell.forward = self._ending(name, _moved_out_of(shell))
        self._compiled = _compiled(self) if is_compiled else None

    def __call__(self, images: torch.Tensor, *, eagerly: bool = False) -> Values:
        """Run the network on what the model takes, (N, C, H, W), as far as the layers.

        Args:
            images: What the model takes.
            eagerly: Run in plain Python, compiled or not, as where operations are replaced for a moment.

        Returns:
            A value per layer, by name.

        Raises:
            CaptureError: The network cannot be compiled.
        """
        if self._compiled is None or eagerly:
            return self._run(images)
        rows = len(images)
        self._most_rows = max(self._most_rows, rows)
        # To compile for a smaller batch takes longer than to run one that was filled up.
        images = F.pad(images, [0, 0] * (images.ndim - 1) + [0, self._most_rows - rows])
        try:
            with warnings.catch_warnings():  # Dynamo looks at what only leaves have, which `images` is not
                warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
                values = self._compiled(images)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = " ".join(str(error).partition("\n\n")[0].split())[:300]
            raise CaptureError(
                f"`torch.compile` failed on this model; leave `compile` out ({reason})"
            ) from error
        return {name: value[:rows] for name, value in values.items()}

    def _run(self, images: torch.Tensor) -> Values:
        self._found = {}
        try:
            self._model(images)
        except _ReachedError:
            found, self._found = self._found, {}
            return found
        missing = next(name for name in self._layers if name not in self._found)
        raise CaptureError(
            f"`{missing}` did not run in this pass, though it did in the first one: the model decides by the "
            "values it sees; choose a layer that always runs"
        )

    def _ending(self, name: str, layer: nn.Module) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            value = args[0] if self._io == "input" else layer(*args, **kwargs)
            if name not in self._found:
                # What runs between the layers may work in place; after the last of them, nothing runs.
                self._found[name] = value if len(self._layers) == 1 else value.clone()
                if len(self._found) == len(self._layers):
                    raise _ReachedError
            return value

        return run


def _moved_out_of(shell: nn.Module) -> nn.Module:
    """Return the layer that a module was, and leave of the module what others may read, without hooks."""
    layer = object.__new__(type(shell))
    layer.__dict__ = dict(shell.__dict__)
    for hooks in _HOOKS:
        setattr(shell, hooks, OrderedDict())
    return layer


def _compiled(cut: Cut) -> Callable[[torch.Tensor], Values]:
    """Compile `Cut._run`, with a limit of its own to how often it may be compiled anew.

    Dynamo counts per code object, and runs in plain Python without a word what it has met too often.
    """
    run = Cut._run
    fresh = FunctionType(run.__code__.replace(), run.__globals__, run.__name__)
    compiled: Callable[[torch.Tensor], Values] = torch.compile(MethodType(fresh, cut), dynamic=False)
    return compiled
