"""An image is the same to all that take one, and stays the caller's."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from torchlens_viz import ablate, explain, layers, overlay_grid, pair_grid, project, report, survey
from torchlens_viz.errors import InvalidArgumentError, InvalidTypeError

BYTES = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
CHW = torch.from_numpy(BYTES).movedim(2, 0)
UNIT = CHW / 255


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    ).eval()


def explained(net, image, path, **options):
    return explain(net, image, 0, **options).heatmaps.numpy().tobytes()


def projected(net, image, path, **options):
    return project(net, "0", image, [0], **options).images.numpy().tobytes()


def overlaid(net, image, path, **options):
    return overlay_grid(net, "0", image, **options).tobytes()


def paired(net, image, path, **options):
    return pair_grid(net, "0", image, **options).tobytes()


def reported(net, image, path, **options):
    return report(net, [image], path / "page.html", **options).read_bytes()


USES = [explained, projected, overlaid, paired, reported]


def normalised(images):
    """Of tensors from 0 to 1 alone, as `torchvision.transforms.Normalize`."""
    if not images.is_floating_point():
        raise TypeError("Input tensor should be a float tensor")
    return (images - 0.5) / 0.25


def of_either(image):
    """Of pictures and of tensors from 0 to 1."""
    tensor = (
        image if isinstance(image, torch.Tensor) else torch.from_numpy(np.array(image)).movedim(2, 0) / 255
    )
    return (tensor - 0.5) / 0.25


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("preprocess", [None, normalised, of_either])
def test_bytes_are_the_picture_that_they_are(net, use, preprocess, tmp_path):
    options = {} if preprocess is None else {"preprocess": preprocess}
    assert use(net, CHW, tmp_path, **options) == use(net, Image.fromarray(BYTES), tmp_path, **options)


@pytest.mark.parametrize("use", USES[:-1])
def test_preprocessing_for_bytes_gets_bytes(net, use, tmp_path):
    expected = use(net, UNIT, tmp_path)
    assert use(net, CHW, tmp_path, preprocess=lambda images: images.float() / 255) == expected


@pytest.mark.parametrize("use", USES)
def test_bytes_of_which_nothing_says_how_they_are_taken_are_told(net, use, tmp_path):
    def tensors_alone(images):
        assert isinstance(images, torch.Tensor)
        return (images - 0.5) / 0.25

    with pytest.warns(UserWarning, match="makes another thing of bytes than of the same from 0 to 1"):
        use(net, CHW, tmp_path, preprocess=tensors_alone)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(
    ("image", "alike"),
    [
        (torch.from_numpy(BYTES.astype(np.uint16) * 257).movedim(2, 0), UNIT),
        (CHW > 127, (CHW > 127).float()),
        (UNIT.double(), UNIT),
    ],
    ids=["uint16", "bool", "double"],
)
def test_other_types_are_the_same_everywhere(net, use, image, alike, tmp_path):
    assert use(net, image, tmp_path) == use(net, alike, tmp_path)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_integers_without_a_white_are_refused_everywhere(net, use, dtype, tmp_path):
    with pytest.raises(InvalidTypeError, match=r"nothing says what white is; pass `image.float\(\)`"):
        use(net, CHW.to(dtype), tmp_path)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("preprocess", [None, lambda image: image])
def test_arrays_and_paths_are_refused_with_the_way_to_give_them(net, use, preprocess, tmp_path):
    options = {} if preprocess is None else {"preprocess": preprocess}
    with pytest.raises(
        InvalidTypeError, match=r"`images?` must be .*got ndarray; pass `PIL.Image.fromarray\(array\)`"
    ):
        use(net, BYTES, tmp_path, **options)
    if use is not reported:  # which reads the file
        with pytest.raises(InvalidTypeError, match="got str; open it first"):
            use(net, "cat.jpg", tmp_path, **options)


@pytest.mark.parametrize("use", USES)
def test_floats_that_seem_to_be_bytes_are_told(net, use, tmp_path):
    with pytest.warns(UserWarning, match="floats from 0 to 255, which are taken as they are"):
        use(net, CHW.float(), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        use(net, UNIT * 4 - 2, tmp_path)  # as a loader normalised it


def in_place(images):
    return images.sub_(0.5)


def shrinking(picture):
    picture.thumbnail((8, 8))
    return torch.from_numpy(np.array(picture)).movedim(2, 0) / 255


@pytest.mark.parametrize("use", USES)
def test_what_is_given_stays_as_it_was_where_functions_write_to_it(net, use, tmp_path):
    image = UNIT.clone()
    use(net, image, tmp_path, preprocess=in_place)
    assert image.equal(UNIT)
    picture = Image.fromarray(BYTES)
    use(net, picture, tmp_path, preprocess=shrinking)
    assert np.array_equal(np.array(picture), BYTES)
    if use is not paired:  # which shows no image
        use(net, image, tmp_path, invert=in_place)
        assert image.equal(UNIT)


def test_patches_leave_their_source_as_it_was(net):
    images = torch.rand(4, 3, 12, 16)
    kept = images.clone()
    found = survey(net, [images - 0.5], "0", top_k=1, progress=False)
    patches = found.patches("0", 0, images, preprocess=in_place)
    assert images.equal(kept)
    sample = int(found.top["0"].samples[0, 0])
    torch.testing.assert_close(patches[0].values, (kept[sample] - 0.5)[:, *patches[0].box])


class Writing(nn.Module):
    """Normalises its input in place."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, images):
        with torch.no_grad():
            images.sub_(0.5)
        return self.net(images)


@pytest.mark.parametrize(
    "use", ["overlay", "pair", "explain", "project", "report", "survey", "layers", "ablate"]
)
def test_networks_that_write_to_their_input_see_it_once_and_leave_it_as_it_was(net, use, tmp_path):
    image, writing = UNIT[None].clone(), Writing(net)
    plain = {"alpha": 0.0, "backdrop": "color", "upscale": 1, "labels": False, "channels": 0, "padding": 0}
    if use == "overlay":
        plain.pop("padding")
        drawn = np.asarray(overlay_grid(writing, "net.0", image, **plain))
        assert np.array_equal(drawn[1:-1, 1:-1], BYTES)
    elif use == "survey":
        found = survey(writing, [image, image], "net.0", progress=False)
        torch.testing.assert_close(
            found.stats["net.0"].max.float(), net[0](UNIT[None] - 0.5).amax((0, 2, 3)), rtol=1e-5, atol=1e-5
        )
    elif use == "report":
        report(writing, image[0], tmp_path / "page.html")
    elif use == "layers":
        layers(writing, image)
    elif use == "ablate":
        ablate(writing, [image], "net.0", [0], loss=lambda output, batch: output[:, 0])
    elif use == "pair":
        pair_grid(writing, "net.0", image)
    elif use == "project":
        project(writing, "net.0", image, [0])
    else:
        explain(writing, image, 0)
    assert image.equal(UNIT[None])


def test_a_loss_is_of_the_batch_that_the_loader_yielded(net):
    images = torch.rand(4, 3, 12, 16)
    seen = []

    def loss(output, batch):
        seen.append(batch.clone())
        return F.mse_loss(output, torch.zeros_like(output), reduction="none").mean(1)

    survey(Writing(net), [images], "net.0", loss=loss, progress=False)
    assert all(each.equal(images) for each in seen)


def test_preprocessing_that_fails_for_bytes_and_floats_says_why(net):
    def never(images):
        raise ValueError("not today")

    with pytest.raises(InvalidArgumentError, match="not today"):
        pair_grid(net, "0", CHW, preprocess=never)
