"""Preprocessings that people bring: what is saved scores what is told, what is drawn is the picture."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision import transforms
from torchvision.transforms import v2

from torchlens_viz import maximize, overlay_grid, survey
from torchlens_viz.errors import InvalidArgumentError
from torchlens_viz.models.colours import colours_of
from torchlens_viz.models.preparing import is_alike

SIZE = 16
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# What is said where it cannot be right.
NO_LINE = "along a straight line"
AS_GIVEN = "colours are shown as the model gets them"


class Brought(NamedTuple):
    """A preprocessing.

    Attributes:
        function: Takes pictures, and perhaps tensors.
        climbs: Whether `maximize` can take it; else it refuses.
        shows: Whether the picture can be told from what the model gets; else a warning says so.
        levels: How many levels of 255 the picture may differ by.
    """

    function: object
    climbs: bool = True
    shows: bool = True
    levels: float = 1.01


def pixels_of(image, mode="RGB"):
    return torch.from_numpy(np.array(image.convert(mode))).movedim(2, 0)


def either(change):
    """Of pictures and of tensors in [0, 1]."""
    return lambda image: change(image if isinstance(image, torch.Tensor) else pixels_of(image)[None] / 255)


def bytes_either(image):
    """Divides by 255 whatever it is given, as many processors do."""
    return (image if isinstance(image, torch.Tensor) else pixels_of(image)[None]).float() / 255


def processor(name, **options):
    """A processor of transformers, which is given pictures and tensors alike."""

    def preprocess(image):
        made = getattr(pytest.importorskip("transformers"), name)(**options)
        return made(image, return_tensors="pt")["pixel_values"]

    return preprocess


def timm_transform(image):
    return pytest.importorskip("timm").data.create_transform((3, SIZE, SIZE), crop_pct=1.0)(image)


BROUGHT = {
    "torchvision v1": Brought(transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])),
    "torchvision v1, bytes": Brought(
        transforms.Compose([transforms.PILToTensor(), transforms.ConvertImageDtype(torch.float32)])
    ),
    "torchvision v2": Brought(
        v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
    ),
    "torchvision v2, means of bytes": Brought(
        v2.Compose(
            [v2.PILToTensor(), v2.ToDtype(torch.float32), v2.Normalize((123.0, 117, 104), (58.0, 57, 57))]
        )
    ),
    "torchvision v2, divided by hand": Brought(
        v2.Compose([v2.ToImage(), v2.Lambda(lambda x: x.float() / 255)])
    ),
    "torchvision v2, inverted": Brought(
        v2.Compose([v2.RandomInvert(1.0), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    ),
    "bytes or tensors by 255": Brought(bytes_either),
    "Caffe": Brought(
        lambda image: (pixels_of(image).float()[[2, 1, 0]] - torch.tensor([104.0, 117, 123])[:, None, None])[
            None
        ]
    ),
    "BGR of tensors": Brought(either(lambda x: x[:, [2, 1, 0]])),
    "turned in the first dimension": Brought(
        lambda image: (image if isinstance(image, torch.Tensor) else pixels_of(image) / 255).flip(0)
    ),
    "a scale each": Brought(either(lambda x: x * torch.tensor([2.0, 0.5, -3])[:, None, None])),
    "a mix": Brought(
        either(lambda x: torch.einsum("ck,nkhw->nchw", torch.tensor([[1.0, 1, 0], [0, 1, 1], [1, 0, 1]]), x))
    ),
    "gray, three times": Brought(
        either(lambda x: x.mean(1, keepdim=True).expand(-1, 3, -1, -1)), shows=False
    ),
    "YCbCr of pictures": Brought(lambda image: pixels_of(image, "YCbCr")[None] / 255, levels=2.5),
    "HSV of pictures": Brought(lambda image: pixels_of(image, "HSV")[None] / 255, climbs=False, shows=False),
    "gamma": Brought(either(lambda x: x.clamp(min=1e-6) ** 2.2), shows=False),
    "gamma of pictures": Brought(
        lambda image: (pixels_of(image)[None] / 255) ** 2.2, climbs=False, shows=False
    ),
    "contrast of each": Brought(
        either(lambda x: (x - x.mean((1, 2, 3), keepdim=True)) / x.std((1, 2, 3), keepdim=True)), shows=False
    ),
    "ViT": Brought(processor("ViTImageProcessor", size={"height": SIZE, "width": SIZE})),
    "CLIP": Brought(
        processor(
            "CLIPImageProcessor", size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}
        )
    ),
    "timm": Brought(timm_transform),
}


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.Conv2d(4, 3, 3))


def photograph(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(60, 190, (SIZE, SIZE, 3), dtype=np.uint8))


@pytest.mark.parametrize("name", BROUGHT)
def test_the_picture_that_is_saved_reaches_the_told_score_or_is_refused(net, name, tmp_path):
    function = BROUGHT[name].function

    def climb():
        return maximize(net, "1", size=SIZE, steps=24, preprocess=function, precision="float32")

    if not BROUGHT[name].climbs:
        with pytest.raises(InvalidArgumentError, match=NO_LINE):
            climb()
        return
    result = climb()
    result.save(tmp_path)
    for channel, told in enumerate(result.scores.tolist()):
        with Image.open(tmp_path / f"{channel}.png") as picture, torch.no_grad():
            made = function(picture)
            output = net(made if made.ndim == 4 else made[None])[0, channel].mean()
        spread = float(made.amax() - made.amin())
        assert abs(float(output) - told) < 0.002 * spread + 1e-3 * abs(told), name


@pytest.mark.parametrize("use", ["overlay", "survey"])
@pytest.mark.parametrize("name", BROUGHT)
def test_what_is_drawn_is_the_picture_itself_or_a_warning_says_that_it_is_not(net, name, use):
    function, _, shows, levels = BROUGHT[name]
    pictures = [photograph(0), photograph(1)]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if use == "overlay":
            plain = {"alpha": 0.0, "labels": False, "upscale": 1, "backdrop": "color", "channels": 0}
            drawn = overlay_grid(net, "0", pictures[0], preprocess=function, **plain)
            got, expected = np.asarray(drawn)[1:-1, 1:-1].astype(float), np.asarray(pictures[0]).astype(float)
        else:
            made = [function(picture) for picture in pictures]
            batch = torch.stack([each if each.ndim == 3 else each[0] for each in made])
            found = survey(net, [batch], "0", top_k=1, progress=False)
            patch = found.patches("0", 0, pictures, preprocess=function)[0]
            picture = pictures[int(found.top["0"].samples[0, 0])]
            got = patch.pixels.movedim(0, 2).numpy() * 255
            expected = np.asarray(picture)[patch.box].astype(float)
    is_right = bool(np.abs(got - expected).max() <= levels)
    assert is_right == shows
    if not shows and name != "gray, three times":  # of which gray is all that there is
        assert any(AS_GIVEN in str(each.message) for each in said)
    else:
        assert not [each for each in said if AS_GIVEN in str(each.message)]


def test_most_of_them_are_right():
    counts = Counter((brought.climbs, brought.shows) for brought in BROUGHT.values())
    assert counts == {(True, True): 16, (True, False): 3, (False, False): 2}


@pytest.mark.parametrize("name", BROUGHT)
def test_pictures_and_tensors_are_told_apart_by_what_becomes_of_them(name):
    """Against the colours of both, one by one."""
    function = BROUGHT[name].function
    try:
        function(torch.rand(1, 3, SIZE, SIZE))
    except Exception:
        pytest.skip("takes pictures only")
    picture = Image.new("RGB", (SIZE, SIZE), (200, 30, 90))
    tensor = torch.tensor([200.0, 30, 90]).view(1, 3, 1, 1).expand(1, 3, SIZE, SIZE) / 255
    of_both = [function(each).reshape(3, -1).double().mean(1) for each in (picture, tensor)]
    same = bool(torch.allclose(*of_both, rtol=1e-2, atol=1e-2, equal_nan=True))
    assert is_alike(function, torch.full((1, 3, SIZE, SIZE), 0.5)) == same


def test_bytes_that_were_rounded_are_still_a_line():
    """Each of three numbers is rounded, and where they are added that is more than one level."""
    found = colours_of(BROUGHT["YCbCr of pictures"].function)
    exact = torch.tensor([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])
    assert (found.matrix - exact).abs().max() < 1.5 / 255
    assert (found.offset - torch.tensor([0, 128 / 255, 128 / 255])).abs().max() < 1.5 / 255


def test_preprocessing_by_which_images_change_one_another_is_refused(net):
    def contrast(images):
        return (images - images.mean()) / images.std()

    with pytest.raises(InvalidArgumentError, match=r"images of a batch change one another.*`batch_size=1`"):
        maximize(net, "1", size=SIZE, steps=2, preprocess=contrast)
    found = maximize(net, "1", size=SIZE, steps=2, preprocess=contrast, batch_size=1, precision="float32")
    told = [net(contrast(image[None]))[0, i].mean().item() for i, image in enumerate(found.images)]
    assert found.scores.tolist() == pytest.approx(told, abs=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        transforms.Compose([transforms.Resize(SIZE + 4), transforms.CenterCrop(SIZE)]),
        transforms.RandomHorizontalFlip(1.0),
        transforms.RandomAutocontrast(1.0),
    ],
    ids=["resized and cropped", "flipped", "contrast"],
)
def test_what_preprocessing_of_pictures_does_beside_colours_is_told(net, change):
    prepare = transforms.Compose([change, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    with pytest.warns(UserWarning, match="does more to pictures of 16 x 16 than change their colours"):
        found = maximize(net, "1", size=SIZE, steps=2, preprocess=prepare, precision="float32")
    scale = [torch.tensor(each)[None, :, None, None] for each in (MEAN, STD)]
    with torch.no_grad():  # of the images as they are, as is said
        told = net((found.images - scale[0]) / scale[1]).mean((2, 3)).diagonal()
    torch.testing.assert_close(found.scores, told, rtol=1e-2, atol=1e-2)
