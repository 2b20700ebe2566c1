"""`explain`: of which layers, where values stand, what stays as it was, and what is refused."""

from __future__ import annotations

import doctest
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tests.attribution.conftest import METHODS, Wrapped, classifier
from tests.nets import Catches, Repeats, assert_as_before, snapshot
from torchlens_viz import explain
from torchlens_viz.errors import (
    CaptureError,
    InvalidArgumentError,
    InvalidTypeError,
    LayerNotFoundError,
)

# What stays as it was


@pytest.mark.parametrize("method", METHODS)
def test_the_model_is_left_as_it_was(net, images, method):
    net.train()
    net[4].eval()
    net[0].weight.requires_grad_(False)
    net[9].weight.grad = torch.ones_like(net[9].weight)
    before, random, original = snapshot(net), torch.get_rng_state(), images.clone()
    found = explain(net, images, 1, method=method)
    assert found.trust is not None
    assert torch.equal(net[9].weight.grad, torch.ones_like(net[9].weight))
    net[9].weight.grad = None
    assert_as_before(net, before)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(images, original)
    assert not images.requires_grad
    assert not found.heatmaps.requires_grad
    assert not any(module._backward_hooks for module in net.modules())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("method", METHODS)
def test_modes_without_gradients_change_nothing(net, images, method, mode):
    expected = explain(net, images, 1, method=method)
    net.requires_grad_(False)
    with mode():
        found = explain(net, images * 1, 1, method=method)
        trust = found.trust
        assert torch.is_grad_enabled() is False
    assert torch.equal(found.heatmaps, expected.heatmaps)
    assert torch.equal(found.scores, expected.scores)
    torch.testing.assert_close(trust.kept, expected.trust.kept, equal_nan=True)


def test_autocast_and_default_types_change_nothing(net, images):
    expected = explain(net, images, 1)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.autocast("cpu"):
            found = explain(net, images, 1)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found.heatmaps, expected.heatmaps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_models_of_other_types_are_explained_in_float32(images, dtype):
    net = classifier().to(dtype)
    found = explain(net, images, 1)
    assert found.heatmaps.dtype == torch.float32
    torch.testing.assert_close(found.heatmaps, explain(net.float(), images, 1).heatmaps)


def test_a_compiled_model_runs_eagerly_and_says_so(net, images):
    expected = explain(net, images, 1)
    assert expected.notes == ("the maximum of these layers, each divided by its own largest value",)
    found = explain(torch.compile(net), images, 1)
    assert torch.equal(found.heatmaps, expected.heatmaps)
    assert found.notes[-1] == "the model ran eagerly, not as it was compiled"


def test_a_model_that_converts_by_itself_keeps_its_types(images):
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3).bfloat16()
            self.head = nn.Linear(4, 2)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.head(self.conv(images.bfloat16()).relu().float().mean((2, 3)))

    net = Mixed()
    found = explain(net, images, 1)
    torch.testing.assert_close(found.scores, net(images)[:, 1].detach())
    assert found.heatmaps.any()


@pytest.mark.slow
def test_within_a_validation_step_of_lightning(images):
    lightning = pytest.importorskip("pytorch_lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = classifier()
            self.found = None

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.net(images)

        def training_step(self, batch, index):
            return self(batch).sum()

        def validation_step(self, batch, index):
            self.found = explain(self, batch, 1, layer="net.5").heatmaps

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.0)

    module = Module()
    loader = torch.utils.data.DataLoader(images, batch_size=2)
    trainer = lightning.Trainer(
        max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu",
        enable_model_summary=False, barebones=False,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about workers and versions
        trainer.fit(module, loader, loader)
    assert torch.equal(module.found, explain(module.net, images, 1, layer="5").heatmaps)


def test_each_image_of_a_batch_is_explained_by_itself(net, images):
    both = explain(net, images, [1, 4])
    for place, target in enumerate((1, 4)):
        alone = explain(net, images[place], target)
        torch.testing.assert_close(alone.heatmaps[0], both.heatmaps[place])
        torch.testing.assert_close(alone.scores[0], both.scores[place])


# Of which layers


def test_the_last_layer_with_maps_is_taken_and_for_layercam_one_of_each_resolution(net, images):
    for method in ("gradcam", "gradcam++", "hirescam", "eigencam", "ablationcam"):
        assert explain(net, images, method=method).layers == ("5",)
    assert explain(net, images).layers == ("2", "5")
    assert explain(net, images, method="gradient").layers == ()


class Staged(nn.Module):
    """Stages of blocks, with a branch of another resolution inside the second."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 2, 1)
        self.stages = nn.Sequential()
        for place, stride in enumerate((1, 2)):
            block = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, stride, 1))
            self.stages.add_module(f"stage{place}", block)
        self.head = nn.Linear(4, 3)
        self.unused = nn.Conv2d(1, 1, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.stages(self.stem(images)).mean((2, 3)))


def test_layers_inside_a_block_do_not_stand_for_a_resolution(images):
    found = explain(Staged(), images)
    assert found.layers == ("stem", "stages")


def test_weights_that_are_computed_are_no_maps(images):
    net = classifier()
    nn.utils.parametrizations.weight_norm(net[0])
    nn.utils.parametrizations.spectral_norm(net[4])
    assert explain(net, images, 1).layers == ("2", "5")


def test_any_selector_chooses_layers(net, images):
    assert explain(net, images, layer=nn.Conv2d).layers == ("0", "4")
    assert explain(net, images, layer=net[5]).layers == ("5",)
    assert explain(net, images, layer=["4", "2"]).layers == ("2", "4")


def test_maps_of_several_layers_are_their_maximum(net, images):
    one, other = (explain(net, images, 1, layer=name).heatmaps for name in ("2", "5"))
    shares = [each / each.amax((1, 2), keepdim=True) for each in (one, other)]
    torch.testing.assert_close(
        explain(net, images, 1, layer=["2", "5"]).heatmaps, torch.stack(shares).amax(0)
    )


@pytest.mark.parametrize(
    ("model", "layer", "kind", "message"),
    [
        (classifier, "nothing", LayerNotFoundError, "no layer is named `nothing`"),
        (classifier, "9", InvalidArgumentError, r"what `9` puts out must be maps .* shape \(2, 5\)"),
        (Staged, "unused", CaptureError, "`unused` did not run on this image"),
        (
            lambda: Wrapped(nn.ReLU(), lambda maps: maps.mean((2, 3))),
            "",
            InvalidArgumentError,
            "one row|shape",
        ),
    ],
)
def test_layers_that_cannot_be_explained_are_refused(images, model, layer, kind, message):
    with pytest.raises(kind, match=message):
        explain(model(), images, layer=layer)


def test_a_layer_that_runs_twice_is_refused():
    net = nn.Sequential(Repeats(), nn.Flatten())
    with pytest.raises(
        InvalidArgumentError, match=r"must run once for each image, but `0\.conv` ran 2 times"
    ):
        explain(net, torch.rand(1, 2, 4, 4), 0, layer="0.conv")


class Beside(nn.Module):
    """One layer lies beside the way to the output, another is not differentiated."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.beside, self.last = (nn.Conv2d(3, 3, 1) for _ in range(3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps = self.first(images)
        self.beside(maps)
        with torch.no_grad():
            images = self.last(maps)
        return images.mean((2, 3)) + maps.mean((2, 3))


def test_a_layer_without_a_gradient_is_refused_or_left_out(images):
    for layer in ("beside", "last"):
        with pytest.raises(InvalidArgumentError, match=f"but no gradient leads from the score to `{layer}`"):
            explain(Beside(), images, layer=layer)
    with pytest.raises(
        InvalidArgumentError, match="but no gradient leads from it to `beside`; leave that out"
    ):
        explain(Beside(), images, layer=["first", "beside"])
    assert explain(Beside(), images, layer="first").layers == ("first",)


def test_a_layer_that_puts_out_several_tensors_is_refused(images):
    net = nn.Sequential(
        Wrapped(nn.Conv2d(3, 2, 1), lambda maps: (maps, maps)),
        Wrapped(nn.Identity(), lambda pair: pair[0].mean((2, 3))),
    )
    with pytest.raises(InvalidArgumentError, match="but `0` puts out tuple; choose a layer inside it"):
        explain(net, images, layer="0")


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")
def test_a_part_in_torchscript_is_gone_through_and_no_layer(net, images):
    scripted = nn.Sequential(net[:4], torch.jit.script(net[4:6]), net[6:])
    for method in METHODS[:-1]:
        layer = None if method in ("gradient", "smoothgrad", "integrated_gradients") else "2"
        found = explain(net, images, 1, method=method, layer=layer)
        layer = None if layer is None else "0.2"
        torch.testing.assert_close(
            explain(scripted, images, 1, method=method, layer=layer).heatmaps, found.heatmaps
        )
    assert explain(scripted, images, 1).layers == ("0.2", "0")
    with pytest.raises(InvalidArgumentError, match="Relu is hidden within an operation of the model"):
        explain(scripted, images, 1, method="guided")
    with pytest.raises(CaptureError, match="`1` is TorchScript"):
        explain(scripted, images, 1, layer="1")


def test_a_network_without_maps_needs_a_layer_or_another_method():
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    with pytest.raises(InvalidArgumentError, match="none of this model puts out maps"):
        explain(net, torch.rand(1, 3, 2, 2))
    assert explain(net, torch.rand(1, 3, 2, 2), method="gradient").heatmaps.shape == (1, 2, 2)


class ChannelsLast(nn.Module):
    """Counts channels in the last dimension of (N, H, W, C), as Swin does."""

    def __init__(self, *, is_last: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.is_last = is_last
        self.embed = nn.Conv2d(3, 8, 4, 4)
        self.norm = nn.LayerNorm(8)
        self.mix = nn.Linear(8, 8)
        self.block = nn.ReLU()
        self.head = nn.Linear(8, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps = self.mix(self.norm(self.embed(images).permute(0, 2, 3, 1)))
        maps = self.block(maps if self.is_last else maps.permute(0, 3, 1, 2))
        return self.head(maps.mean((1, 2) if self.is_last else (2, 3)))


@pytest.mark.parametrize("method", ["gradcam", "layercam", "eigencam", "ablationcam"])
def test_channels_are_found_wherever_they_are(images, method):
    last, second = (
        explain(ChannelsLast(is_last=is_last), images, 1, method=method, layer="block")
        for is_last in (True, False)
    )
    torch.testing.assert_close(last.heatmaps, second.heatmaps)
    assert explain(ChannelsLast(is_last=True), images, 1, method="gradcam").layers == ("block",)
    told = explain(ChannelsLast(is_last=True), images, 1, method=method, layer="block", channel_dim=-1)
    torch.testing.assert_close(told.heatmaps, last.heatmaps)


class Tokens(nn.Module):
    """A class token before those of a grid of 3 x 4 patches; only the class token is read."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.before = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.after = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = self.embed(images).flatten(2).transpose(1, 2)
        tokens = self.before(torch.cat([self.token.expand(len(images), -1, -1), tokens], 1))
        tokens = self.after(tokens + self.attention(tokens, tokens, tokens)[0])
        return self.head(tokens[:, 0])


@pytest.mark.parametrize("method", ["gradcam", "layercam", "eigencam", "ablationcam"])
def test_tokens_lie_in_a_grid_and_the_last_that_counts_is_taken(images, method):
    net = Tokens()
    found = explain(net, images, 1, method=method, grid=(3, 4))
    assert found.layers == ("before",)
    assert found.heatmaps.shape == (2, 12, 16)
    if method == "layercam":
        leaves = {}
        handle = net.before.register_forward_hook(lambda module, args, output: leaves.update(tokens=output))
        score = net.eval()(images)[:, 1].sum()
        handle.remove()
        (gradient,) = torch.autograd.grad(score, leaves["tokens"])
        expected = (gradient.relu() * leaves["tokens"]).sum(2)[:, 1:].relu().view(2, 3, 4).detach()
        torch.testing.assert_close(found.heatmaps[:, 1::4, 1::4], torch.nn.functional.interpolate(
            expected[:, None], scale_factor=4, mode="bilinear"
        )[:, 0, 1::4, 1::4])  # fmt: skip


def test_tokens_without_a_grid_and_grids_without_tokens_are_refused(net, images):
    with pytest.raises(InvalidArgumentError, match=r"tokens \(N, L, C\) need `grid=\(rows, columns\)`"):
        explain(Tokens(), images, layer="before")
    with pytest.raises(InvalidArgumentError, match=r"puts out at least 12 tokens .* for `grid=\(3, 4\)`"):
        explain(net, images, grid=(3, 4))
    with pytest.raises(InvalidArgumentError, match="`grid` must have at most as many places"):
        explain(Tokens(), images, layer="before", grid=(5, 5))
    with pytest.raises(InvalidArgumentError, match="`grid` has no effect on `5`"):
        explain(net, images, layer="5", grid=(3, 4))


# Where values stand


@pytest.mark.parametrize("padding", [0, 1, 3])
def test_values_stand_where_their_receptive_fields_have_their_middle(padding):
    net = nn.Sequential(nn.Conv2d(1, 1, 5, stride=4, padding=padding, bias=False), nn.ReLU(), nn.Flatten(2))
    nn.init.ones_(net[0].weight)
    image = torch.zeros(1, 1, 29, 29)
    centre = (2 - padding + 4 * 3, 2 - padding + 4 * 2)  # of position (3, 2)
    image[0, 0, centre[0] - 1 : centre[0] + 2, centre[1] - 1 : centre[1] + 2] = 1.0
    heatmap = explain(net, image, lambda output: output.sum((1, 2)), method="hirescam", layer="1").heatmaps[0]
    assert np.unravel_index(int(heatmap.argmax()), heatmap.shape) == centre
    # Half way to the next position stands half the value, and nothing beyond it.
    assert heatmap[centre[0] + 2, centre[1]] == heatmap[centre] / 2
    assert heatmap[centre[0] + 4 :].abs().sum() == 0
    assert heatmap[centre] == 9.0


@pytest.mark.parametrize("padding", [10, 40])
def test_positions_far_in_the_padding_do_not_move_the_others(padding):
    """Networks such as FCN pad an image by more than they take away."""
    conv = nn.Conv2d(1, 1, 3, padding=padding, stride=2, bias=False)
    conv.weight.data.fill_(1.0)
    net = nn.Sequential(conv, nn.ReLU())
    image = torch.zeros(1, 1, 24, 32)
    image[0, 0, 5, 25] = 1.0
    found = explain(net, image, lambda output: output.sum((1, 2, 3)), layer="0")
    assert found.notes == ()
    heatmap = found.heatmaps[0] / found.heatmaps.sum()
    rows, columns = (heatmap.sum(1 - axis) @ torch.arange(float(heatmap.shape[axis])) for axis in (0, 1))
    assert (rows.item(), columns.item()) == pytest.approx((5, 25))


def test_values_that_are_not_finite_are_shown():
    net = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.Flatten(), nn.Linear(16, 1))
    nn.init.ones_(net[0].weight)
    image = torch.rand(1, 1, 4, 4)
    image[0, 0, 2, 1] = torch.nan
    heatmap = explain(net, image, 0, method="layercam", layer="0").heatmaps[0]
    assert torch.isnan(heatmap).nonzero().tolist() == [[2, 1]]


# Images and options


def test_pictures_and_what_is_made_of_them(net):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))

    def preprocess(given: Image.Image) -> torch.Tensor:
        pixels = torch.from_numpy(np.array(given.resize((16, 12)))).permute(2, 0, 1) / 255
        return (pixels - 0.5) / 0.25

    found = explain(net, picture, 1, preprocess=preprocess)
    expected = explain(net, preprocess(picture), 1)
    assert torch.equal(found.heatmaps, expected.heatmaps)
    torch.testing.assert_close(found.images[0], preprocess(picture) * 0.25 + 0.5, rtol=0, atol=2e-2)
    assert explain(net, picture, 1).heatmaps.shape == (1, 20, 30)


def test_batches_are_prepared_together(net, images):
    def preprocess(given: torch.Tensor) -> torch.Tensor:
        return (given - 0.5) / 0.25

    found = explain(net, images, 1, preprocess=preprocess)
    assert torch.equal(found.heatmaps, explain(net, preprocess(images), 1).heatmaps)
    torch.testing.assert_close(found.images, images, rtol=0, atol=1e-5)
    with pytest.raises(
        InvalidArgumentError, match=r"must make a batch \(N, C, H, W\) of a batch \(2, 3, 12, 16\)"
    ):
        explain(net, images, 1, preprocess=lambda given: given[0])


def test_bytes_count_to_255(net, images):
    given = (images * 255).to(torch.uint8)
    assert torch.equal(explain(net, given, 1).heatmaps, explain(net, given.float() / 255, 1).heatmaps)


@pytest.mark.parametrize(
    ("image", "kind", "message"),
    [
        (torch.zeros(12, 16), InvalidArgumentError, r"`image` must be one image"),
        (torch.zeros(0, 3, 12, 16), InvalidArgumentError, r"`image` must be"),
        (torch.zeros(2, 3, 0, 16), InvalidArgumentError, r"`image` must be a picture"),
        (
            torch.zeros(2, 5, 12, 16),
            InvalidArgumentError,
            r"the model cannot take images of shape \(5, 12, 16\)",
        ),
        ("cat.png", InvalidTypeError, "`image` must be a tensor or a picture, got str"),
    ],
)
def test_images_that_do_not_fit_are_refused(net, image, kind, message):
    with pytest.raises(kind, match=message):
        explain(net, image)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "scorecam"}, '`method` must be "gradcam"'),
        ({"method": "gradient", "layer": "5"}, '`layer` has no effect with `method="gradient"`'),
        ({"method": "guided", "grid": (2, 2)}, '`grid` has no effect with `method="guided"`'),
        ({"samples": 3}, '`samples` has no effect with `method="layercam"`'),
        ({"method": "integrated_gradients", "noise": 0.1}, "`noise` has no effect"),
        ({"seed": 1}, "`seed` has no effect"),
        ({"method": "smoothgrad", "samples": 0}, "`samples` must be at least 1, got 0"),
        ({"method": "smoothgrad", "noise": 0.0}, "`noise` must be above 0"),
    ],
)
def test_options_that_do_not_fit_are_refused(net, images, options, message):
    with pytest.raises(InvalidArgumentError, match=message):
        explain(net, images, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": 3}, r"`grid` must be \(rows, columns\), got 3"),
        ({"grid": (2, "x")}, "`grid` must be an int, got 'x'"),
        ({"preprocess": 3}, "`preprocess` must be a function or None, got 3"),
        ({"invert": "x"}, "`invert` must be a function or None, got 'x'"),
    ],
)
def test_options_of_other_types_are_refused(net, images, options, message):
    with pytest.raises(InvalidTypeError, match=message):
        explain(net, images, 1, **options)


@pytest.mark.parametrize(
    "target",
    [torch.zeros(3).to_sparse(), torch.zeros(3, device="meta"), torch.zeros(1).expand(2**40)],
    ids=["sparse", "meta", "wide"],
)
def test_targets_without_plain_values_are_refused(net, images, target):
    with pytest.raises((InvalidTypeError, InvalidArgumentError), match="`target` must"):
        explain(net, images, target)


def test_what_is_no_model_is_refused(images):
    with pytest.raises(InvalidTypeError, match=r"`model` must be a torch\.nn\.Module, got int"):
        explain(3, images)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        scripted = torch.jit.script(classifier())
    with pytest.raises(CaptureError, match="TorchScript"):
        explain(scripted, images)


def test_a_network_that_catches_what_fails_is_no_trap(images):
    net = nn.Sequential(nn.Conv2d(3, 1, 1), Catches(), nn.Flatten(2), nn.AdaptiveAvgPool1d(1), nn.Flatten())
    assert explain(net, images, 0, method="hirescam", layer="1.third").layers == ("1.third",)


def test_the_examples_of_the_documentation_run():
    page = Path(__file__).parents[2] / "docs" / "explain.md"
    result = doctest.testfile(str(page), module_relative=False)
    assert result.attempted >= 10
    assert result.failed == 0


def test_the_example_of_the_docstring_runs():
    test = doctest.DocTestFinder(recurse=False).find(explain, "explain", globs={"explain": explain})[0]
    assert doctest.DocTestRunner().run(test) == (0, 6)


class Mirrored(nn.Module):
    """A network whose last layer sees the image mirrored."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3, stride=2, padding=1)
        self.last = nn.Identity()

    def forward(self, x):
        return self.last(self.conv(x).flip(3)).mean((2, 3))


def test_a_layer_that_sees_the_image_mirrored_is_turned_back(images):
    model = Mirrored()
    ours, theirs = (explain(model, images, 1, method="hirescam", layer=name) for name in ("last", "conv"))
    assert ours.notes == theirs.notes == ()
    torch.testing.assert_close(ours.heatmaps, theirs.heatmaps)
