"""A model that is ready to look at pictures, and what makes its input of one where nothing else is known."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from torchlens_viz.errors import ModelLoadError, TorchlensVizError, one_line
from torchlens_viz.files.pictures import as_rgb
from torchlens_viz.models.calls import Arguments, ModelInputs, called_with
from torchlens_viz.models.images import require_usual_shape
from torchlens_viz.models.kernels import image_channels
from torchlens_viz.models.layers import OnImages

Preprocess: TypeAlias = Callable[[Image.Image], Tensor]

USUAL_NOTE: Final = "shorter side to 256, centre crop to 224, ImageNet mean and deviation"
_MOST_SIDES: Final = 16  # how many times as long as it is wide a picture is enlarged as a whole
_MEAN: Final = (0.485, 0.456, 0.406)
_STD: Final = (0.229, 0.224, 0.225)


def off_meta() -> AbstractContextManager[object]:
    """Make tensors with values within the block, though a model is built without any around it.

    What a module makes as it is imported, and what preprocessing is made of, outlives that model.
    """
    # `torch.get_default_device` fails in torch 2.8 once the default was taken back.
    return torch.device("cpu") if torch.empty(0).is_meta else nullcontext()


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model that is ready to look at one picture.

    Attributes:
        model: The network in eval mode.
        preprocess: From a PIL image to the network's input: (1, C, H, W), or (1, C, T, H, W) of one that
            takes clips.
        name: What was asked for.
        weights_note: Which weights and which preprocessing these are, in one line.
        names: What the outputs of a classifier stand for, in their order; empty where that is not known.
        inputs: What the network takes beside that, or how it takes it, as in `models.calls.called_with`.
    """

    model: nn.Module
    preprocess: Preprocess
    name: str
    weights_note: str
    names: tuple[str, ...] = ()
    inputs: ModelInputs = None

    @property
    def on_images(self) -> nn.Module:
        """The network as it is called with what `preprocess` made."""
        return called_with(self.model, self.inputs)

    def arguments(self, batch: Tensor) -> Arguments:
        """Return what the network is called with for what `preprocess` made, by position and by name."""
        called = self.on_images
        return called.arguments(batch) if isinstance(called, OnImages) else ((batch,), {})


def usual_preprocess(model: nn.Module) -> tuple[Preprocess, str]:
    """Return what prepares a picture as nearly every ImageNet classifier expects it, and what that is."""
    if image_channels(model) == 1:
        return _gray, f"{USUAL_NOTE}, in gray"
    return usual, USUAL_NOTE


def is_usual(preprocess: Preprocess) -> bool:
    """Tell whether it is one of those that stand in where nothing is known, which make images of pictures."""
    return preprocess in (usual, _gray)


def usual(image: Image.Image) -> Tensor:
    """Prepare a picture as nearly every ImageNet classifier expects it, without torchvision."""
    pixels = torch.from_numpy(np.array(_cropped(image, "RGB"))).permute(2, 0, 1) / 255
    mean, std = (pixels.new_tensor(each).view(3, 1, 1) for each in (_MEAN, _STD))
    normalized = (pixels - mean) / std
    return normalized.unsqueeze(0)


def _gray(image: Image.Image) -> Tensor:
    """Prepare a picture the same way for a network that takes one channel."""
    pixels = torch.from_numpy(np.array(_cropped(image, "L")))[None, None] / 255
    return (pixels - sum(_MEAN) / 3) / (sum(_STD) / 3)


def _cropped(image: Image.Image, mode: str) -> Image.Image:
    # The centre crop is a box of the original, so that a long, thin picture is not enlarged as a whole.
    half = min(image.size) * 224 / 256 / 2
    x, y = image.width / 2, image.height / 2
    # All that the resampling looks at, and no more, so that of a large picture there are no further copies.
    reach = math.ceil(half + 2 * half / 224) + 2
    left, top = max(0, int(x) - reach), max(0, int(y) - reach)
    seen = image.crop(
        (left, top, min(image.width, int(x) + reach + 1), min(image.height, int(y) + reach + 1))
    )
    box = (x - half - left, y - half - top, x + half - left, y + half - top)
    picture = as_rgb(seen)
    picture = picture if picture.mode == mode else picture.convert(mode)
    return picture.resize((224, 224), Image.Resampling.BILINEAR, box=box)


def not_too_long(image: Image.Image) -> Image.Image:
    """Cut the ends off a picture that is very long: only its middle is used, and all would be enlarged."""
    width, height = image.size
    longest = _MOST_SIDES * min(width, height)
    left, top = max(0, width - longest) // 2, max(0, height - longest) // 2
    return image.crop((left, top, width - left, height - top)) if left or top else image


def multiple_of(image: Image.Image, step: int, least: int) -> Image.Image:
    """Resize a picture so that both sides are multiples of `step`, and at least `least`."""
    factor = max(1.0, least / min(image.size))
    sides = [max(step, math.floor(side * factor / step + 0.5) * step) for side in image.size]
    return as_rgb(image).resize((sides[0], sides[1]), Image.Resampling.BILINEAR)


@dataclass(frozen=True)
class OwnPreprocess:
    """A function of the user's that prepares pictures, with its errors told apart from ours.

    Attributes:
        name: What to call it.
        function: Makes of a PIL image a tensor (1, C, H, W) or (C, H, W), or a clip (1, C, T, H, W).
    """

    name: str
    function: Callable[[Image.Image], object]

    def __call__(self, image: Image.Image) -> Tensor:
        """Prepare a picture.

        Raises:
            ModelLoadError: The function fails, or makes something else.
        """
        try:
            require_usual_shape(image, "image")
            prepared = self.function(image)
        except TorchlensVizError:
            raise
        except (Exception, SystemExit) as error:
            raise ModelLoadError(
                f"`{self.name}` raised {one_line(error)}; it must take a PIL.Image and return a tensor "
                "(1, C, H, W)"
            ) from error
        if not isinstance(prepared, Tensor) or prepared.ndim not in (3, 4, 5):
            shape = f" (shape {tuple(prepared.shape)})" if isinstance(prepared, Tensor) else ""
            raise ModelLoadError(
                f"`{self.name}` must return a tensor (1, C, H, W) or (C, H, W), got "
                f"{type(prepared).__name__}{shape}"
            )
        return prepared.unsqueeze(0) if prepared.ndim == 3 else prepared


def names_of(given: Sequence[object] | None) -> tuple[str, ...]:
    """Return names of classes as a tuple of text; empty where there are none."""
    return tuple(str(name) for name in given or ())
