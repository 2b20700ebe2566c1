"""A private copy of a network to take gradients with, and the cut where it may end."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from types import FunctionType, MethodType
from typing import Any, Final, Literal, TypeAlias, final

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import _StopRecomputationError

from torchlens_viz.errors import CaptureError, in_one_line, message_of
from torchlens_viz.hooks.forward import eager_stance, is_traced, let_go
from torchlens_viz.models.copying import private_copy
from torchlens_viz.models.layers import called_alike, select_one, unwrap
from torchlens_viz.models.state import require_values

# Their weights are what autocast would convert anew at every step; all else stays as autocast wants it.
_CAST: Final = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear)
_ROWS: Final = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)  # a row of their weights makes one channel
Values: TypeAlias = dict[str, torch.Tensor]


def shadow_of(
    model: nn.Module, *, dtype: torch.dtype = torch.float32, keeps_types: bool = False
) -> nn.Module:
    """Copy a model, but not its weights, for computing gradients with respect to its input.

    Args:
        model: Any module; wrappers (`torch.compile`, DDP) are left out.
        dtype: `torch.bfloat16` makes copies of the weights of convolutions and dense layers in that type, to
            be run under autocast. Else the weights are the model's own memory, where it is float32, or
            float32 copies of it. Buffers are copies.
        keeps_types: Leave all weights in the types that they have, for a model that converts what its parts
            take by itself.

    Returns:
        The copy, in eval mode; no parameter requires a gradient. Hooks that belong to it, such as torch's own
        and those of its modules, are copied too; those that somebody else registered are not, and never run.
        Its first pass is to be made within `Parting`, since a model may write to its weights.

    Raises:
        InvalidArgumentError: It has no values: its parameters are lazy, on the meta device, or fake.
        InvalidTypeError: The model holds something that cannot be copied.
    """
    original = unwrap(model)
    require_values(original, is_copied=True)
    cast = _weights_to_cast(original) if dtype != torch.float32 and not keeps_types else set()

    def change(tensor: torch.Tensor) -> torch.Tensor:
        made = tensor.data  # which does not count what is written to it as written to the model's
        if not isinstance(tensor, nn.Parameter):
            made = made.clone()  # a forward pass may write to it
        if made.is_floating_point() and made.dtype != torch.float32 and not keeps_types:
            made = made.float()
        if id(tensor) in cast:
            made = made.to(dtype)
            if made.ndim == 4:
                made = made.contiguous(memory_format=torch.channels_last)
        # What was made in inference mode can take no part in autograd.
        return made.clone() if made.is_inference() else made

    twin = private_copy(original, change)
    _confine_nonfinite(twin)
    return called_alike(model, twin)


def _confine_nonfinite(twin: nn.Module) -> None:
    """Let a channel with NaN or Inf among its weights put out NaN, and keep that from the other gradients.

    Its output is lost either way, but zero times NaN would be NaN in every gradient that passes the layer.
    """
    for module in twin.modules():
        if type(module) not in _ROWS:  # a scripted one has no such dict of parameters
            continue
        weight, bias = (module._parameters.get(name) for name in ("weight", "bias"))
        if weight is None or weight.is_meta or weight.sum().isfinite():
            continue
        is_spoilt = ~weight.isfinite().flatten(1).all(1)
        clean = weight.masked_fill(is_spoilt.view(-1, *[1] * (weight.ndim - 1)), 0)
        added = weight.new_zeros(len(weight)) if bias is None else bias
        told = added.masked_fill(is_spoilt, torch.nan)
        for name, values in (("weight", clean), ("bias", told)):
            module.register_parameter(name, nn.Parameter(values, requires_grad=False))


def _weights_to_cast(model: nn.Module) -> set[int]:
    """Return the ids of the weights that only convolutions and dense layers use."""
    uses = Counter[int]()
    own = Counter[int]()
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and parameter.dtype == torch.float32:
                uses[id(parameter)] += 1
                # A hook before it may compute the weight anew, as old-style spectral norm does, in float32.
                own[id(parameter)] += type(module) in _CAST and not module._forward_pre_hooks
    return {key for key, count in uses.items() if own[key] == count}


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
        ends = _Ends(layers, io)
        for name in layers:
            ends.end_at(name, select_one(model, name).module)
        self._pass = _Pass(model, ends)
        self._most_rows = 0
        self._compiled = _compiled(self._pass) if is_compiled else None

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
                return self._pass.run(images)
        rows = len(images)
        self._most_rows = max(self._most_rows, rows)
        # To compile for a smaller batch takes longer than to run one that was filled up.
        images = F.pad(images, [0, 0] * (images.ndim - 1) + [0, self._most_rows - rows])
        try:
            with warnings.catch_warnings():  # Dynamo looks at what only leaves have, which `images` is not
                warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
                values = self._compiled(images)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = in_one_line(message_of(error).partition("\n\n")[0])
            raise CaptureError(
                f"`torch.compile` failed on this model; leave `compile` out ({reason})"
            ) from error
        # Windows and heads are often folded into the batch, several rows in a row for each image.
        return {name: value[: len(value) // self._most_rows * rows] for name, value in values.items()}


@final
class _Pass:
    """A forward pass as far as the layers, which `torch.compile` can follow."""

    def __init__(self, model: nn.Module, ends: _Ends) -> None:
        self._model = model
        self._ends = ends

    def run(self, images: torch.Tensor) -> Values:
        self._ends.found = {}
        try:
            self._model(images)
        except _ReachedError as reached:
            if not is_traced():
                let_go(reached)
        found, self._ends.found = self._ends.found, {}
        missing = [name for name in self._ends.layers if name not in found]
        if not missing:  # also where the model caught what ended the pass, and went on
            return found
        raise CaptureError(
            f"`{missing[0]}` did not run in this pass, though it did in the first one, of a single image; "
            "choose a layer that always runs"
        )


@final
class _Ends:
    """Where passes end, and what was found on the way there.

    It does not know the model, of which the layers know it: a copy of a large network would otherwise stay
    until the garbage collector comes by.
    """

    def __init__(self, layers: Sequence[str], io: Literal["input", "output"]) -> None:
        self.layers: Final = tuple(layers)
        self.found: Values = {}
        self._io = io
        self._ended_at = ""

    def end_at(self, name: str, layer: nn.Module) -> None:
        """Let a pass end with a call of this layer, if it is the last that is missing."""
        kind = type(layer)
        call: Callable[..., Any] = (
            kind._call_impl
        )  # with all hooks, the caller's own as well as those of all modules

        def run(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            value = args[0] if self._io == "input" else call(module, *args, **kwargs)
            is_compiling = is_traced()
            if not is_compiling and torch._C._current_graph_task_id() != -1:
                # In backward, checkpointing runs it again, as far as the pass went.
                if name == self._ended_at:
                    raise _StopRecomputationError
                return value
            if name not in self.found:
                # What runs between the layers may work in place; after the last of them, nothing runs.
                self.found[name] = value if len(self.layers) == 1 else value.clone()
                if len(self.found) == len(self.layers):
                    if not is_compiling:
                        self._ended_at = name
                    raise _ReachedError
            return value

        object.__setattr__(layer, "__class__", type(kind.__name__, (kind,), {"_call_impl": run}))


def _compiled(one: _Pass) -> Callable[[torch.Tensor], Values]:
    """Compile `_Pass.run`, with a limit of its own to how often it may be compiled anew.

    Dynamo counts per code object, and runs in plain Python without a word what it has met too often.
    """
    run = _Pass.run
    fresh = FunctionType(run.__code__.replace(), run.__globals__, run.__name__)
    compiled: Callable[[torch.Tensor], Values] = torch.compile(MethodType(fresh, one), dynamic=False)
    return compiled
