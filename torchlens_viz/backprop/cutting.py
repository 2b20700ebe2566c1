"""A network that ends as soon as certain layers have run, in plain Python or compiled."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from types import FunctionType, MethodType
from typing import Any, Final, Literal, TypeAlias, final

import torch
from torch import nn
from torch.nn import functional as F

from torchlens_viz.errors import CaptureError
from torchlens_viz.hooks.forward import eager_stance
from torchlens_viz.models.layers import select_one

Values: TypeAlias = dict[str, torch.Tensor]


class _ReachedError(BaseException):
    """Unwinds a forward pass; not an `Exception`, because models may catch those."""


@final
class Cut:
    """What chosen layers put out or take, without what comes after the last of them.

    The layers become instances of a class of their own, for good, so that the model must be a copy that
    nobody else uses. That is plain Python which Dynamo can follow: it compiles a pass and its end together.

    Args:
        model: The copy.
        layers: Names of modules in it that take or put out a tensor with a row per image, or several. Of a
            layer that runs several times, the first call counts.
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
            self._end_at(name, select_one(model, name).module)
        self._compiled = _compiled(self) if is_compiled else None

    def __call__(self, images: torch.Tensor, *, eagerly: bool = False) -> Values:
        """Run the network on what the model takes, (N, C, H, W), as far as the layers.

        Args:
            images: What the model takes.
            eagerly: Run in plain Python, compiled or not, as where operations are replaced for a moment.

        Returns:
            A value per layer, by name.

        Raises:
            CaptureError: The network cannot be compiled, or a layer did not run.
        """
        if self._compiled is None or eagerly:
            with eager_stance():  # the pass could not end within a part that is compiled
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
        # Windows and heads are often folded into the batch, several rows in a row for each image.
        return {name: value[: len(value) // self._most_rows * rows] for name, value in values.items()}

    def _run(self, images: torch.Tensor) -> Values:
        self._found = {}
        try:  # noqa: SIM105  (Dynamo follows this, and not `suppress`)
            self._model(images)
        except _ReachedError:
            pass
        found, self._found = self._found, {}
        missing = [name for name in self._layers if name not in found]
        if not missing:  # also where the model caught what ended the pass, and went on
            return found
        raise CaptureError(
            f"`{missing[0]}` did not run in this pass, though it did in the first one, of a single image; "
            "choose a layer that always runs"
        )

    def _end_at(self, name: str, layer: nn.Module) -> None:
        """Let a pass end with a call of this layer, if it is the last that is missing."""
        kind = type(layer)
        call: Callable[..., Any] = (
            kind._call_impl
        )  # with all hooks, the caller's own as well as those of all modules

        def run(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            value = args[0] if self._io == "input" else call(module, *args, **kwargs)
            if name not in self._found:
                # What runs between the layers may work in place; after the last of them, nothing runs.
                self._found[name] = value if len(self._layers) == 1 else value.clone()
                if len(self._found) == len(self._layers):
                    raise _ReachedError
            return value

        object.__setattr__(layer, "__class__", type(kind.__name__, (kind,), {"_call_impl": run}))


def _compiled(cut: Cut) -> Callable[[torch.Tensor], Values]:
    """Compile `Cut._run`, with a limit of its own to how often it may be compiled anew.

    Dynamo counts per code object, and runs in plain Python without a word what it has met too often.
    """
    run = Cut._run
    fresh = FunctionType(run.__code__.replace(), run.__globals__, run.__name__)
    compiled: Callable[[torch.Tensor], Values] = torch.compile(MethodType(fresh, cut), dynamic=False)
    return compiled
