"""`explain`: where in an image the evidence for an output of a network lies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeAlias, get_args

import torch
from PIL import Image
from torch import nn

from torchlens_viz.arguments import function, indices_of, integer, number, one_of, shown
from torchlens_viz.attribution.explanation import Explanation
from torchlens_viz.attribution.goal import Goal, Target
from torchlens_viz.attribution.layers import maps_to_explain
from torchlens_viz.attribution.trust import measure
from torchlens_viz.attribution.twin import Twin
from torchlens_viz.attribution.way import AT_PIXELS, Method, Way
from torchlens_viz.errors import InvalidArgumentError, InvalidTypeError, calling
from torchlens_viz.hooks.forward import is_compiled
from torchlens_viz.models.calls import ModelInputs, called_with
from torchlens_viz.models.colours import (
    Bands,
    as_pixels,
    as_signal,
    bands_note,
    inverted,
    known_colours,
)
from torchlens_viz.models.images import AXES, as_shown, in_floats, model_input, prepared
from torchlens_viz.models.kernels import image_axes, image_channels
from torchlens_viz.models.layers import Selector, select

Picture: TypeAlias = torch.Tensor | Image.Image

_SAMPLES: Final = {"smoothgrad": 25, "integrated_gradients": 50}
_NOISE: Final = 0.15


def explain(
    model: nn.Module,
    image: Picture,
    target: Target = None,
    *,
    method: Method = "layercam",
    layer: Selector | None = None,
    preprocess: Callable[[Any], torch.Tensor] | None = None,
    inputs: ModelInputs = None,
    invert: Callable[[torch.Tensor], torch.Tensor] | None = None,
    channel_dim: int | None = None,
    grid: tuple[int, int] | None = None,
    samples: int | None = None,
    noise: float | None = None,
    seed: int | None = None,
    bands: Bands = None,
) -> Explanation:
    """Find where in an image the evidence for an output of a network lies.

    The network runs on a private copy that shares its weights, in eval mode and true float32, and the
    backward pass ends at the layer. The caller's model, its gradients, flags, hooks and the random numbers
    stay as they are; forward hooks that are not its own do not run. A compiled model runs eagerly. It works
    within `torch.no_grad` and `torch.inference_mode`, and with frozen parameters.

    Args:
        model: A model that takes an image batch, or more, see `inputs`.
        image: A picture; a tensor (C, H, W), or a batch (N, C, H, W), each image of which is explained by
            itself. Of a network whose first convolution is 1-D, signals (C, L) or (N, C, L); of a 3-D one,
            volumes or clips (C, D, H, W) or (N, C, D, H, W).
        target: Which output to explain: None is each image's highest; an index for all images, or one for
            each. Or a function of what the model puts out that makes of it a floating-point tensor (N,), a
            number per image: the score of a box, the mean of a mask, an entry of a dict.
        method: Of the maps of layers: `"gradcam"`, `"gradcam++"`, `"hirescam"`, `"layercam"`; `"eigencam"`,
            which does not look at the target; `"ablationcam"`, which needs no gradient and runs what is above
            the layer once for each of its channels. At the pixels: `"gradient"` and `"smoothgrad"`, the
            largest size among the colours; `"integrated_gradients"`, their sum, from an image of zeros; and
            `"guided"`, for networks whose only activations are ReLUs.
        layer: Which layers, by any selector; the maps of several become one: each is divided by its largest
            value, and the maximum is taken. None is the last layer that puts out maps of more than one
            position and runs once; for `"layercam"`, the last of each resolution. Layers inside a block do
            not count where the block itself has that resolution. The result's `.layers` says which were
            chosen.
        preprocess: Makes of `image` what the model takes; where it does not take pictures, of the picture as
            a tensor in [0, 1]. Without it, pixels are in [0, 1]: a picture is RGB, or gray where the model
            takes one channel, and a tensor is taken as it is, but for uint8.
        inputs: What the model takes beside images, as in `torchlens_viz.maximize`;
            of a batch, tensors in it may have a row for each image.
        invert: Makes of the model's input, (1, C, H, W), the pixels in [0, 1] to show; None undoes what
            `preprocess` did to the colours, as in `torchlens_viz.overlay_grid`.
        channel_dim: The dimension that counts channels in what the layers put out; None finds it, as in
            `torchlens_viz.capture`.
        grid: Rows and columns in which the last rows * columns of a transformer's tokens (N, L, C) lie in the
            image.
        samples: For `"smoothgrad"` the noisy copies, 25 where it is None; for `"integrated_gradients"` the
            points on the way from zeros, 50.
        noise: For `"smoothgrad"`, the standard deviation of the noise as a share of the range of an image's
            values, 0.15 where it is None.
        seed: For `"smoothgrad"`, what the noise follows from, 0 where it is None.
        bands: The channels of the image to show as red, green and blue, or the one to show in gray. None is
            all of 1 or 3, and of other numbers their mean, which `.notes` say. Of a signal, those to draw as
            curves, any number; None is all.

    Returns:
        N heatmaps (N, H, W), (N, L) or (N, D, H, W) float32 in the pixels of what the model takes, with the
        scores they explain. Each
        value stands where the receptive field of its position has its middle; between positions they are
        interpolated.

    Raises:
        LayerNotFoundError: The model has no such layer.
        InvalidArgumentError: The output is no number per image, the target is out of range, no gradient
            leads to the layer, a layer puts out no maps or runs several times, an option does not fit the
            method, or the model cannot take the image.
        InvalidTypeError: An argument has another type, or the model cannot be copied.
        CaptureError: The layer does not run, or the model is TorchScript.
        CaptureMemoryError: There is not enough memory.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5))
        >>> _ = net(torch.zeros(1, 3, 16, 24))
        >>> found = explain(net, torch.rand(2, 3, 16, 24), target=3, method="hirescam")
        >>> found.layers, found.heatmaps.shape, found.targets
        (('1',), torch.Size([2, 16, 24]), tensor([3, 3]))

    Source:
        The paper of each method stands with its formula, in `torchlens_viz.attribution.cam` and `.pixels`.
    """
    if not isinstance(model, nn.Module):
        raise InvalidTypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}")
    one_of(method, "method", get_args(Method))
    function(preprocess, "preprocess")
    function(invert, "invert")
    grid = None if grid is None else _rows_and_columns(grid)
    settings = _settings(method, layer, channel_dim, grid, samples, noise, seed)
    names = None if layer is None else _names(model, layer)
    taken = image_channels(model) if isinstance(image, Image.Image) else None
    image = as_shown(image, taken, image_axes(model, image))
    batch = _batch(image, preprocess, model, taken)
    model = called_with(model, inputs, len(batch))
    channels = inverted(batch[:1], invert).shape[1]
    said = bands_note(channels, bands) if batch.ndim > 3 else _curves_note(channels, bands)
    goal = Goal(target, len(batch))
    types = {each.dtype for each in model.parameters() if each.is_floating_point()}
    for keeps_types in (False, True):
        twin = Twin(model, channel_dim=channel_dim, grid=grid, keeps_types=keeps_types)
        way = Way(method=method, layers=None if names is None else [*names], **settings)
        try:
            with twin.running():
                batch = batch.detach().to(twin.device, torch.float32)
                scores, heatmaps = way.explained(twin, batch, goal)
            break
        except InvalidArgumentError:
            if keeps_types or len(types) < 2:
                raise  # a model of several types may convert by itself what its parts take
    if any(is_compiled(module) for module in model.modules()) or "_orig_mod" in model._modules:
        way.notes.append("the model ran eagerly, not as it was compiled")

    silent = [str(place) for place, heatmap in enumerate(heatmaps) if not bool((heatmap != 0).any())]
    if silent:
        way.notes.append(f"nothing here speaks for the target in image {', '.join(silent)}")

    def lowest() -> str | None:
        if way.layers:
            return way.layers[-1]
        try:
            return maps_to_explain(twin, batch, of_each_resolution=False)[0]
        except InvalidArgumentError:
            return None

    def measured() -> Any:
        with twin.running():
            layer_below = lowest()
        return measure(
            twin,
            batch,
            goal,
            heatmaps,
            scores,
            explain_again=lambda other: way.explained(other, batch, goal)[1],
            layer=layer_below,
        )

    return Explanation(
        method=method,
        layers=tuple(way.layers or ()),
        heatmaps=heatmaps,
        targets=goal.classes,
        scores=scores,
        notes=(*said, *way.notes),
        _pixels=lambda: _shown(batch, image, preprocess, invert, bands),
        _measure=measured,
    )


def _settings(
    method: str,
    layer: Selector | None,
    channel_dim: int | None,
    grid: tuple[int, int] | None,
    samples: int | None,
    noise: float | None,
    seed: int | None,
) -> dict[str, Any]:
    """Check the options, and refuse those that have no effect."""
    at_layers = (("layer", layer), ("channel_dim", channel_dim), ("grid", grid))
    given = [name for name, value in at_layers if value is not None and method in AT_PIXELS]
    given += ["samples"] if samples is not None and method not in _SAMPLES else []
    given += [
        name
        for name, value in (("noise", noise), ("seed", seed))
        if value is not None and method != "smoothgrad"
    ]
    if given:
        raise InvalidArgumentError(
            f'`{given[0]}` has no effect with `method="{method}"`; leave one of them out'
        )
    return {
        "samples": integer(_SAMPLES.get(method, 1) if samples is None else samples, "samples", least=1),
        "noise": number(_NOISE if noise is None else noise, "noise", above=0),
        "seed": integer(0 if seed is None else seed, "seed", least=0),
    }


def _rows_and_columns(grid: Any) -> tuple[int, int]:
    try:
        rows, columns = grid
    except Exception:
        raise InvalidTypeError(f"`grid` must be (rows, columns), got {shown(grid)}") from None
    return integer(rows, "grid", least=1), integer(columns, "grid", least=1)


def _names(model: nn.Module, layer: Selector) -> list[str]:
    """Return one name for each module that a selector finds."""
    names: dict[int, str] = {}
    for name, module in select(model, layer):
        names.setdefault(id(module), name)
    return list(names.values())


def _curves_note(channels: int, bands: Bands) -> list[str]:
    """Return a line that says which channels of a signal are drawn, where that is not all."""
    chosen = indices_of(bands, channels, "bands")
    return [] if bands is None else [f"curves: channels {', '.join(map(str, chosen))} of {channels}"]


def _batch(
    image: Picture, preprocess: Callable[[Any], torch.Tensor] | None, model: nn.Module, taken: int | None
) -> torch.Tensor:
    """Return what the model takes, (N, C, ...)."""
    axes = image_axes(model, image)
    shape = AXES[axes]
    if not isinstance(image, torch.Tensor) or image.ndim != axes + 2 or len(image) < 2:
        return model_input(image, preprocess, taken, axes)
    if image.numel() == 0:
        raise InvalidArgumentError(
            f"`image` must be a picture, ({shape}) or a batch (N, {shape}), got shape {tuple(image.shape)}"
        )
    if preprocess is None:
        return in_floats(image)
    with calling("preprocess(image)", f"make a batch (N, {shape}) of a batch"):
        made = prepared(image, preprocess, axes)
    is_batch = isinstance(made, torch.Tensor) and made.ndim == axes + 2 and len(made) == len(image)
    if not is_batch or made.numel() == 0:
        what = tuple(made.shape) if isinstance(made, torch.Tensor) else type(made).__name__
        raise InvalidArgumentError(
            f"`preprocess` must make a batch (N, {shape}) of a batch {tuple(image.shape)}, got {what}; give "
            "the images one by one"
        )
    return made


def _shown(
    batch: torch.Tensor,
    image: Picture,
    preprocess: Callable[[Any], torch.Tensor] | None,
    invert: Callable[[torch.Tensor], torch.Tensor] | None,
    bands: Bands,
) -> torch.Tensor:
    """Return the images as a person sees them, (N, 3, ...) in [0, 1], or the curves of signals, (N, K, L)."""
    axes = batch.ndim - 2
    if axes == 1:
        return torch.stack([as_signal(row[None], invert, bands)[0] for row in batch])
    given: list[Picture] = [image] * len(batch)
    if isinstance(image, torch.Tensor) and image.ndim == batch.ndim:
        given = [image[place : place + 1] for place in range(len(batch))]
    colours = known_colours(preprocess, given[0], axes) if preprocess is not None and invert is None else None
    return torch.stack(
        [
            as_pixels(row[None], each, preprocess=preprocess, invert=invert, colours=colours, bands=bands)
            for row, each in zip(batch, given, strict=True)
        ]
    )
