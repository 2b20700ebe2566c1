"""A private copy of a network to take gradients with, and the cut where it may end."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from types import FunctionType, MethodType
from typing import Any, Final, Literal, TypeAlias, final

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from torchlens_viz.errors import CaptureError, InvalidArgumentError, InvalidTypeError
from torchlens_viz.hooks.forward import eager_stance
from torchlens_viz.models.layers import select_one, unwrap

# Their weights are what autocast would convert anew at every step; all else stays as autocast wants it.
_CAST: Final = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear)
_ROWS: Final = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)  # a row of their weights makes one channel
Values: TypeAlias = dict[str, torch.Tensor]


def shadow_of(model: nn.Module, *, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Copy a model, but not its weights, for computing gradients with respect to its input.

    Args:
        model: Any module; wrappers (`torch.compile`, DDP) are left out.
        dtype: `torch.bfloat16` makes copies of the weights of convolutions and dense layers in that type, to
            be run under autocast. Else the weights are the model's own memory, where it is float32, or
            float32 copies of it. Buffers are copies.

    Returns:
        The copy, in eval mode; no parameter requires a gradient.

    Raises:
        InvalidArgumentError: It has lazy parameters, without values yet.
        InvalidTypeError: The model holds something that cannot be copied.
    """
    original = unwrap(model)
    cast = _weights_to_cast(original) if dtype != torch.float32 else set()
    memo: dict[int, object] = {}
    for tensor in _tensors_of(original):
        is_parameter = isinstance(tensor, nn.Parameter)
        made = tensor.detach()
        if not is_parameter:
            made = made.clone()  # a forward pass may write to it
        if made.is_floating_point() and made.dtype != torch.float32:
            made = made.float()
        if id(tensor) in cast:
            made = made.to(dtype)
            if made.ndim == 4:
                made = made.contiguous(memory_format=torch.channels_last)
        if made.is_inference():
            made = made.clone()  # what was made in inference mode can take no part in autograd
        memo[id(tensor)] = nn.Parameter(made, requires_grad=False) if is_parameter else made
    try:
        with _CopyingValues():
            twin: nn.Module = copy.deepcopy(original, memo)
    except Exception as error:
        raise InvalidTypeError(
            f"`model` must be a module that can be copied, got {type(original).__name__}, of which "
            f"copy.deepcopy says: {' '.join(str(error).split())}; give the nn.Module alone"
        ) from error
    _confine_nonfinite(twin)
    return twin.eval()


def _confine_nonfinite(twin: nn.Module) -> None:
    """Let a channel with NaN or Inf among its weights put out NaN, and keep that from the other gradients.

    Its output is lost either way, but zero times NaN would be NaN in every gradient that passes the layer.
    """
    for module in twin.modules():
        weight, bias = (module._parameters.get(name) for name in ("weight", "bias"))
        if type(module) not in _ROWS or weight is None or weight.is_meta or weight.sum().isfinite():
            continue
        is_spoilt = ~weight.isfinite().flatten(1).all(1)
        clean = weight.masked_fill(is_spoilt.view(-1, *[1] * (weight.ndim - 1)), 0)
        added = weight.new_zeros(len(weight)) if bias is None else bias
        told = added.masked_fill(is_spoilt, torch.nan)
        for name, values in (("weight", clean), ("bias", told)):
            module.register_parameter(name, nn.Parameter(values, requires_grad=False))


class _CopyingValues(TorchFunctionMode):
    """Within it, deepcopy takes tensors of a graph too, such as a hook of the caller may keep."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.__deepcopy__ and not args[0].is_leaf:
            return args[0].detach().clone()
        return func(*args, **(kwargs or {}))


def _tensors_of(model: nn.Module) -> list[torch.Tensor]:
    """Return parameters, buffers and what modules hold as plain attributes, as old-style weight norm does."""
    plain = [value for module in model.modules() for value in vars(module).values()]
    found = [*model.parameters(), *model.buffers(), *plain]
    tensors = [value for value in found if isinstance(value, torch.Tensor)]
    if any(is_lazy(tensor) for tensor in tensors):
        raise InvalidArgumentError(
            "`model` has lazy parameters, which have no values yet; run it once on an input first"
        )
    return tensors


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
