"""What a survey knows class by class, and how alike the inputs that drive a channel are: against numpy."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.dataset.test_checkpoint import edit, replaced
from tests.dataset.test_effects import batches, by_hooks, net
from tests.nets import Given, Repeats, quiet
from torchlens_viz import Survey, survey
from torchlens_viz.errors import ArchiveError, InvalidArgumentError, InvalidTypeError

LAYERS = ["0", "2", "4", "7"]


def found_in(model, data, layers=LAYERS, **options) -> Survey:
    asked = {"by_class": True, "loss": "cross_entropy", "encoder": "output", "top_k": 2, **options}
    return survey(model, data, layers, **asked, **quiet)


def activity_of(model, data, layer) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The mean of each channel over its positions, the labels and the outputs, input by input in float64."""
    model = copy_in_double(model)
    kept: list[torch.Tensor] = []
    handle = model.get_submodule(layer).register_forward_hook(lambda _, __, out: kept.append(out.clone()))
    outputs = torch.cat([model(images.double()) for images, _ in data])
    handle.remove()
    maps = torch.cat(kept)
    activity = maps.reshape(*maps.shape[:2], -1).mean(2)
    return (
        activity.detach().numpy(),
        torch.cat([labels for _, labels in data]).numpy(),
        outputs.detach().numpy(),
    )


def copy_in_double(model: nn.Module) -> nn.Module:
    copied = net() if isinstance(model, nn.Sequential) else type(model)()
    copied.load_state_dict(model.state_dict())
    return copied.double()


def selectivity(activity: np.ndarray, labels: np.ndarray) -> np.ndarray:
    means = np.array([activity[labels == label].mean(0) for label in np.unique(labels)])
    found = []
    for channel in means.T:
        best = channel.argmax()
        rest = np.delete(channel, best).mean()
        is_known = (channel >= 0).all() and channel.max() > 0
        found.append((channel[best] - rest) / (channel[best] + rest) if is_known else np.nan)
    return np.array(found)


def mono_score(activity: np.ndarray, embeddings: np.ndarray) -> np.ndarray:
    """The definition of Pach et al., pair by pair."""
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    found = []
    for channel in activity.T:
        scaled = (channel - channel.min()) / (channel.max() - channel.min())
        pairs = list(itertools.combinations(range(len(scaled)), 2))
        weights = np.array([scaled[one] * scaled[other] for one, other in pairs])
        alike = np.array([unit[one] @ unit[other] for one, other in pairs])
        found.append((weights * alike).sum() / weights.sum())
    return np.array(found)


@pytest.mark.parametrize("layer", LAYERS)
def test_selectivity_and_class_means_are_those_of_a_plain_loop(layer):
    model, data = net(), batches()
    found = found_in(model, data)
    activity, labels, _ = activity_of(model, data, layer)
    means = found.class_means[layer]
    assert means.classes.tolist() == np.unique(labels).tolist()
    assert means.inputs.tolist() == np.unique(labels, return_counts=True)[1].tolist()
    for label, each in zip(means.classes.tolist(), means.means, strict=True):
        np.testing.assert_allclose(each, activity[labels == label].mean(0), rtol=1e-4, atol=1e-6)
    expected = selectivity(activity, labels)
    np.testing.assert_allclose(found.selectivity[layer], expected, rtol=1e-4, atol=1e-6)
    assert np.isnan(expected).any() == (layer in ("0", "7"))
    assert found.selectivity[layer].dtype == torch.float64


@pytest.mark.parametrize("layer", LAYERS)
def test_effects_by_class_are_those_of_the_inputs_of_each(layer):
    model, data = net(), batches()
    found = found_in(model, data)
    gradients, products, means = by_hooks(model, data, layer)
    labels = torch.cat([labels for _, labels in data]).numpy()
    for by, value in (("zero", 0.0), ("mean", means.mean(0))):
        each = value * gradients - products
        effect = found.effects.by_class(layer, by)
        assert effect.classes.tolist() == np.unique(labels).tolist()
        for place, label in enumerate(effect.classes.tolist()):
            own = each[labels == label]
            np.testing.assert_allclose(effect.change[place], own.mean(0), rtol=1e-4, atol=1e-7)
            error = own.std(0, ddof=1) / len(own) ** 0.5 if len(own) > 1 else np.full(own.shape[1], np.nan)
            np.testing.assert_allclose(effect.error[place], error, rtol=1e-3, atol=1e-7)
        whole = (effect.change * effect.inputs[:, None]).sum(0) / effect.inputs.sum()
        np.testing.assert_allclose(whole, found.effects.of(layer, by).change, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("layer", LAYERS)
def test_the_mono_score_is_that_of_all_pairs(layer):
    model, data = net(), batches()
    activity, _, outputs = activity_of(model, data, layer)
    found = found_in(model, data).monosemanticity[layer]
    np.testing.assert_allclose(found, mono_score(activity, outputs), rtol=1e-4, atol=1e-5)

    def encoder(images):
        return images.flatten(2).mean(2).double()

    found = found_in(model, data, encoder=encoder).monosemanticity[layer]
    pixels = torch.cat([images for images, _ in data]).double().flatten(2).mean(2).numpy()
    np.testing.assert_allclose(found, mono_score(activity, pixels), rtol=1e-4, atol=1e-5)


def test_an_encoder_that_is_a_module_runs_in_eval_mode_and_is_as_before():
    model, data = net(), batches()
    encoder = nn.Sequential(nn.Dropout(0.5), nn.AvgPool2d(3), nn.Flatten()).train()
    first, second = (found_in(model, data, encoder=encoder).monosemanticity for _ in range(2))
    assert all(torch.equal(first[layer], second[layer]) for layer in LAYERS)
    assert encoder[0].training


def test_planted_channels_have_the_scores_that_they_must_have():
    """One class alone, all of them, two, no activity, a negative one, a single input, and the label."""
    labels = torch.arange(40) % 4
    activity = torch.stack(
        [
            labels == 0,
            labels >= 0,
            labels < 2,
            labels < 0,
            -(labels == 0).float(),
            torch.arange(40) == 8,
            labels,
        ],
        dim=1,
    )
    maps = activity.float()[..., None, None].expand(-1, -1, 3, 5)
    data = list(zip(maps.split(7), labels.split(7), strict=True))

    def encoder(given):
        return F.one_hot(given[:, 6, 0, 0].long(), 4).float()

    found = survey(Given(), data, "layer", by_class=True, encoder=encoder, **quiet)
    expected = [1, 0, (1 - 1 / 3) / (1 + 1 / 3), np.nan, np.nan, 1, (3 - 1) / (3 + 1)]
    np.testing.assert_allclose(found.selectivity["layer"], expected)
    # Pairs of one class among those of its 10 inputs, of 20 of two classes, and of 30 of three.
    weighed = (10 * 9 / 2) * (1 + 4 + 9) / (((0 + 1 + 2 + 3) * 10) ** 2 / 2 - 10 * (1 + 4 + 9) / 2)
    expected = [1, np.nan, 9 / 19, np.nan, 9 / 29, np.nan, weighed]
    np.testing.assert_allclose(found.monosemanticity["layer"], expected, rtol=1e-12)


def test_of_several_calls_the_mean_counts():
    model = Repeats().double()
    data = [(torch.randn(6, 2, 4, 4).double(), torch.arange(6) % 2)]
    found = survey(model, data, ["conv", "alias"], by_class=True, **quiet)
    first = model.conv(data[0][0])
    maps = torch.cat([first.flatten(2), model.conv(first[:, :, ::2]).flatten(2)], 2).mean(2)
    expected = torch.stack([maps[::2].mean(0), maps[1::2].mean(0)]).detach()
    torch.testing.assert_close(found.class_means["conv"].means, expected)
    assert torch.equal(found.class_means["alias"].means, found.class_means["conv"].means)


def test_tokens_and_rows_count_their_channels_where_they_are():
    values, labels = torch.rand(6, 5, 3), torch.arange(6) % 2
    found = survey(Given(), [(values, labels)], "layer", by_class=True, channel_dim=-1, **quiet)
    expected = torch.stack([values[::2].mean((0, 1)), values[1::2].mean((0, 1))])
    torch.testing.assert_close(found.class_means["layer"].means, expected.double())


def same(one: Survey, other: Survey, *, rtol: float) -> None:
    for layer in LAYERS:
        for ours, theirs in (
            (one.selectivity[layer], other.selectivity[layer]),
            (one.monosemanticity[layer], other.monosemanticity[layer]),
            *zip(one.class_means[layer], other.class_means[layer], strict=True),
            *zip(one.effects.by_class(layer, "mean"), other.effects.by_class(layer, "mean"), strict=True),
        ):
            np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=1e-9 * (rtol > 0))


def test_parts_merge_to_the_whole_and_files_hold_all_of_it(tmp_path):
    model, data = net(), batches()
    whole = found_in(model, data)
    # The first part lacks a class that the second one has.
    assert set(data[1][1].tolist()) < set(torch.cat([labels for _, labels in data]).tolist())
    parts = [
        found_in(model, [batch], indices=range(start, start + len(batch[0])))
        for batch, start in zip(data, (0, 5, 8), strict=True)
    ]
    same(parts[1].merge(parts[0]).merge(parts[2]), whole, rtol=1e-9)
    same(Survey.load(whole.save(tmp_path / "s.safetensors")), whole, rtol=0)
    for option, message in (({"by_class": False}, "`by_class`"), ({"encoder": None}, "an `encoder`")):
        other = found_in(model, data, indices=range(20, 32), **option)
        with pytest.raises(InvalidArgumentError, match=f"both must have been surveyed with {message}, or"):
            whole.merge(other)
    short = found_in(model, data, indices=range(20, 32), encoder=lambda images: images[:, :2, 0, 0])
    with pytest.raises(InvalidArgumentError, match=r"embeddings of one length, got 4 and 2"):
        whole.merge(short)


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("classes.classes", lambda values: values.flip(0)),
        ("classes.inputs", lambda values: values[:-1]),
        ("classes.sums", lambda values: values[:, :3].contiguous()),
        ("classes.sums", lambda values: values.float()),
        ("meaning.weighed", lambda values: values[:, :-1].contiguous()),
        ("meaning.least", lambda values: values[:-1]),
        ("slopes.mixed", lambda values: values[:-1]),
    ],
)
def test_an_edited_file_is_refused(tmp_path, field, change):
    path = found_in(net(), batches(), "0").save(tmp_path / "s.safetensors")
    edit(path, replaced(f"0.{field}", change))
    part = field.partition(".")[0]
    with pytest.raises(ArchiveError, match=rf"the sums of `{part}` must be float64 of the 6 channels"):
        Survey.load(path)


def test_without_labels_and_without_an_encoder_there_is_nothing():
    found = survey(net(), batches(), "2", loss="cross_entropy", **quiet)
    assert found.selectivity == found.monosemanticity == found.class_means == {}
    with pytest.raises(InvalidArgumentError, match=r"effects by class need labels; make the survey with"):
        found.effects.by_class("2")
    only = survey(net(), batches(), "2", by_class=True, **quiet)
    assert list(only.selectivity) == ["2"]
    with pytest.raises(InvalidArgumentError, match=r"effects need gradients"):
        only.effects.by_class("2")


def test_what_cannot_be_is_refused():
    model, data = net(), batches()
    with pytest.raises(InvalidArgumentError, match=r"`by_class` needs the class of each input, got none"):
        survey(model, [images for images, _ in data], "2", by_class=True, **quiet)
    with pytest.raises(InvalidArgumentError, match=r"got 2 for 5 inputs; let the loader yield"):
        survey(model, data, "2", by_class=True, label_of=lambda batch: batch[1][:2], **quiet)
    with pytest.raises(InvalidTypeError, match=r"`encoder` must be a function or None, got 3"):
        survey(model, data, "2", encoder=3, **quiet)
    for encoder, what in (
        (lambda images: images.mean(), r"torch.float32 of shape \(\)"),
        (lambda images: images[:2], r"torch.float32 of shape \(2, 3, 9, 9\)"),
        (lambda images: [1], "list"),
    ):
        with pytest.raises(InvalidArgumentError, match=rf"`encoder` must make .* \(5, ...\), got {what}"):
            survey(model, data, "2", encoder=encoder, **quiet)


def test_there_is_a_bound_on_the_number_of_classes():
    values = torch.rand(1025, 2)
    data = list(zip(values.split(500), torch.arange(1025).split(500), strict=True))
    assert (
        len(survey(Given(), data[:2], "layer", by_class=True, **quiet).class_means["layer"].classes) == 1000
    )
    with pytest.raises(InvalidArgumentError, match=r"at most 1,024 classes, got 1,025"):
        survey(Given(), data, "layer", by_class=True, **quiet)


def test_an_embedding_without_a_direction_does_not_count():
    values = torch.tensor([[0.0], [1.0], [1.0], [1.0]])
    embeddings = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    data = [(values, torch.zeros(4))]
    found = survey(Given(), data, "layer", encoder=lambda given: embeddings, **quiet)
    assert found.monosemanticity["layer"].tolist() == [1.0]


PROGRAM = """
import sys
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
sys.path.insert(0, sys.argv[3])
from tests.dataset.test_by_class import found_in
from tests.dataset.test_effects import batches, net

torch.set_num_threads(1)
folder, rank = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
images, labels = (torch.cat(parts)[:11] for parts in zip(*batches(), strict=True))
data = TensorDataset(images, labels)
loader = DataLoader(data, batch_size=2, sampler=DistributedSampler(data, shuffle=True))
found_in(net(), loader, target=lambda output, batch: output[:, 0]).save(f"{folder}/{rank}")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path):
    path, root = tmp_path / "program.py", str(Path(__file__).parents[2])
    path.write_text(PROGRAM)
    both = [
        subprocess.Popen([sys.executable, path, tmp_path, str(rank), root], stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    for process in both:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    images, labels = (torch.cat(parts)[:11] for parts in zip(*batches(), strict=True))
    alone = found_in(net(), [(images, labels)], target=lambda output, batch: output[:, 0])
    first, second = (Survey.load(tmp_path / str(rank)) for rank in range(2))
    same(first, second, rtol=0)
    same(first, alone, rtol=1e-4)
    for layer in LAYERS:
        assert torch.equal(first.top_by_relevance[layer].samples, alone.top_by_relevance[layer].samples)
        for ours, theirs in zip(first.effects.of(layer), alone.effects.of(layer), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_inputs():
    script = Path(__file__).parents[2] / "benchmarks" / "survey_memory.py"

    def peak(images: int) -> float:
        command = [sys.executable, str(script), "--one", str(images), "effects"]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    kept = 1000 * 16 * 32 * 32 * 4 / 2**20  # MiB, if what the first layer puts out were kept
    assert peak(1100) - peak(100) < kept / 2
