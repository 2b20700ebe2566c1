"""Surveys of networks over signals and volumes: against a loop over every input and position in numpy."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.nets import quiet
from torchlens_viz import Survey, capture, survey
from torchlens_viz.errors import InvalidArgumentError

# A convolution, and the shape of what it takes.
LAYERS = {
    "signal": (lambda: nn.Conv1d(2, 3, 4, stride=2, padding=3), (2, 21)),
    "dilated signal": (lambda: nn.Conv1d(12, 2, 3, dilation=4, padding=4), (12, 30)),
    "volume": (lambda: nn.Conv3d(1, 3, (2, 3, 3), padding=(0, 1, 2)), (1, 5, 6, 7)),
    "dilated clip": (lambda: nn.Conv3d(3, 2, 2, stride=(1, 2, 1), dilation=(2, 1, 3)), (3, 6, 6, 7)),
}


def by_loops(layer, images):
    """Every value of every map, and the part of the input it is made of: one window after the other."""
    images, weight = images.double().numpy(), layer.weight.detach().double().numpy()
    axes = range(weight.ndim - 2)
    reach = [layer.dilation[axis] * (weight.shape[axis + 2] - 1) + 1 for axis in axes]
    padded = np.pad(images, [(0, 0), (0, 0), *((layer.padding[axis],) * 2 for axis in axes)])
    counts = [(padded.shape[axis + 2] - reach[axis]) // layer.stride[axis] + 1 for axis in axes]
    maps = np.zeros((len(images), len(weight), *counts))
    for sample, channel in product(range(len(images)), range(len(weight))):
        for place in product(*map(range, counts)):
            first = [index * step for index, step in zip(place, layer.stride, strict=True)]
            window = [
                slice(at, at + size, skip)
                for at, size, skip in zip(first, reach, layer.dilation, strict=True)
            ]
            seen = padded[(sample, slice(None), *window)]
            maps[(sample, channel, *place)] = (seen * weight[channel]).sum() + layer.bias[channel].item()

    def box(place):
        found = []
        for axis, index in enumerate(place):
            taps = [
                index * layer.stride[axis] + tap * layer.dilation[axis] - layer.padding[axis]
                for tap in range(weight.shape[axis + 2])
            ]
            inside = [tap for tap in taps if 0 <= tap < images.shape[axis + 2]]
            found.append(slice(inside[0], inside[-1] + 1))
        return tuple(found)

    return maps, box


@pytest.mark.parametrize("kind", LAYERS)
def test_top_inputs_and_what_their_peaks_see_are_those_of_a_loop(kind, tmp_path):
    build, shape = LAYERS[kind]
    torch.manual_seed(4)
    net, images = nn.Sequential(build(), nn.ReLU()).eval(), torch.randn(9, *shape)
    found = survey(net, DataLoader(TensorDataset(images), batch_size=4), "0", top_k=4, **quiet)
    maps, box = by_loops(net[0], images)
    assert found.input_shape == shape
    np.testing.assert_allclose(found.stats["0"].mean.numpy(), maps.mean((0, *range(2, maps.ndim))), atol=1e-5)
    again = Survey.load(found.save(tmp_path / "found.safetensors"), model=net)
    for channel in range(maps.shape[1]):
        peaks = maps[:, channel].reshape(len(images), -1).max(1)
        order = np.argsort(-peaks)[:4]
        top = found.top["0"]
        assert top.samples[channel].tolist() == order.tolist()
        np.testing.assert_allclose(top.values[channel].numpy(), peaks[order], rtol=1e-4, atol=1e-5)
        patches = found.patches("0", channel, TensorDataset(images))
        for rank, (sample, patch) in enumerate(zip(order, patches, strict=True)):
            place = np.unravel_index(maps[sample, channel].argmax(), maps.shape[2:])
            told = top.positions[channel, rank].tolist()
            assert tuple(told) == ((0,) * (2 - len(place)) + tuple(place))
            assert patch.box == box(place)
            assert torch.equal(patch.values, images[sample][:, *patch.box])
            other = again.patches("0", channel, images)[rank]
            assert other.box == patch.box
            assert torch.equal(other.values, patch.values)


@pytest.mark.parametrize("kind", LAYERS)
def test_the_largest_patch_makes_the_peak_again(kind):
    build, shape = LAYERS[kind]
    net, images = nn.Sequential(build(), nn.ReLU()).eval(), torch.randn(9, *shape)
    found = survey(net, images.split(4), "0", top_k=9, **quiet)
    alone = build()
    alone.load_state_dict(net[0].state_dict())
    alone.padding = (0,) * (images.ndim - 2)
    whole = 0
    for channel, values in enumerate(found.top["0"].values):
        for value, patch in zip(values, found.patches("0", channel, images), strict=True):
            if all(
                extent == dilation * (kernel - 1) + 1
                for extent, dilation, kernel in zip(
                    patch.values.shape[1:], alone.dilation, alone.kernel_size, strict=True
                )
            ):
                whole += 1
                made = alone(patch.values[None])[0, channel].flatten()[0]
                torch.testing.assert_close(made, value, rtol=1e-4, atol=1e-5)
    assert whole > 0


@pytest.mark.parametrize(("convolution", "pool"), [(nn.Conv1d, nn.MaxPool1d), (nn.Conv3d, nn.MaxPool3d)])
def test_a_deep_peak_hangs_on_its_patch_and_on_nothing_else(convolution, pool):
    torch.manual_seed(1)
    net = nn.Sequential(
        convolution(1, 4, 3, padding=1), nn.ReLU(), pool(2), convolution(4, 3, 3, padding=1)
    ).eval()
    images = torch.randn(6, 1, *((24,) if convolution is nn.Conv1d else (8, 10, 8)))
    found = survey(net, images.split(3), "3", top_k=2, **quiet)
    for channel in range(3):
        rows = zip(
            found.top["3"].samples[channel].tolist(),
            found.top["3"].positions[channel].tolist(),
            found.patches("3", channel, images),
            strict=True,
        )
        for sample, place, patch in rows:
            elsewhere = torch.randn_like(images[sample])
            elsewhere[:, *patch.box] = patch.values
            at = tuple(place[len(place) - images.ndim + 2 :])
            before, after = (net(each[None])[0, channel][at] for each in (images[sample], elsewhere))
            torch.testing.assert_close(after, before)
            changed = images[sample].clone()
            changed[:, *patch.box] = 0
            assert net(changed[None])[0, channel][at] != before


def test_signals_of_many_lengths_are_cut_each_by_its_own():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(1, 2, 3))
    signals = [torch.randn(1, 1, length) for length in (9, 12, 30)]
    found = survey(net, signals, "0", top_k=3, **quiet)
    assert found.input_shape is None
    for channel in range(2):
        for sample, place, patch in zip(
            found.top["0"].samples[channel].tolist(),
            found.top["0"].positions[channel, :, 1].tolist(),
            found.patches("0", channel, [each[0] for each in signals]),
            strict=True,
        ):
            assert torch.equal(patch.values, signals[sample][0][:, place : place + 3])


def test_a_gray_volume_is_not_taken_for_a_batch_of_images():
    net = nn.Sequential(nn.Conv3d(1, 2, 2))
    volumes = torch.rand(3, 1, 4, 5, 6)
    found = survey(net, volumes.split(2), "0", top_k=2, **quiet)
    (patch, *_) = found.patches("0", 0, volumes)
    assert patch.values.shape == (1, 2, 2, 2)
    assert torch.equal(patch.pixels, patch.values.expand(3, -1, -1, -1))


def test_the_sheet_shows_slices_of_volumes_and_curves_of_signals():
    net = nn.Sequential(nn.Conv3d(3, 2, (4, 5, 5)))
    clips = torch.rand(4, 3, 6, 8, 8)
    found = survey(net, [clips], "0", top_k=1, **quiet)
    sheet = np.asarray(found.grid("0", clips, channels=1, labels=False, padding=0, upscale=1))
    (patch,) = found.patches("0", 1, clips)
    assert sheet.shape == (2 * 6 + 1, 2 * 6 + 1, 3)
    for depth, (top, left) in enumerate([(1, 1), (1, 7), (7, 1), (7, 7)]):
        expected = 255 * patch.values[:, depth].permute(1, 2, 0).numpy()
        np.testing.assert_allclose(sheet[top : top + 5, left : left + 5], expected, atol=1.01)

    net = nn.Sequential(nn.Conv1d(2, 1, 12))
    signals = torch.linspace(-1, 1, 40).expand(1, 2, -1)
    found = survey(net, [signals], "0", top_k=1, **quiet)
    sheet = found.grid("0", signals, labels=False, padding=0, upscale=1)
    assert sheet.size == (96, 2 * 48)
    for strip in (np.asarray(sheet.convert("L"))[:48] < 100, np.asarray(sheet.convert("L"))[48:] < 100):
        rows = np.argmax(strip, axis=0)
        assert (rows[0], rows[-1]) == (46, 1)  # from the smallest value that is drawn to the largest
        assert (np.diff(rows) <= 0).all()


def test_bands_choose_what_is_shown():
    net = nn.Sequential(nn.Conv2d(12, 1, 3))
    images = torch.rand(2, 12, 5, 5)
    found = survey(net, [images], "0", top_k=1, **quiet)
    sheet = np.asarray(found.grid("0", images, bands=(7, 1, 2), labels=False, padding=0, upscale=1))
    (patch,) = found.patches("0", 0, images)
    np.testing.assert_allclose(sheet, 255 * patch.values[[7, 1, 2]].permute(1, 2, 0).numpy(), atol=1.01)
    net = nn.Sequential(nn.Conv1d(12, 1, 3))
    found = survey(net, [torch.rand(2, 12, 9)], "0", top_k=1, **quiet)
    assert found.grid("0", torch.rand(2, 12, 9), labels=False, padding=0).size == (96, 12 * 8)
    assert found.grid("0", torch.rand(2, 12, 9), bands=4, labels=False, padding=0).size == (96, 64)
    with pytest.raises(InvalidArgumentError, match="`bands` must be indices from 0 to 11, got 12"):
        found.grid("0", torch.rand(2, 12, 9), bands=12)


def test_inputs_are_made_of_pictures_by_a_preprocessing_that_makes_clips():
    def clip(picture):
        pixels = torch.from_numpy(np.array(picture)).movedim(2, 0) / 255
        return ((pixels - 0.5) / 0.25)[None, :, None].expand(-1, -1, 4, -1, -1)

    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 255, (8, 9, 3), dtype=np.uint8)) for _ in range(3)]
    net = nn.Sequential(nn.Conv3d(3, 2, 3))
    found = survey(net, [clip(each) for each in pictures], "0", top_k=1, **quiet)
    (patch,) = found.patches("0", 0, pictures, preprocess=clip)
    rows, columns = patch.box[1:]
    sample = int(found.top["0"].samples[0, 0])
    seen = torch.from_numpy(np.array(pictures[sample])).movedim(2, 0)[:, rows, columns] / 255
    torch.testing.assert_close(patch.pixels, seen[:, None].expand(-1, 3, -1, -1), rtol=0, atol=1e-5)


class SequenceFirst(nn.Module):
    """Tokens (L, N, C), as `batch_first=False` has them."""

    def __init__(self, *, need_weights=False):
        super().__init__()
        self.stem, self.need_weights = nn.Conv2d(3, 8, 4, 4), need_weights
        self.attention = nn.MultiheadAttention(8, 2)
        self.norm, self.act, self.head = nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3)

    def forward(self, x):
        x = self.stem(x).flatten(2).permute(2, 0, 1)
        x = self.norm(x + self.attention(x, x, x, need_weights=self.need_weights)[0])
        return self.head(self.act(x).mean(0))


@pytest.mark.parametrize("layer", ["attention", "norm", "act"])
@pytest.mark.parametrize(
    "batch", [5, 6]
)  # with as many inputs as there are tokens nothing else tells them apart
def test_inputs_that_are_counted_by_the_second_dimension_are_known(layer, batch):
    torch.manual_seed(0)
    net, images = SequenceFirst().eval(), torch.rand(12, 3, 8, 12)
    found = survey(net, images.split(batch), layer, top_k=3, target=lambda output, _: output[:, 1], **quiet)
    with torch.no_grad(), capture(net, layer) as acts:
        net(images)
    values = acts[layer][0] if layer == "attention" else acts[layer]  # (6, 12, 8)
    best = values.amax(0).topk(3, dim=0)
    assert found.top[layer].samples.equal(best.indices.T)
    places = [
        [values[:, sample, channel].argmax() for sample in row] for channel, row in enumerate(best.indices.T)
    ]
    assert found.top[layer].positions[..., 1].tolist() == [[int(place) for place in row] for row in places]
    torch.testing.assert_close(found.stats[layer].mean, values.double().mean((0, 1)), rtol=1e-5, atol=1e-7)
    rows = found.top_by_relevance[layer]
    if layer == "act":  # (mean over tokens) @ head: the gradient is known
        expected = (values.mean(0) * net.head.weight[1]).topk(3, dim=0)
        assert rows.samples.equal(expected.indices.T)
        torch.testing.assert_close(rows.values, expected.values.T, rtol=1e-4, atol=1e-6)


def test_attention_that_puts_out_its_weights_says_what_to_do():
    with pytest.raises(
        InvalidArgumentError, match=r"one tensor, got several in one call.*`need_weights=False`"
    ):
        survey(SequenceFirst(need_weights=True), [torch.rand(5, 3, 8, 12)], "attention", **quiet)
