"""The kernels of a layer, whatever kind of convolution it is, as one tensor; and which one images enter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain, pairwise
from typing import Any, Final, NamedTuple, NoReturn

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.overrides import TorchFunctionMode

from torchlens_viz.arguments import real_numbers
from torchlens_viz.errors import InvalidArgumentError, InvalidTypeError, LayerNotFoundError
from torchlens_viz.models.copying import computes_weights, private_copy
from torchlens_viz.models.keeping import same_random_numbers
from torchlens_viz.models.layers import (
    Layer,
    Selector,
    called_alike,
    first_layer,
    named_layers,
    select_one,
    unwrap,
)
from torchlens_viz.models.state import inference

_RGB: Final = 3
_AXES: Final = 2
_FEW: Final = range(1, 5)  # as many channels as images have
_SIDES: Final = (64, 224, 32, 28)  # of images that are tried
_PARTING: Final = ("chunk", "narrow", "split", "split_with_sizes", "tensor_split")


class Kernels(NamedTuple):
    """Kernels (O, I, kH, kW), detached, and the name of their layer, `""` where there is no model.

    Those of a 3-D convolution are (O, I, kD, kH, kW).
    """

    weight: torch.Tensor
    name: str


def kernels_of(model_or_weight: nn.Module | torch.Tensor, layer: Selector | None = None) -> Kernels:
    """Take the kernels from a model or from a weight tensor.

    Args:
        model_or_weight: A model, or kernels (O, I, kH, kW), (O, I, k) of a 1-D or (O, I, kD, kH, kW) of a 3-D
            convolution.
        layer: Which layer of the model, by a selector that finds exactly one; None is the first convolution
            to run.

    Returns:
        One filter per output channel: transposed convolutions, stored the other way round, too. Kernels of
        1-D convolutions are one pixel high. Quantised kernels are given as the numbers they stand for.

    Raises:
        LayerNotFoundError: There is no such layer, or no convolution.
        InvalidArgumentError: The layer has no kernels, `layer` finds several, or the kernels have no pixels.
        InvalidTypeError: The first argument is neither a model nor a tensor, or the kernels are no dense real
            numbers.
    """
    if isinstance(model_or_weight, torch.Tensor):
        if layer is not None:
            raise InvalidArgumentError("`layer` has no effect on a weight tensor; leave it out")
        return Kernels(_as_planes(_numbers(model_or_weight, "the weight"), "the weight"), "")
    if not isinstance(model_or_weight, nn.Module):
        raise InvalidTypeError(f"expected a model or a weight tensor, got {type(model_or_weight).__name__}")
    name, module = entry_of(model_or_weight).layer if layer is None else select_one(model_or_weight, layer)
    weight = _stored_weight(module)
    if weight is None:
        raise InvalidArgumentError(f"`{name}` ({type(module).__name__}) has no kernels; choose a convolution")
    what = f"`{name}`" if name else "the weight"
    weight = _numbers(weight, what)
    if getattr(module, "transposed", False):
        # Stored as (in, out / groups, ...), the group being part of the input channel.
        grouped = weight.unflatten(0, (module.groups, -1)).transpose(1, 2)  # type: ignore[no-untyped-call]
        weight = grouped.flatten(0, 1)
    return Kernels(_as_planes(weight, what), name)


def has_kernels(module: nn.Module) -> bool:
    """Tell whether a module is a convolution of any kind."""
    kinds = (kind.__name__ for kind in type(module).__mro__)
    return any("Conv" in kind for kind in kinds) and _stored_weight(module) is not None


def convolutions(model: nn.Module) -> list[Layer]:
    """List the convolutions of a model, of every kind, in definition order.

    Raises:
        LayerNotFoundError: There is none.
    """
    found = [layer for layer in named_layers(model) if has_kernels(layer.module)]
    if found:
        return found
    raise LayerNotFoundError(
        f"the model ({type(model).__name__}) has no convolution; pass the weight of a layer as (O, I, kH, kW)"
    )


class Entry(NamedTuple):
    """Where images enter a network.

    Attributes:
        layer: The first convolution to run.
        channels: How many channels the images have.
        axes: How many spatial axes they have: 1 of signals (N, C, L), 2 of images, 3 of volumes.
    """

    layer: Layer
    channels: int
    axes: int


def entry_of(model: nn.Module) -> Entry:
    """Return where images enter a network.

    That is the convolution to which the model hands them. It need not be the first to be defined, as where a
    decoder comes before its encoder; nor need it take images as they are: pixels may be unshuffled first,
    coordinates or a second image put beside them, or signals and volumes made of them. Where anything comes
    before it, a copy of the model runs on the meta device, where nothing is computed, as far as there, or to
    its end where channels of the images are chosen by their place. Where no trial succeeds, the first
    convolution in the order of definition says it.

    Raises:
        LayerNotFoundError: It has no convolution.
    """
    found = convolutions(model)
    defined = Entry(found[0], _inputs_of(found[0].module), _axes_of(found[0].module))
    if found[0].module is unwrap(model):
        return defined
    if (first := {id(layer.module): layer for layer in found}.get(id(first_layer(model)))) is not None:
        return Entry(first, _inputs_of(first.module), _axes_of(first.module))
    sizes = [_inputs_of(layer.module) for layer in found]
    is_likely = defined.channels in _FEW and _RGB not in sizes
    tries = [(number, _AXES) for number in (*sizes[:is_likely], _RGB, 1, *sizes, 2, 4, *range(5, 9))]
    if defined.axes != _AXES:
        tries = [*((number, defined.axes) for number in (defined.channels, *sizes)), *tries]
    with same_random_numbers():
        return next(_tried(model, found, tries), defined)


def image_channels(model: nn.Module) -> int:
    """Return how many channels the images of a network have.

    Of one without a convolution its first dense layer says it, as where patches are unfolded; else it is 3.
    """
    return image_form(model)[0]


def image_axes(model: nn.Module, image: object = None) -> int:
    """Return how many spatial axes the images of a network have, 1 to 3; 2 where it has no convolution.

    Args:
        model: The network.
        image: What it is to be given, if that is there: a tensor of five dimensions has three axes, whatever
            the network does first.
    """
    return image_form(model, image)[1]


def image_form(model: nn.Module, image: object = None) -> tuple[int, int]:
    """Return `image_channels` and `image_axes`, which are found together."""
    try:
        _, channels, axes = entry_of(model)
    except LayerNotFoundError:
        dense = [layer for layer in named_layers(model) if isinstance(layer.module, nn.Linear)]
        usual = Entry(Layer("", model), _RGB, _AXES)
        with same_random_numbers():
            tries = [(each, _AXES) for each in (_RGB, 1, 4, 2)]
            _, channels, axes = next(_tried(model, dense, tries), usual)
    return channels, 3 if isinstance(image, torch.Tensor) and image.ndim == 5 else axes


def _inputs_of(module: nn.Module) -> int:
    return int(getattr(module, "in_channels", _RGB))


def _axes_of(module: nn.Module) -> int:
    sizes = getattr(module, "kernel_size", None)
    if isinstance(sizes, tuple):
        return len(sizes)
    weight = _stored_weight(module)
    return _AXES if weight is None or isinstance(weight, UninitializedParameter) else weight.ndim - 2


def _tried(model: nn.Module, found: list[Layer], tries: list[tuple[int, int]]) -> Iterator[Entry]:
    """Yield what layer takes images of so many channels and axes first, for those of which one does."""
    try:
        twin = private_copy(unwrap(model), lambda tensor: tensor.detach().to("meta"), warn=False)
        called = called_alike(model, twin)
        names = {id(twin.get_submodule(layer.name)): layer for layer in found}
    except Exception:  # it may not be made to be copied
        return
    trial = _Trial()
    watched = [module for module in twin.modules() if id(module) in names]
    for module in watched:
        module.forward = _noting(module, names[id(module)], trial)
    try:
        known: set[tuple[int, int]] = set()
        for number, axes in chain(tries, trial.solved()):
            for side in () if (number, axes) in known else _SIDES:
                layer = trial.entered(called, (1, number, *[side] * axes))
                # Convolutions over more axes take a batch of signals for a single image.
                if layer is not None and (axes == _AXES or _axes_of(layer.module) == axes):
                    yield Entry(layer, number, axes)
                    break
            known.add((number, axes))
    finally:
        for module in watched:  # which else would live on until the garbage collector comes by
            vars(module).pop("forward", None)


class _FoundError(Exception):
    """Ends a run where it is known which layer took what it was given."""


class _Trial(TorchFunctionMode):
    """A run on an image without values: which layer takes something first, and how many channels that has."""

    def __init__(self) -> None:
        super().__init__()
        self._shape: tuple[int, ...] = ()
        self._entered: Layer | None = None
        self.chooses = False  # whether channels of the image were chosen by their place
        self._seen: dict[int, tuple[int, int]] = {}  # what the first convolution got of how many, and takes

    def entered(self, called: nn.Module, shape: tuple[int, ...]) -> Layer | None:
        """Run a model on an image, and return the layer that took it, if one did."""
        self._shape, self._entered, self.chooses = shape, None, False
        try:
            with torch.no_grad(), self:
                called(torch.zeros(shape, device="meta"))
        except _FoundError:
            return self._entered
        except Exception:  # the first layer did not take it, or something else did not
            return None if self.chooses else self._entered
        return self._entered

    def enter(self, layer: Layer) -> None:
        """Note that a layer takes what it is given."""
        self._entered = self._entered or layer
        if not self.chooses:
            raise _FoundError

    def refuse(self, given: int, taken: int) -> NoReturn:
        """Note that the first layer is given another number of channels than it takes."""
        if self._entered is None and len(self._shape) == _AXES + 2:
            self._seen.setdefault(self._shape[1], (given, taken))
        raise InvalidArgumentError("the images have another number of channels")

    def solved(self) -> Iterator[tuple[int, int]]:
        """Yield with how many channels of the image the first layer would get as many as it takes."""
        numbers = sorted(self._seen)
        for one, other in pairwise(numbers):
            (low, taken), (high, _) = self._seen[one], self._seen[other]
            number = one + (taken - low) * (other - one) / (high - low) if high != low else 0
            if number >= 1 and number == int(number):
                yield int(number), _AXES

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("__getitem__", *_PARTING) and args and tuple(args[0].shape) == self._shape:
            index = args[1] if name == "__getitem__" and isinstance(args[1], tuple) else ()
            is_told = len(index) > 1 and (index[0] is not Ellipsis or len(index) == len(self._shape))
            place = index[1] if is_told else None
            if isinstance(place, slice) and place != slice(None):
                self.chooses = True
                if max(place.start or 0, (place.stop or 1) - 1) >= self._shape[1]:
                    raise InvalidArgumentError("the images have no such channel")
            self.chooses |= name in _PARTING
        return func(*args, **(kwargs or {}))


def _noting(module: nn.Module, layer: Layer, trial: _Trial) -> Callable[..., Any]:
    forward = module.forward
    # What torch's own takes can be told without running it, which on the meta device costs a second once.
    home = getattr(getattr(type(module), "forward", None), "__module__", "")
    is_dense = type(module) is nn.Linear
    is_known = is_dense or (home == nn.modules.conv.__name__ and _axes_of(module) == _AXES)

    def noting(*args: Any, **kwargs: Any) -> Any:
        if not is_known or len(args) != 1 or kwargs:
            made = forward(*args, **kwargs)
            trial.enter(layer)
            return made
        shape = args[0].shape
        taken = module.in_features if isinstance(module, nn.Linear) else _inputs_of(module)
        given = shape[-1] if is_dense else shape[-3] if len(shape) in (3, 4) else 0
        if given != taken:
            trial.refuse(int(given), int(taken))
        trial.enter(layer)
        return forward(*args)

    return noting


def _stored_weight(module: nn.Module) -> torch.Tensor | None:
    is_plain = "weight" in module._parameters and not hasattr(type(module), "weight")
    # Nothing computes it anew, or a lazy one is still to be made.
    if is_plain and (not module._forward_pre_hooks or isinstance(module.weight, UninitializedParameter)):
        return _if_kernels(module.weight)
    with inference(module):  # a spectral norm in training mode changes with every look at the weight
        weight = getattr(module, "weight", None)
        if callable(weight) and not isinstance(weight, torch.Tensor):
            weight = weight()  # quantised layers
        if module._forward_pre_hooks and computes_weights(module):
            weight = _of_now(module)
    return _if_kernels(weight)


def _of_now(module: nn.Module) -> object:
    """Return the weight that hooks compute before each forward pass: the attribute is of the last one."""
    twin = private_copy(module, _values_of, warn=False)
    for hook in twin._forward_pre_hooks.values():
        hook(twin, ())
    return getattr(twin, "weight", None)


def _values_of(tensor: torch.Tensor) -> torch.Tensor:
    values = tensor.detach()
    return values if isinstance(tensor, nn.Parameter) else values.clone()


def _if_kernels(weight: object) -> torch.Tensor | None:
    if isinstance(weight, UninitializedParameter):
        return weight
    return weight if isinstance(weight, torch.Tensor) and weight.ndim >= 3 else None


def _numbers(weight: torch.Tensor, what: str) -> torch.Tensor:
    if isinstance(weight, UninitializedParameter):
        raise InvalidArgumentError(f"{what} has no values yet; run the model once on an input first")
    return real_numbers(weight, what)


def _as_planes(weight: torch.Tensor, what: str) -> torch.Tensor:
    if weight.ndim == 3:
        weight = weight[:, :, None]
    if weight.ndim not in (4, 5) or weight.numel() == 0:
        raise InvalidArgumentError(
            f"{what} must be (O, I, kH, kW) with at least one pixel, got shape {tuple(weight.shape)}"
        )
    return weight
