"""Top inputs by relevance: against plain loops with hooks and autograd, and where the truth is planted."""

from __future__ import annotations

import copy
import random
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.nets import Repeats, assert_as_before, quiet, same_survey, snapshot
from torchlens_viz import Survey, survey
from torchlens_viz.errors import ArchiveError, InvalidArgumentError, InvalidTypeError
from torchlens_viz.stats.peaks import find_totals


def second(output, batch):
    return output[:, 1]


def small() -> nn.Sequential:
    """ReLUs in place, a normalisation, a pooling, and a head."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 5, 3),
        nn.BatchNorm2d(5),
        nn.ReLU(inplace=True),
        nn.Conv2d(5, 4, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


def images_of(count: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, 2, 8, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_loop(model: nn.Module, images: torch.Tensor, score) -> dict[str, torch.Tensor]:
    """Activation times gradient, (N, C, places) of every layer, image by image, without in-place ReLUs."""
    model = copy.deepcopy(model).eval()
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    found: dict[str, list[torch.Tensor]] = {}
    for image in images:
        kept: dict[str, torch.Tensor] = {}
        hooks = []
        for name, module in model.named_children():

            def note(module, args, output, name=name, kept=kept):
                output.retain_grad()
                kept[name] = output

            hooks.append(module.register_forward_hook(note))
        score(model(image[None].requires_grad_()), None).sum().backward()
        for hook in hooks:
            hook.remove()
        for name, maps in kept.items():
            parts = (maps * maps.grad).detach()[0]
            found.setdefault(name, []).append(parts.reshape(len(parts), -1))
    return {name: torch.stack(parts) for name, parts in found.items()}


@pytest.mark.parametrize("batch", [1, 4, 20])
def test_top_inputs_by_relevance_agree_with_a_plain_loop(batch):
    model, images = small().double(), images_of(20)
    found = survey(model, images.split(batch), "*", top_k=6, target=second, **quiet)
    expected = by_loop(model, images, second)
    assert set(expected) == set(found.top_by_relevance) - {""}
    for name, parts in expected.items():
        totals = parts.sum(2)
        top = found.top_by_relevance[name]
        for channel in range(totals.shape[1]):
            order = np.lexsort((np.arange(20), -totals[:, channel].numpy()))[:6]
            values = totals[order, channel]
            np.testing.assert_allclose(top.values[channel], values, rtol=1e-9, atol=1e-12)
            if len(values.unique()) == 6 and (values.diff().abs() > 1e-9).all():
                assert top.samples[channel].tolist() == order.tolist()
                for place, sample in enumerate(order):
                    best = int(parts[sample, channel].argmax())
                    width = {"0": 7, "1": 7, "2": 7, "3": 7, "4": 7, "5": 2}.get(name, 1)
                    assert top.positions[channel, place].tolist() == list(divmod(best, width))


def test_what_a_survey_without_a_target_finds_stays_the_same():
    model, images = small(), images_of(10).float()
    plain = survey(model, images.split(3), "*", correlations=True, **quiet)
    found = survey(model, images.split(3), "*", correlations=True, target=second, **quiet)
    same_survey(found, plain, rtol=0)
    assert [found.dead(name).tolist() for name in found.stats] == [
        plain.dead(name).tolist() for name in plain.stats
    ]
    followers = [{name: each.follower for name, each in one._tallies.items()} for one in (plain, found)]
    assert followers[0] == followers[1]
    assert followers[0]["0"] == "normalisation"
    assert dict(plain.top_by_relevance) == {}
    assert "top_by_relevance" not in plain.to_dict()["layers"]["0"]
    assert found.to_dict()["layers"]["0"]["top_by_relevance"]["samples"][0][0] == int(
        found.top_by_relevance["0"].samples[0, 0]
    )


# Planted truth


class Halves(nn.Module):
    """One channel, the image itself; the score is its sum over the right half, and no other channel's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 1, bias=False)
        self.head = nn.Linear(2 * 4 * 8, 1, bias=False)
        nn.init.ones_(self.conv.weight)
        weight = torch.zeros(1, 2, 4, 8)
        weight[:, 0, :, 4:] = 1.0
        self.head.weight = nn.Parameter(weight.flatten(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv(x).flatten(1))


def planted() -> torch.Tensor:
    """Twelve images: the first eight strong on the left, the last four weak on the right."""
    images = torch.zeros(12, 1, 4, 8)
    for number in range(8):
        images[number, 0, 1, number % 4] = 10.0 + number
    for number in range(8, 12):
        images[number, 0, 2, number - 4] = number - 7.0
    return images


def test_a_channel_that_fires_hardest_where_its_weight_is_zero_matters_elsewhere():
    images = planted()
    found = survey(
        Halves(), images.split(5), "conv", top_k=4, target=lambda output, batch: output[:, 0], **quiet
    )
    top, relevant = found.top["conv"], found.top_by_relevance["conv"]
    assert top.samples[0].tolist() == [7, 6, 5, 4]
    assert relevant.samples[0].tolist() == [11, 10, 9, 8]
    assert relevant.values[0].tolist() == [4.0, 3.0, 2.0, 1.0]
    assert relevant.positions[0].tolist() == [[2, 7], [2, 6], [2, 5], [2, 4]]
    # The other channel is the same, but nothing depends on it: all equal, so that the first come first.
    assert relevant.values[1].tolist() == [0.0] * 4
    assert relevant.samples[1].tolist() == [0, 1, 2, 3]
    patches = found.patches("conv", 0, images, by="relevance")
    assert [float(patch.values) for patch in patches] == [4.0, 3.0, 2.0, 1.0]
    sheet = found.grid(
        "conv", images, channels=0, by="relevance", invert=lambda x: x / 20, labels=False, padding=0
    )
    assert [sheet.getpixel((64 * place, 0))[0] for place in range(4)] == [51, 38, 26, 13]  # 4, 3, 2, 1 of 20


def test_the_batch_as_the_loader_yields_it_reaches_the_target():
    images, labels = images_of(9).float(), torch.tensor([0, 1, 2] * 3)
    model = small()
    loader = [{"x": images[i : i + 4], "label": labels[i : i + 4]} for i in range(0, 9, 4)]

    def own(output, batch):
        return output.gather(1, batch["label"][:, None])[:, 0]

    found = survey(model, loader, "3", top_k=9, target=own, **quiet)
    parts = [by_loop(model, images[i : i + 1], lambda o, b, i=i: o[:, labels[i]])["3"] for i in range(9)]
    totals = torch.cat(parts).sum(2)
    for channel in range(4):
        order = totals[:, channel].argsort(descending=True)
        assert found.top_by_relevance["3"].samples[channel].tolist() == order.tolist()


def test_of_several_calls_the_sum_counts():
    model = Repeats().double()
    images = torch.randn(7, 2, 8, 8, dtype=torch.float64)
    found = survey(model, images.split(3), ["conv", "alias"], top_k=7, target=score_of_all, **quiet)
    first = model.conv(images)
    again = model.conv(first)
    taken = torch.autograd.grad((again[:, :, ::2] ** 2).sum(), [first, again])
    totals = sum((maps * slope).sum((2, 3)) for maps, slope in zip([first, again], taken, strict=True))
    for name in ("conv", "alias"):
        top = found.top_by_relevance[name]
        for channel in range(2):
            order = totals[:, channel].argsort(descending=True)
            assert top.samples[channel].tolist() == order.tolist()
            torch.testing.assert_close(top.values[channel], totals[order, channel].detach())


def score_of_all(output, batch):
    return (output**2).flatten(1).sum(1)


@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("dim", [1, -1])
def test_totals_and_their_largest_parts_agree_with_numpy(dim, in_order):
    values, weights = torch.randn(6, 3, 4, 5, dtype=torch.float64), torch.randn(6, 3, 4, 5).double()
    values[0, 0, 0, 0] = torch.nan
    parts = (values * weights).movedim(dim, 1).numpy()
    bar = torch.tensor(np.sort(parts.reshape(6, parts.shape[1], -1).sum(2), axis=0)[2])
    bar = bar.nan_to_num(0.0)
    for each in (None, bar):
        found = find_totals(values, weights, dim, k=2, bar=each, in_order=in_order)
        for image, channel in np.ndindex(parts.shape[:2]):
            own = parts[image, channel]
            total = own.sum()
            assert found.values[image, channel].item() == pytest.approx(-np.inf if np.isnan(total) else total)
            where = found.positions[image, channel].tolist()
            assert where in ([-1, -1], list(np.unravel_index(np.argmax(own), own.shape)))
    beyond = find_totals(values, weights, dim, k=2, bar=bar, in_order=in_order)
    assert ((beyond.values > bar) <= (beyond.positions[..., 0] >= 0)).all()
    nothing = find_totals(values, None, dim, k=2)
    assert nothing.values.eq(0).all()
    assert nothing.positions.eq(0).all()


# Files, parts, processes


def test_it_is_saved_loaded_and_merged(tmp_path):
    model, images = small(), images_of(12).float()
    whole = survey(model, images.split(3), "*", top_k=4, target=second, **quiet)
    loaded = Survey.load(whole.save(tmp_path / "s"), model=model)
    halves = [
        survey(
            model, images[start : start + 6].split(3), "*", top_k=4, target=second,
            indices=range(start, start + 6), **quiet,
        )
        for start in (6, 0)
    ]  # fmt: skip
    for other in (loaded, halves[0].merge(halves[1])):
        assert list(other.top_by_relevance) == list(whole.top_by_relevance)
        for name, top in whole.top_by_relevance.items():
            for part in ("values", "samples", "positions"):
                assert torch.equal(getattr(other.top_by_relevance[name], part), getattr(top, part)), name
    plain = survey(model, images[:6].split(3), "*", top_k=4, **quiet)
    with pytest.raises(InvalidArgumentError, match="both must have been surveyed with a `target`, or"):
        halves[0].merge(plain)


def test_a_survey_that_was_broken_off_goes_on_to_the_same(tmp_path):
    model, images = small(), images_of(12).float()

    def broken():
        yield from images[:6].split(2)
        raise KeyboardInterrupt

    file = tmp_path / "c"
    begun = survey(model, broken(), "3", target=second, checkpoint=file, **quiet)
    assert (begun.samples_seen, begun.is_complete) == (6, False)
    with pytest.raises(ArchiveError, match="`target` was True and now is False"):
        survey(model, iter(images.split(2)), "3", checkpoint=file, **quiet)
    found = survey(model, iter(images.split(2)), "3", target=second, checkpoint=file, **quiet)
    whole = survey(model, images.split(2), "3", target=second, **quiet)
    for part in ("values", "samples", "positions"):
        ours, theirs = (getattr(each.top_by_relevance["3"], part) for each in (found, whole))
        assert torch.equal(ours, theirs)


PROGRAM = """
    import sys
    import torch
    import torch.distributed as dist
    from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
    sys.path.insert(0, sys.argv[3])
    from tests.dataset.test_relevance import images_of, second, small
    from torchlens_viz import survey

    torch.set_num_threads(1)
    folder, rank = sys.argv[1], int(sys.argv[2])
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    data = TensorDataset(images_of(11).float())
    loader = DataLoader(data, batch_size=4, sampler=DistributedSampler(data, shuffle=False))

    def checked(output, batch):
        assert len(batch[0]) == len(output)
        return second(output, batch)

    found = survey(small(), loader, "3", top_k=4, target=checked, progress=False)
    torch.save({part: getattr(found.top_by_relevance["3"], part) for part in ("values", "samples")},
               f"{folder}/{rank}.pt")
    dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path):
    path, root = tmp_path / "program.py", Path(__file__).parents[2]
    path.write_text(textwrap.dedent(PROGRAM))
    running = [
        subprocess.Popen(
            [sys.executable, str(path), str(tmp_path), str(rank), str(root)], stderr=subprocess.PIPE
        )
        for rank in range(2)
    ]
    for process in running:
        _, errors = process.communicate(timeout=100)
        assert process.returncode == 0, errors
    alone = survey(small(), images_of(11).float().split(4), "3", top_k=4, target=second, **quiet)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert torch.equal(found["samples"], alone.top_by_relevance["3"].samples)
        torch.testing.assert_close(found["values"], alone.top_by_relevance["3"].values, rtol=1e-5, atol=1e-6)


# The caller's model and mode stay


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("is_frozen", [False, True])
def test_nothing_of_the_callers_changes(mode, is_frozen):
    model = small().train()
    model[0].requires_grad_(not is_frozen)
    model.append(nn.Dropout(0.5))
    before = snapshot(model)
    random.seed(3)
    states = [torch.get_rng_state(), random.getstate()]
    with mode():
        images = images_of(6).float().split(2)
        found = survey(model, images, "*", target=second, **quiet)
    assert_as_before(model, before)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert not found.top_by_relevance["0"].values.is_inference()
    assert torch.equal(
        found.top_by_relevance["3"].samples,
        survey(model, images_of(6).float().split(2), "3", target=second, **quiet)
        .top_by_relevance["3"]
        .samples,
    )


# What cannot be


def test_targets_that_do_not_fit_are_refused():
    model, images = small(), images_of(4).float()

    def tried(target, layers="3", **options):
        return survey(model, images.split(2), layers, target=target, **options, **quiet)

    with pytest.raises(InvalidTypeError, match="`target` must be a function or None, got 3"):
        tried(3)
    with pytest.raises(InvalidArgumentError, match="`target` has no effect with `top_k=0`"):
        tried(second, top_k=0)
    for wrong in (
        lambda output, batch: output,
        lambda output, batch: output.sum(),
        lambda output, batch: output.argmax(1),
        lambda output, batch: 1.0,
    ):
        with pytest.raises(InvalidArgumentError, match=r"`target` must make a floating-point tensor \(2,\)"):
            tried(wrong)
    with pytest.raises(
        InvalidArgumentError, match=r"`target` must make .* but it fails .*missing 1 required"
    ):
        tried(lambda output, batch, more: output[:, 0])
    with pytest.raises(InvalidArgumentError, match="no gradient leads from it to `3`: it detaches"):
        tried(lambda output, batch: output.detach()[:, 0])
    found = tried(None)
    with pytest.raises(
        InvalidArgumentError, match="no top inputs by relevance; make the survey with a `target`"
    ):
        found.grid("3", images, by="relevance")
    with pytest.raises(InvalidArgumentError, match='`by` must be "activation" or "relevance"'):
        found.patches("3", 0, images, by="importance")


class Partly(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.inner, self.outer, self.how = nn.Conv2d(2, 3, 1), nn.Conv2d(3, 2, 1), how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.how == "no_grad":
            with torch.no_grad():
                maps = self.inner(x)
        else:
            maps = checkpoint(self.inner, x, use_reentrant=False)
        return self.outer(maps).mean((2, 3))


def test_layers_that_run_without_gradients_are_refused_and_checkpointed_ones_are_not():
    images = images_of(4).float()
    torch.manual_seed(0)
    with pytest.raises(InvalidArgumentError, match=r"must run with gradients .* but `inner` runs within"):
        survey(Partly("no_grad"), images.split(2), "inner", target=second, **quiet)
    beside = survey(Partly("no_grad"), images.split(2), "outer", target=second, **quiet)
    assert beside.top_by_relevance["outer"].values[0].eq(0).all()
    model = Partly("checkpoint")
    found = survey(model, images.split(2), ["inner", "outer"], top_k=4, target=second, **quiet)
    maps = model.inner(images)
    (slope,) = torch.autograd.grad(model.outer(maps).mean((2, 3))[:, 1].sum(), maps)
    totals = (maps * slope).sum((2, 3))
    order = totals[:, 0].argsort(descending=True)
    assert found.top_by_relevance["inner"].samples[0].tolist() == order.tolist()
