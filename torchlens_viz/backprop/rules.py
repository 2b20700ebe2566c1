"""What passes a ReLU on the way back: the gradient's, deconvnet's and guided backpropagation's rule."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
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
    *("hardswish", "hardsigmoid", "hardshrink", "softshrink", "tanhshrink", "logsigmoid", "sigmoid", "expit"),
    *("sin", "cos", "tan", "sinh", "cosh", "tanh", "sinc", "atan2", "arctan2", "hypot", "logit"),
    *("asin", "acos", "atan", "asinh", "acosh", "atanh"),
    *("arcsin", "arccos", "arctan", "arcsinh", "arccosh", "arctanh"),
    *("exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "logaddexp", "logaddexp2", "logsumexp"),
    *("erf", "erfc", "erfinv", "ndtr", "log_ndtr", "ndtri", "entr", "i0", "i0e", "i1", "i1e", "xlogy"),
    *("abs", "absolute", "__abs__", "sign", "sgn", "copysign", "heaviside"),
    *("round", "floor", "ceil", "trunc", "fix", "frac", "fmod", "remainder"),
    *("glu", "softmax", "softmin", "log_softmax", "gumbel_softmax"),
    *("multi_head_attention_forward", "scaled_dot_product_attention"),
    *("lp_pool1d", "lp_pool2d", "lp_pool3d", "lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell"),
    *("clamp", "clip", "clamp_min", "clamp_max", "hardtanh", "threshold", "relu"),
)
# As autograd calls the same, where they are hidden in an operation that cannot be looked into.
_HIDDEN: Final = re.compile(
    r"(Relu|LeakyRelu|Prelu|PreluKernel|Rrelu(WithNoise)?|Threshold|Hardtanh|Elu|Celu|Selu|Gelu|Silu|Mish|"
    r"Softplus|Hardswish|Hardsigmoid|Hardshrink|Softshrink|LogSigmoid\w*|Sigmoid|Tanh|Erf\w*|Glu|Softmax|"
    r"A?(Sin|Cos|Tan)h?|Atan2|Exp|Exp2|Expm1|Log|Log2|Log10|Log1P|Logaddexp2?|Logsumexp|Abs|Sign|Sgn|"
    r"LogSoftmax|ScaledDotProduct\w*|\w*Rnn\w*|\w*Lstm\w*|\w*Gru\w*|NativeMultiHeadAttention)Backward\d*"
)
_CLAMP: Final = re.compile(r"Clamp(Min|Max)?Backward\d*")
_IF_A_RELU: Final = " (write it as torch.relu, if it is one)"
_SMALL: Final = 1e-3  # to clamp at less keeps a divisor from zero
_COMPARISONS: Final = ("gt", "ge", "lt", "le", "greater", "greater_equal", "less", "less_equal", "signbit")
_MASK: Final = "_torchlens_viz_mask"  # an attribute of tensors that follow from how values compare
_DETACHED: Final = "_torchlens_viz_detached"  # and of those that are such values without their gradient


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
_ONE_OF_TWO: Final = {
    **dict.fromkeys(_functions(("maximum", "fmax", "max")), "larger"),
    **dict.fromkeys(_functions(("minimum", "fmin", "min")), "smaller"),
}
_COMPARING: Final = frozenset(_functions((*_COMPARISONS, "__gt__", "__ge__", "__lt__", "__le__")))
_DETACHING: Final = frozenset({torch.detach, torch.Tensor.detach, torch.Tensor.data.__get__})  # type: ignore[attr-defined]
_CHOOSING: Final = frozenset(_functions(("__getitem__", "masked_select", "index_select", "gather")))


@final
class Rectified(ReLUs):
    """While active, ReLUs let pass, on the way back, what a rule says; the values stay what they are.

    `"deconvnet"` lets pass what is positive of what comes back, wherever the ReLU itself was closed or open;
    `"guided"` lets the same pass where it was open. All else passes gradients as always: convolutions, the
    switches of a max pooling, batch normalisation, sums, concatenations. Which other functions bend the path
    is noted, since for them neither rule is defined: `check` refuses them. So is what works by a mask made by
    comparing values, as in `x * (x > 0)`.

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

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call `func`, or what stands in for it, and follow the masks that come out."""
        result = super().__torch_function__(func, types, args, kwargs)
        if not self._refusal:
            self._follow(func, [each for each in tree_leaves((args, kwargs)) if _is_tensor(each)], result)
        return result

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
        if operation is None and func in _ONE_OF_TWO:
            operands = [each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor)]
            if len(operands) == 2 and sum(_has_path(each) for each in operands) == 1:
                operation = f"the {_ONE_OF_TWO[func]} of a map and a constant{_IF_A_RELU}"
        if operation is not None and any(map(_has_path, tree_leaves((args, dict(kwargs))))):
            self._refusal = f"{self._place()} applies {operation}"

    def _follow(self, func: Callable[..., Any], given: list[torch.Tensor], result: Any) -> None:
        """Mark masks, and values without their gradient, of which masks may be made."""
        name = getattr(func, "__name__", "")
        if name.endswith("_like") or name.startswith("new_"):  # of a shape, and of no values
            return
        has_path = any(map(_has_path, given))
        has_mask = any(hasattr(each, _MASK) for each in given)
        if has_mask and has_path and func not in _CHOOSING:
            self._refusal = f"{self._place()} works by a mask made by comparing values{_IF_A_RELU}"
            return
        is_detached = any(hasattr(each, _DETACHED) for each in given) or (has_path and func in _DETACHING)
        is_mask = has_mask or ((is_detached or has_path) and func in _COMPARING)
        if is_mask or is_detached:
            for each in tree_leaves(result):
                if _is_tensor(each) and not each.requires_grad:
                    setattr(each, _MASK if is_mask else _DETACHED, True)

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


def _is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)


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
        if _HIDDEN.fullmatch(name) or (_CLAMP.fullmatch(name) and not _keeps_from_zero(node)):
            yield f"{re.sub(r'Backward[0-9]*$', '', name)} is hidden within an operation of the model"
        elif isinstance(node, torch.autograd.function.BackwardCFunction) and name != "_RectifiedBackward":
            yield f"the model has an operation of its own, {name.removesuffix('Backward')}"


def _keeps_from_zero(node: Any) -> bool:
    """Tell whether a clamp only keeps a divisor from zero, as where a norm is divided by."""
    least, most = (getattr(node, f"_saved_{name}", None) for name in ("min", "max"))
    return most is None and isinstance(least, int | float) and 0 < least < _SMALL


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
