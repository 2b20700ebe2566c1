"""What to maximise: terms, each a number per image.

    channel()                               the channel that is being maximised, the mean of its map
    channel(3) - 0.1 * total_variation()    terms add, subtract, multiply and take weights
    neuron(position=(4, 7)), direction(vector), deepdream(), diversity(), l2()
    score(lambda scene: scene.activation().amax((1, 2, 3)))     a function of your own

Every term scores each image by itself, so that the gradient of the sum separates into one per image. The one
exception is `diversity`, which compares the images of the same channel with one another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal, TypeAlias

import torch

from torchlens_viz.arguments import check_dense, integer, listed, number, one_of, shown
from torchlens_viz.backprop.objective import Objective, Scene
from torchlens_viz.errors import InvalidArgumentError, InvalidTypeError, TorchlensVizError

__all__ = [
    "Objective",
    "Scene",
    "channel",
    "deepdream",
    "direction",
    "diversity",
    "l2",
    "neuron",
    "score",
    "total_variation",
]

_GREATEST: Final = 1e18  # whose square float32 holds
_MOST_AXES: Final = 8

ObjectiveName: TypeAlias = Literal["mean", "max", "center"]


def channel(
    index: int | None = None, *, layer: str | None = None, reduce: Literal["mean", "max"] = "mean"
) -> Objective:
    """Score the map of a channel.

    Args:
        index: The channel; None is the one that is being maximised.
        layer: The layer; None is the one that was asked for.
        reduce: Make one number of the map by its mean or its maximum.

    Example:
        >>> channel(3) - 0.1 * total_variation()
        channel(3) - 0.1 * total_variation()
    """
    one_of(reduce, "reduce", ("mean", "max"))
    index = None if index is None else integer(index, "index")

    def function(scene: Scene) -> torch.Tensor:
        values = _of_channel(scene, index, layer)
        values = values.reshape(len(values), -1).float()  # a dense layer has one value, and no map
        return values.mean(1) if reduce == "mean" else values.amax(1)

    options = {"layer": layer, "reduce": None if reduce == "mean" else reduce}
    return _term("channel", index, options, function, is_linear=reduce == "mean")


def neuron(
    index: int | None = None, *, position: Sequence[int] | None = None, layer: str | None = None
) -> Objective:
    """Score one position of the map of a channel.

    Args:
        index: The channel; None is the one that is being maximised.
        position: Row and column in the map, or as many numbers as the map has axes; None is the middle.
        layer: The layer; None is the one that was asked for.
    """
    index, place = None if index is None else integer(index, "index"), _place(position)

    def function(scene: Scene) -> torch.Tensor:
        values = _of_channel(scene, index, layer)
        at: tuple[Any, ...] = (slice(None), *_position(values.shape[1:], place))
        return values[at].float()

    return _term("neuron", index, {"position": place, "layer": layer}, function, is_linear=True)


def direction(
    vector: torch.Tensor | Sequence[float],
    *,
    position: Sequence[int] | None = None,
    layer: str | None = None,
) -> Objective:
    """Score a direction in the space of a layer's channels: the dot product with `vector`.

    Args:
        vector: (C,), one weight per channel of the layer.
        position: One position of the maps; None takes the mean over all of them.
        layer: The layer; None is the one that was asked for.
    """
    try:
        given = vector if isinstance(vector, torch.Tensor) else listed(vector, "vector")
        weights = torch.as_tensor(given, dtype=torch.float32, device="cpu").detach()
        check_dense(weights, "`vector`")
    except TorchlensVizError:
        raise
    except Exception as error:
        raise InvalidTypeError(f"`vector` must be numbers, one per channel, got {shown(vector)}") from error
    if weights.ndim != 1 or not len(weights) or not bool(weights.isfinite().all()):
        raise InvalidArgumentError(
            f"`vector` must be finite numbers, one per channel, got shape {tuple(weights.shape)}"
        )
    place = _place(position)

    def function(scene: Scene) -> torch.Tensor:
        values = scene.activation(layer)
        if values.shape[1] != len(weights):
            raise InvalidArgumentError(
                f"`vector` must have a weight for each of the layer's {values.shape[1]} channels, "
                f"got {len(weights)}"
            )
        if place is not None:
            at: tuple[Any, ...] = (slice(None), slice(None), *_position(values.shape[2:], place))
            values = values[at]
        means = values.float().flatten(2).mean(2) if values.ndim > 2 else values.float()
        return means @ weights.to(values.device)

    text = f"[{', '.join(f'{weight:g}' for weight in weights.tolist())}]"
    return _term(
        "direction", text, {"position": place, "layer": layer}, function, is_linear=True, chosen=True
    )


def deepdream(layer: str | None = None) -> Objective:
    """Score a whole layer, the mean square of all its values (Mordvintsev, Olah & Tyka, 2015)."""
    return _term(
        "deepdream",
        None,
        {"layer": layer},
        lambda scene: scene.activation(layer).float().square().flatten(1).mean(1),
        chosen=True,
    )


def diversity(layer: str | None = None) -> Objective:
    """Score how unlike the others of its channel an image is: minus the mean cosine of Gram matrices.

    It needs a channel that is asked for several times, as in `channels=[3, 3, 3, 3]`.
    """

    def function(scene: Scene) -> torch.Tensor:
        maps = scene.activation(layer).float().flatten(2)
        gram = torch.nn.functional.normalize((maps @ maps.transpose(1, 2)).flatten(1), dim=1)
        others = (scene.channels[:, None] == scene.channels).float()
        others.fill_diagonal_(0.0)
        return -((gram @ gram.T) * others).sum(1) / others.sum(1).clamp_min(1.0)

    return _term("diversity", None, {"layer": layer}, function, couples=True, chosen=True)


def total_variation() -> Objective:
    """Score how rough an image is: the mean difference between neighbours. Give it a negative weight."""

    def function(scene: Scene) -> torch.Tensor:
        axes = range(2, scene.images.ndim)
        along = [scene.images.diff(dim=axis).abs().flatten(1).sum(1) for axis in axes]
        return torch.stack(along).sum(0) / scene.images[0].numel()

    return Objective(function=function, text="total_variation()")


def l2(middle: float = 0.5) -> Objective:
    """Score how far pixels are from `middle`: their mean square distance. Give it a negative weight."""
    middle = number(middle, "middle", least=-_GREATEST, most=_GREATEST)
    return Objective(
        function=lambda scene: (scene.images - middle).square().flatten(1).mean(1),
        text="l2()" if middle == 0.5 else f"l2({middle:g})",
    )


def score(function: Callable[[Scene], torch.Tensor], *, layers: Sequence[str] = ()) -> Objective:
    """Make an objective of a function of your own.

    Args:
        function: Takes a `Scene` and gives a number per image, (N,), each of which depends on its own image.
        layers: The layers it looks at besides the one that was asked for.
    """
    if not callable(function):
        raise InvalidTypeError(f"`function` must be callable, got {shown(function)}")
    for layer in listed(layers, "layers"):
        _require_name(layer)
    name = getattr(function, "__qualname__", type(function).__name__)
    return Objective(
        function=function, text=f"score({name})", layers=frozenset((None, *layers)), uses_target=True
    )


_BY_NAME: Final[Mapping[str, Callable[[], Objective]]] = {
    "mean": channel,
    "max": lambda: channel(reduce="max"),
    "center": neuron,
}


def objective_of(chosen: ObjectiveName | Objective | Callable[[Scene], torch.Tensor]) -> Objective:
    """Return the objective of that name, the one that was given, or one made of a function."""
    if isinstance(chosen, Objective):
        return chosen
    if isinstance(chosen, str) and chosen in _BY_NAME:
        return _BY_NAME[chosen]()
    if callable(chosen):
        return score(chosen)
    names = ", ".join(map(repr, _BY_NAME))
    raise InvalidArgumentError(
        f"`objective` must be one of {names}, an Objective or a function, got {shown(chosen)}"
    )


def _term(
    name: str,
    index: int | str | None,
    options: Mapping[str, object],
    function: Callable[[Scene], torch.Tensor],
    *,
    is_linear: bool = False,
    couples: bool = False,
    chosen: bool = False,
) -> Objective:
    layer = options["layer"]
    if layer is not None:
        _require_name(layer)
    given = [] if index is None else [str(index)]
    given += [f"{key}={value!r}" for key, value in options.items() if value is not None]
    return Objective(
        function=function,
        text=f"{name}({', '.join(given)})",
        layers=frozenset([None if layer is None else str(layer)]),
        is_linear=is_linear and layer is None,
        uses_target=index is None and not chosen,
        couples=couples,
    )


def _require_name(layer: object) -> None:
    if not isinstance(layer, str):
        raise InvalidTypeError(f"`layer` must be a name, got {shown(layer)}")


def _place(position: Sequence[int] | None) -> tuple[int, ...] | None:
    if position is None:
        return None
    return tuple(integer(part, "position") for part in listed(position, "position", most=_MOST_AXES))


def _of_channel(scene: Scene, index: int | None, layer: str | None) -> torch.Tensor:
    values = scene.activation(layer)
    if index is None:
        return values[torch.arange(len(values), device=values.device), scene.channels]
    if not 0 <= index < values.shape[1]:
        raise InvalidArgumentError(
            f"`channel` must be an index from 0 to {values.shape[1] - 1} of the layer, got {shown(index)}"
        )
    return values[:, index]


def _position(shape: Sequence[int], place: tuple[int, ...] | None) -> tuple[int, ...]:
    if place is None:
        return tuple(size // 2 for size in shape)
    if len(place) != len(shape) or not all(0 <= part < size for part, size in zip(place, shape, strict=True)):
        raise InvalidArgumentError(f"`position` must lie in maps of {tuple(shape)}, got {shown(place)}")
    return place
