"""A small trained network that ships with the package: every picture can be tried without a download."""

from __future__ import annotations

import importlib.resources
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, nn

from torchlens_viz.errors import InvalidArgumentError, needed

if TYPE_CHECKING:
    from PIL import Image

DEMO_PHOTOGRAPHS: Final[tuple[str, ...]] = (
    "astronaut",
    "brick",
    "camera",
    "chelsea",
    "coffee",
    "coins",
    "grass",
    "gravel",
    "hubble_deep_field",
    "immunohistochemistry",
    "retina",
    "rocket",
)
"""The photographs the network was trained on, as `skimage.data` names its functions."""

DEMO_CLASSES: Final[tuple[str, ...]] = tuple(
    f"{photograph.replace('_', ' ')}, {turn}"
    for photograph in DEMO_PHOTOGRAPHS
    for turn in ("upright", "turned 90°", "turned 180°", "turned 270°")
)
"""What each output stands for: a photograph and its quarter turns, counterclockwise; 4 per photograph."""

DEMO_MEAN: Final[tuple[float, float, float]] = (0.5, 0.5, 0.5)
"""What `normalize` subtracts from the red, green and blue of pixels in [0, 1]."""

DEMO_STD: Final[tuple[float, float, float]] = (0.25, 0.25, 0.25)
"""What `normalize` divides by afterwards."""

_WEIGHTS = "models/demo_net.safetensors"
# Modes whose values Pillow maps to 8-bit RGB; it clips the wider ones (I, I;16, F) to 255 without a word.
_EIGHT_BIT_MODES = frozenset(("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"))


class DemoNet(nn.Module):
    """Tell which photograph a patch was cut from, and which way up it is.

    The layers are those of AlexNet, fewer and narrower, under the same names as far as they go:
    `features.0`, `features.3` and `features.6` are the convolutions, `features.1`, `features.4` and
    `features.7` their ReLUs.
    A global maximum in place of AlexNet's dense layers lets it take any image of at least 31 x 31 pixels.

    A new instance has random weights; `load_demo_net` returns the trained one.

    Source:
        After Krizhevsky, Sutskever & Hinton, "ImageNet Classification with Deep Convolutional Neural
        Networks", NeurIPS 2012.

    Examples:
        >>> DemoNet()(torch.zeros(1, 3, 64, 64)).shape
        torch.Size([1, 48])
    """

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, kernel_size=11, stride=4, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(kernel_size=3, stride=2),
            nn.Conv2d(64, 96, kernel_size=5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(kernel_size=3, stride=2),
            nn.Conv2d(96, 128, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.AdaptiveMaxPool2d(1),
        )
        self.classifier = nn.Linear(128, len(DEMO_CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        """Score every class.

        Args:
            images: `(N, 3, H, W)`, as `preprocess` or `normalize` returns them, with H and W at least 31.

        Returns:
            Logits `(N, 48)` in the order of `DEMO_CLASSES`, unbounded.
        """
        logits: Tensor = self.classifier(self.features(images).flatten(1))
        return logits


def load_demo_net() -> DemoNet:
    """Load the trained demo network from the files of the package.

    Returns:
        The network on the CPU, in float32 (stored as float16) and in eval mode. The random number generators
        and the default device and dtype stay as they are.

    Raises:
        MissingDependencyError: safetensors is not installed.

    Examples:
        >>> model = load_demo_net()
        >>> model.features[0].weight.shape
        torch.Size([64, 3, 11, 11])
    """
    what = "the weights of the demo network are read with safetensors"
    load = needed("safetensors.torch", what, "demo").load
    stored = importlib.resources.files("torchlens_viz").joinpath(_WEIGHTS).read_bytes()
    # A model loaded inside the caller's inference_mode must still be usable outside it. On the meta device no
    # weights are drawn, so no random numbers are used up.
    with torch.inference_mode(False):
        with torch.device("meta"):
            network = DemoNet()
        state = {name: tensor.to(torch.float32) for name, tensor in load(stored).items()}
        network.load_state_dict(state, assign=True)
    return network.eval()


def normalize(images: Tensor) -> Tensor:
    """Bring RGB pixels to the range the demo network was trained on.

    Differentiable, so that it can stand between an image that is being optimised and the network.

    Args:
        images: Floating point pixels in [0, 1], `(N, 3, H, W)` or `(3, H, W)`.

    Returns:
        The same shape, dtype and device, in [-2, 2].

    Raises:
        InvalidArgumentError: `images` has another number of channels or is not floating point.

    Examples:
        >>> normalize(torch.full((3, 1, 1), 0.75)).flatten()
        tensor([1., 1., 1.])
    """
    if images.ndim < 3 or images.shape[-3] != 3 or not images.is_floating_point():
        raise InvalidArgumentError(
            f"`images` must be floating point (N, 3, H, W) or (3, H, W), got {images.dtype} "
            f"(shape {tuple(images.shape)}); repeat a gray image three times and divide bytes by 255"
        )
    return (images - images.new_tensor(DEMO_MEAN).view(3, 1, 1)) / images.new_tensor(DEMO_STD).view(3, 1, 1)


def preprocess(image: Image.Image) -> Tensor:
    """Turn a picture into an input of the demo network, at its own size.

    Args:
        image: A picture with 8 bits a channel; gray is repeated to three channels, transparency is dropped.

    Returns:
        `(1, 3, H, W)` float32 on the CPU, in [-2, 2].

    Raises:
        InvalidArgumentError: The picture has more than 8 bits a channel.

    Examples:
        >>> from PIL import Image
        >>> preprocess(Image.new("RGB", (5, 4), "white")).shape
        torch.Size([1, 3, 4, 5])
    """
    if image.mode not in _EIGHT_BIT_MODES:
        raise InvalidArgumentError(
            f"`image` must have 8 bits a channel, got mode {image.mode!r} (size {image.size}); "
            "scale it to 0..255 and convert it to 'L' or 'RGB' first"
        )
    rgb = image.convert("RGB")
    # The device is named because the caller may have set another default.
    pixels = torch.tensor(bytearray(rgb.tobytes()), dtype=torch.uint8, device="cpu")
    channels_first = pixels.view(rgb.height, rgb.width, 3).permute(2, 0, 1).contiguous()
    return normalize(channels_first.to(torch.float32).div(255)).unsqueeze(0)
