"""What passes a ReLU on the way back: the gradient's, deconvnet's and guided backpropagation's rule."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any, Final, Literal, TypeAlias, final

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from torchlens_viz.backprop.relu import Limits, ReLUs
from torchlens_viz.errors import InvalidArgumentError
from torchlens_viz.models.layers import named_layers

Rule: TypeAlias = Literal["deconvnet", "guided", "gradient"]

# What bends the path of an image and is no ReLU, as functions, methods and in place.
_BENDING: Final = (
    *("leaky_relu", "prelu", "rrelu", "elu", "celu", "selu", "gelu", "silu", "mish", "softplus", "softsign"),
    *("hardswish", "hardsigmoid", "hardshrink", "softshrink", "tanhshrink", "logsigmoid", "sigmoid"),
    *(
        "tanh",
        "erf",
        "sin",
        "cos",
        "atan",
        "exp",
        "expm1",
        "log",
        "log1p",
        "abs",
        "glu",
        "softmax",
        "softmin",
    ),
    *("log_softmax", "gumbel_softmax", "multi_head_attention_forward", "scaled_dot_product_attention"),
    *("lp_pool1d", "lp_pool2d", "lp_pool3d", "lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell"),
    *("clamp", "clip", "clamp_min", "clamp_max", "hardtanh", "threshold", "relu"),
)
# As autograd calls the same, where they are hidden in an operation that cannot be looked into.
_HIDDEN: Final = re.compile(
    r"(Relu|LeakyRelu|Prelu|PreluKernel|Rrelu(WithNoise)?|Threshold|Hardtanh|Elu|Celu|Selu|Gelu|Silu|Mish|"
    r"Softplus|Hardswish|Hardsigmoid|Hardshrink|Softshrink|LogSigmoid\w*|Sigmoid|Tanh|Erf|Glu|Softmax|"
    r"LogSoftmax|ScaledDotProduct\w*|\w*Rnn\w*|\w*Lstm\w*|\w*Gru\w*|NativeMultiHeadAttention)Backward\d*"
)
_LARGER_OF_TWO: Final = frozenset(
    {torch.maximum, torch.Tensor.maximum, torch.fmax, torch.Tensor.fmax, torch.max, torch.Tensor.max}
)


def _functions(names: tuple[str, ...]) -> dict[Callable[..., Any], str]:
    homes: tuple[Any, ...] = (torch, torch.Tensor, F, torch.special, torch._C._nn)
    return {
        getattr(home, form): name
        for name in names
        for home in homes
        for form in (name, f"{name}_")
        if callable(getattr(home, form, None))
    }


_REFUSED: Final = _functions(_BENDING)


@final
class Rectified(ReLUs):
    """While active, ReLUs let pass, on the way back, what a rule says; the values stay what they are.

    `"deconvnet"` lets pass what is positive of what comes back, wherever the ReLU itself was closed or open;
    `"guided"` lets the same pass where it was open. All else passes gradients as always: convolutions, the
    switches of a max pooling, batch normalisation, sums, concatenations. Which other functions bend the path
    is noted, since for them neither rule is defined: `check` refuses them.

    Args:
        network: What runs, to name its layers in a refusal.
        rule: `"deconvnet"` or `"guided"`.
        option: By which the caller chose it, for a refusal; `"gradient"` is another choice.

    Attributes:
        met: How many ReLUs ran.

    Source:
        Zeiler & Fergus, "Visualizing and Understanding Convolutional Networks", ECCV 2014;
        Springenberg, Dosovitskiy, Brox & Riedmiller, "Striving for Simplicity: The All Convolutional Net",
        ICLR workshop 2015.
    """

    def __init__(
        self, network: nn.Module, rule: Literal["deconvnet", "guided"], *, option: str = "rule"
    ) -> None:
        super().__init__()
        self._rule: Final = rule
        self._option: Final = option
        self.met = 0
        self._names = {id(module): name for name, module in reversed(named_layers(network))}
        self._refusal = ""

    def stand_in(self, values: torch.Tensor, limits: Limits) -> torch.Tensor:
        """Return a ReLU with the rule's way back."""
        self.met += 1
        rectified: torch.Tensor = _Rectified.apply(values, limits, self._rule == "guided")
        return rectified

    def pass_by(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Note the first operation on the image's path that a rule is not defined for."""
        if self._refusal:
            return
        operation = _REFUSED.get(func)
        if operation is None and func in _LARGER_OF_TWO:
            operands = [each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor)]
            if len(operands) == 2 and sum(_has_path(each) for each in operands) == 1:
                operation = "the larger of a map and a constant (write it as torch.relu, if it is one)"
        if operation is not None and any(map(_has_path, tree_leaves((args, dict(kwargs))))):
            self._refusal = f"{self._place()} applies {operation}"

    def check(self, output: torch.Tensor) -> None:
        """Refuse a pass that led to `output` if anything on its path was no ReLU and yet bent it.

        Raises:
            InvalidArgumentError: So it is; the message names the operation and where it stands.
        """
        reason = self._refusal or next(_hidden(output), "")
        if reason:
            remedy = f'pass `{self._option}="gradient"`, or choose a layer before it'
            raise InvalidArgumentError(
                f'`{self._option}="{self._rule}"` says what passes a ReLU, and is defined for nothing else '
                f"that bends a path, but {reason}; {remedy}"
            )

    def _place(self) -> str:
        """Say which module runs the operation: the innermost one whose method is being called."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            module = frame.f_locals.get("self")
            if isinstance(module, nn.Module) and id(module) in self._names:
                kind = type(module).__name__
                name = self._names[id(module)]
                return f"`{name}` ({kind})" if name else f"the model itself ({kind})"
            frame = frame.f_back
        return "the model"


def _has_path(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


def _hidden(output: torch.Tensor) -> Iterator[str]:
    """Yield what bends the path to a tensor and was not seen, as within a fused or a scripted operation."""
    seen: set[Any] = set()
    waiting: list[Any] = [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [parent for parent, _ in node.next_functions]
        name = node.name()
        if name == "CheckpointFunctionBackward":
            continue  # it gives no such gradient at all, which is said where it is asked for
        if _HIDDEN.fullmatch(name):
            yield f"{re.sub(r'Backward[0-9]*$', '', name)} is hidden within an operation of the model"
        elif isinstance(node, torch.autograd.function.BackwardCFunction) and name != "_RectifiedBackward":
            yield f"the model has an operation of its own, {name.removesuffix('Backward')}"


class _Rectified(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, values: torch.Tensor, limits: Limits, is_gated: bool) -> torch.Tensor:
        if is_gated:
            is_above, is_below = limits.is_open(values)
            context.save_for_backward(is_above & is_below)
        return values.clamp(limits.low, limits.high)

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        passing = gradients[0].clamp(min=0)
        for is_open in context.saved_tensors:
            passing = passing * is_open
        return passing, None, None
