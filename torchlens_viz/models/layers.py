"""Layer selection: a selector and a model in, ordered `(name, module)` pairs out."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Final, NamedTuple, TypeAlias, final

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from torchlens_viz.arguments import integer, shown
from torchlens_viz.errors import (
    CaptureError,
    InvalidArgumentError,
    InvalidTypeError,
    LayerNotFoundError,
    calling,
    kind_of,
    one_line,
)
from torchlens_viz.models.keeping import same_attributes

OneSelector: TypeAlias = (
    str | int | re.Pattern[str] | type[nn.Module] | nn.Module | Callable[[str, nn.Module], bool]
)
Selector: TypeAlias = OneSelector | Sequence[OneSelector]

# Modules that stand between a parent and the module a person wrote; they have no place in a name.
_WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module"})
_MOST_SELECTORS = 2**20
_PARTS: Final = frozenset(("_modules", "_parameters", "_buffers"))
_LISTING: Final = (  # what all that takes a model walks over
    "modules", "named_modules", "parameters", "named_parameters", "buffers", "named_buffers", "children",
    "named_children",
)  # fmt: skip
_GLOB = re.compile(r"[*?\[]")


class Layer(NamedTuple):
    """A module and one dotted name under which it is reached; the model itself has the name `""`."""

    name: str
    module: nn.Module


def require_module(model: object) -> None:
    """Refuse what is no model, or one that cannot tell its parts.

    Raises:
        InvalidArgumentError: It or a part of it was not initialised, or what it has in the place of a method
            that lists its modules, parameters or buffers fails.
        InvalidTypeError: It is no module.
    """
    _require_root(model)
    _listed(model, "named_modules")


def _require_root(model: object) -> None:
    """Do so without a look at its parts."""
    if not issubclass(type(model), nn.Module):  # not as the object says itself, which may say anything
        raise InvalidTypeError(f"`model` must be a torch.nn.Module, got {kind_of(model)}")
    for name in _LISTING:
        if name in vars(model) or getattr(type(model), name) is not getattr(nn.Module, name):
            _listed(model, name)
    if not isinstance(model, torch.jit.ScriptModule) and not vars(model).keys() >= _PARTS:
        raise InvalidArgumentError(
            f"`model` must be initialised, got {kind_of(model)} without {', '.join(sorted(_PARTS))}; call "
            "`super().__init__()` first in its `__init__`"
        )


def _listed(model: Any, method: str, **options: Any) -> list[Any]:
    """Return what a method lists of a model's parts.

    Raises:
        InvalidArgumentError: It fails.
    """
    try:
        return [*getattr(model, method)(**options)]
    except Exception as error:
        raise InvalidArgumentError(
            f"`model` must list its parts, but `{method}()` of {kind_of(model)} fails ({one_line(error)}); "
            "mend that, or call `super().__init__()` first in the `__init__` of each"
        ) from error


@final
class OnImages(nn.Module):
    """A model that takes images and nothing else, around one that takes more.

    `torchlens_viz.models.calls.called_with` makes it. As a wrapper it does not show in names of layers.

    Args:
        module: The model.
        arguments: Makes of an image batch what that is called with, by position and by name.
        told: What tells these arguments apart from others.
    """

    def __init__(
        self,
        module: nn.Module,
        arguments: Callable[[torch.Tensor], tuple[tuple[Any, ...], dict[str, Any]]],
        told: Sequence[object],
    ) -> None:
        super().__init__()
        self.module = module
        self.arguments = arguments
        self.told = told

    def forward(self, images: torch.Tensor) -> Any:
        """Call the model with an image batch, and with what else it takes."""
        args, kwargs = self.arguments(images)
        return self.module(*args, **kwargs)


def called_alike(model: nn.Module, copy: nn.Module) -> nn.Module:
    """Return a copy of an unwrapped model such that it is called as the model is."""
    return OnImages(copy, model.arguments, model.told) if isinstance(model, OnImages) else copy


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module a person wrote, without `torch.compile`, `DataParallel`, DDP or `OnImages` around it.

    Raises:
        CaptureError: It is TorchScript, which has no layers that anybody could look into.
    """
    _require_root(model)
    while True:
        if isinstance(model, torch.jit.ScriptModule):
            raise CaptureError(
                "the model is TorchScript (scripted, traced or frozen): hooks on its layers never fire; "
                "capture the nn.Module it was made from"
            )
        inner = model._modules.get("_orig_mod")
        if inner is None and isinstance(
            model, nn.DataParallel | nn.parallel.DistributedDataParallel | OnImages
        ):
            inner = model.module
        if inner is None:
            return model
        model = inner


def named_layers(model: nn.Module) -> list[Layer]:
    """List every module of `model` in definition order, a shared module once per name it is reached by."""
    found = {}
    listed = _listed(unwrap(model), "named_modules", remove_duplicate=False)
    for raw, module in listed:
        if not any(wrapper in module._modules for wrapper in _WRAPPERS):
            name = ".".join(part for part in raw.split(".") if part not in _WRAPPERS)
            found[name] = Layer(name, module)
    return list(found.values())


class _MetError(Exception):
    """Ends a run before its first operation, of which it holds the weights that meet the input."""


class _Unread:
    """Stands for what a network takes. It can be given to layers, and nothing can be read of it."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise _MetError


class _Before(TorchFunctionMode):
    """Lets no operation run."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise _MetError(*args[1:2] if args and isinstance(args[0], _Unread) else ())


def first_layer(model: nn.Module) -> nn.Module | None:
    """Return the layer that takes what a network is given, as it is and before anything else does.

    The code of the model runs as far as its first operation, which does not run. None is a network that
    looks at its input, or that does something else first, such as normalise it or choose channels; one that
    cannot be run so; and one with hooks of the caller's, who would hear of it.
    """
    modules = list(unwrap(model).modules())
    if any(module._forward_hooks or module._forward_pre_hooks for module in modules):
        return None
    with same_attributes(modules):
        try:
            with _Before():
                unwrap(model).forward(_Unread())
        except _MetError as met:
            own = [each for each in modules if not isinstance(each, torch.jit.ScriptModule)]
            given = [each for each in own if met.args and each._parameters.get("weight") is met.args[0]]
            return given[0] if given else None
        except Exception:  # the model's own, which was given what it does not know
            return None
    return None


def select(model: nn.Module, layers: Selector) -> list[Layer]:
    """Find the layers that a selector names.

    Args:
        model: The network. Wrappers (`torch.compile`, DDP, checkpointing) do not show in the names.
        layers: One of, or a list of: a dotted name; an int (the n-th module without children, in definition
            order, negative from the end); a glob (`"features.*"`; `*` also matches dots); a `re.Pattern`
            (searched for in the name); a module class (instances of subclasses count); a module instance;
            a predicate `(name, module) -> bool`.

    Returns:
        Pairs of name and module in definition order, each name once. A module that is shared is listed under
        every name that matches.

    Raises:
        LayerNotFoundError: A selector, or one in the list, matches nothing; the message names the nearest.
        InvalidArgumentError: The list is empty.
        InvalidTypeError: A selector is of another kind.

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
        >>> [layer.name for layer in select(net, nn.Conv2d)]
        ['0', '2']
        >>> [layer.name for layer in select(net, [-1, "1"])]
        ['1', '2']
    """
    known = named_layers(model)
    selectors = layers if isinstance(layers, Sequence) and not isinstance(layers, str) else [layers]
    if isinstance(layers, nn.Module):  # nn.Sequential and nn.ModuleList may look like sequences
        selectors = [layers]
    if not selectors:
        raise InvalidArgumentError("`layers` must name at least one layer, got an empty list")
    if len(selectors) > _MOST_SELECTORS:
        raise InvalidArgumentError(
            f"`layers` must be at most {_MOST_SELECTORS:,} selectors, got {shown(layers)}; use a glob"
        )
    by_name = {layer.name: layer for layer in known}
    wanted = {layer.name for selector in selectors for layer in _matches(by_name, known, selector)}
    return [layer for layer in known if layer.name in wanted]


def select_one(model: nn.Module, layer: Selector) -> Layer:
    """Find the one layer that a selector names; of several names of one module, the first.

    Raises:
        LayerNotFoundError: The selector matches nothing.
        InvalidArgumentError: It matches several layers.
    """
    found = select(model, layer)
    if len({id(module) for _, module in found}) > 1:
        names = ", ".join(f"`{name}`" for name, _ in found[:4]) + (", ..." if len(found) > 4 else "")
        raise InvalidArgumentError(f"`layer` must find one layer, got {len(found)}: {names}")
    return found[0]


def nearest(name: object, names: Sequence[str]) -> str:
    """Return a clause with the names most like `name`, or the first few where none is."""
    name = name if isinstance(name, str) else ""
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if not close and name:
        close = [other for other in names if other.endswith(name) or name.endswith(f".{other}")][:3]
    if close:
        return "did you mean " + " or ".join(f"`{other}`" for other in close) + "?"
    shown = ", ".join(f"`{other}`" for other in names[:6]) + (", ..." if len(names) > 6 else "")
    return f"there are {shown}" if shown else "there are none"


def _matches(by_name: Mapping[str, Layer], known: list[Layer], selector: OneSelector) -> list[Layer]:
    if isinstance(selector, str):
        if selector in by_name:
            return [by_name[selector]]
        found = []
        if _GLOB.search(selector):
            found = [layer for layer in known if layer.name and fnmatchcase(layer.name, selector)]
        return found or _fail(f"no layer is named `{selector}`; {nearest(selector, _names(known))}")
    if isinstance(selector, bool):
        raise InvalidTypeError("`layers` must not be a bool; give a name, a number or a class")
    if isinstance(selector, int):
        module = _numbered(known, selector)
        return [layer for layer in known if layer.module is module]
    if isinstance(selector, re.Pattern) and isinstance(selector.pattern, str):
        found = [layer for layer in known if layer.name and selector.search(layer.name)]
        return found or _fail(f"no layer name matches {selector.pattern!r}; {nearest('', _names(known))}")
    if isinstance(selector, nn.Module):
        inner = unwrap(selector)
        found = [layer for layer in known if layer.module is inner]
        return found or _fail(f"the model does not contain the given {type(selector).__name__} instance")
    if isinstance(selector, type) and issubclass(selector, nn.Module):
        found = [layer for layer in known if isinstance(layer.module, selector)]
        return found or _fail(f"the model has no {selector.__name__}; it has {_kinds(known)}")
    if callable(selector) and not isinstance(selector, type):
        with calling("layers(name, module)", "tell of every layer whether it is meant, True or False"):
            found = [layer for layer in known if selector(layer.name, layer.module)]
        return found or _fail(f"no layer satisfies the predicate; {nearest('', _names(known))}")
    raise InvalidTypeError(
        "`layers` must be a name, an int, a glob, a re.Pattern, a module class, a module, a predicate or a "
        f"list of those, got {shown(selector)}"
    )


def _names(known: list[Layer]) -> list[str]:
    return [layer.name for layer in known if layer.name]


def _numbered(known: list[Layer], number: int) -> nn.Module:
    leaves = list({id(layer.module): layer.module for layer in known if not layer.module._modules}.values())
    number = integer(number, "layers")
    if not -len(leaves) <= number < len(leaves):
        _fail(
            f"layer {shown(number)} is out of range: the model has {len(leaves)} modules without children, "
            f"0 to {len(leaves) - 1}, or -1 from the end"
        )
    return leaves[number]


def _kinds(known: list[Layer]) -> str:
    counts = Counter(type(layer.module).__name__ for layer in known if not layer.module._modules)
    return ", ".join(f"{count} {kind}" for kind, count in counts.most_common(5)) or "no layers at all"


def _fail(message: str) -> list[Layer]:
    raise LayerNotFoundError(message)
