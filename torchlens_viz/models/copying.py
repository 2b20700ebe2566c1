"""A copy of a model for our own use: its modules, other tensors, and nobody else's hooks."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any, Final

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from torchlens_viz.errors import InvalidTypeError, reason_of
from torchlens_viz.models.keeping import same_random_numbers
from torchlens_viz.models.state import is_ours, refuse_lazy, set_eval
from torchlens_viz.models.watching import Parting

# Where a module keeps what runs with it, forward and backward.
_HOOKS: Final = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def private_copy(
    model: nn.Module, change: Callable[[torch.Tensor], torch.Tensor], *, warn: bool = True
) -> nn.Module:
    """Copy a model without touching it.

    Args:
        model: Any module.
        change: Makes the copy's tensor of each of the model's, which it is given detached. A parameter's
            becomes a parameter that requires no gradient.
        warn: Say where forward hooks are left out.

    Returns:
        The copy, in eval mode. Hooks that belong to the model, such as torch's own and methods of its
        modules, are copied too; those that somebody else registered are not, and never run.

    Raises:
        InvalidArgumentError: It has lazy parameters, without values yet.
        InvalidTypeError: The model holds something that cannot be copied.
    """
    memo: dict[int, object] = {}
    for tensor in _tensors_of(model):
        made = change(tensor)
        memo[id(tensor)] = (
            nn.Parameter(made, requires_grad=False) if isinstance(tensor, nn.Parameter) else made
        )
    own_hooks = _hooks_apart(model, memo, warn=warn)
    try:
        with same_random_numbers([*model.modules()]), _CopyingValues():
            twin: nn.Module = copy.deepcopy(model, memo)
            for kept, hooks in own_hooks:
                kept.update({key: copy.deepcopy(hook, memo) for key, hook in hooks.items()})
    except Exception as error:
        raise InvalidTypeError(
            f"`model` must be a module that can be copied, got {type(model).__name__}, of which "
            f"copy.deepcopy says: {reason_of(error)}; give the nn.Module alone"
        ) from error
    _require_same_tensors(model, twin, memo)
    _close_over_copies(model, memo)
    with Parting(twin).on():
        set_eval(twin)
    return twin


def _require_same_tensors(model: nn.Module, twin: nn.Module, memo: dict[int, object]) -> None:
    """Refuse a model that copies itself in a way of its own, to something else than what it is.

    Raises:
        InvalidTypeError: The copy has other tensors than were made for it, or shares a module.
    """

    def parts(module: nn.Module) -> dict[str, nn.Module | torch.Tensor]:
        own = {f"module {name}": part for name, part in module.named_modules(remove_duplicate=False)}
        return {
            **own,
            **dict(module.named_parameters(remove_duplicate=False)),
            **dict(module.named_buffers(remove_duplicate=False)),
        }

    ours, theirs = parts(model), parts(twin)
    scripted = tuple(  # which torch copies in a way of its own
        f"{name}."
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, torch.jit.ScriptModule)
    )
    for name, part in ours.items():
        if f"{name.removeprefix('module ')}.".startswith(scripted):
            continue
        other = theirs.get(name)
        is_same = other is memo[id(part)] if isinstance(part, torch.Tensor) else _is_alike(part, other)
        if not is_same or other is part:
            raise InvalidTypeError(
                f"`model` must be a module that can be copied, got {type(model).__name__}, of which "
                f"copy.deepcopy makes something else (`{name}` differs); let `__deepcopy__` copy all that "
                "the model holds, or leave it out"
            )


def _is_alike(module: nn.Module, other: object) -> bool:
    """Tell whether a module runs the code of another; each of torch.fx has a class of its own."""
    if isinstance(module, torch.fx.GraphModule):
        return isinstance(other, torch.fx.GraphModule) and other.code == module.code
    return type(other) is type(module)


def _close_over_copies(model: nn.Module, memo: dict[int, object]) -> None:
    """Let functions that a copy holds, and that close over modules of the model, close over their copies.

    `copy.deepcopy` hands functions on as they are: `self.f = lambda x: self.norm(x)` would run the model.
    """
    modules = {id(module) for module in model.modules()}
    for module in model.modules():
        twin = memo.get(id(module))
        for name, held in vars(module).items():
            cells = held.__closure__ if isinstance(held, FunctionType) else None
            if not cells or not any(id(_content(cell)) in modules for cell in cells):
                continue
            found = [_content(cell) for cell in cells]
            closure = tuple(
                CellType(memo[id(inner)]) if id(inner) in modules else cell
                for cell, inner in zip(cells, found, strict=True)
            )
            made = FunctionType(held.__code__, held.__globals__, held.__name__, held.__defaults__, closure)
            made.__kwdefaults__ = held.__kwdefaults__
            vars(twin)[name] = made


def _content(cell: CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # it has none yet
        return None


class _CopyingValues(TorchFunctionMode):
    """Within it, deepcopy takes tensors of a graph too, such as a module may keep from its last pass."""

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
    refuse_lazy(tensors)
    return tensors


def _hooks_apart(
    model: nn.Module, memo: dict[int, object], *, warn: bool
) -> list[tuple[dict[int, object], dict[int, object]]]:
    """Let every module be copied without its hooks.

    Returns:
        For each module and kind of hook, where hooks are kept in its copy, and those that belong there.
    """
    modules, found, left_out = set(model.modules()), [], False
    for module in modules:
        for name in _HOOKS:
            hooks = vars(module).get(name)
            if not hooks:
                continue
            kept: dict[int, object] = OrderedDict()
            memo[id(hooks)] = kept
            all_belong = name == "_forward_pre_hooks" and computes_weights(module)
            own = {key: hook for key, hook in hooks.items() if all_belong or _belongs(hook, modules)}
            found.append((kept, own))
            left_out |= "forward" in name and any(
                key not in own and not is_ours(hook) for key, hook in hooks.items()
            )
        memo[id(module._forward_hooks_always_called)] = OrderedDict()
    if left_out and warn:
        warnings.warn(
            "the model has forward hooks that are not its own: they do not run on the copy that gradients "
            "are taken with; if they change what a layer puts out, put that into a module",
            stacklevel=4,
        )
    return found


def computes_weights(module: nn.Module) -> bool:
    """Tell whether hooks make a module's weight before it runs, as pruning and old-style norms do."""
    return "weight" not in module._parameters and isinstance(vars(module).get("weight"), torch.Tensor)


def _belongs(hook: object, modules: set[nn.Module]) -> bool:
    """Tell whether a hook is part of a model: of torch's making, or a method of one of its modules."""
    while isinstance(hook, partial):
        if any(isinstance(given, nn.Module) and given in modules for given in hook.args):
            return True
        hook = hook.func
    if isinstance(hook, MethodType) and isinstance(hook.__self__, nn.Module):
        return hook.__self__ in modules
    origin = getattr(hook, "__module__", None) or type(hook).__module__
    return isinstance(origin, str) and origin.partition(".")[0] in ("torch", "torchao", "torchvision")
