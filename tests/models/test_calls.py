"""Models that take more than an image: one rule for what they are called with, in every function."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from torchlens_viz import (
    capture,
    explain,
    maximize,
    overlay_grid,
    pair_grid,
    project,
    receptive_field,
    report,
    survey,
)
from torchlens_viz.errors import ArchiveError, InvalidArgumentError, InvalidTypeError
from torchlens_viz.models.calls import called_with
from torchlens_viz.models.layers import select_one

SEED = torch.Generator().manual_seed(3)


class Gated(nn.Module):
    """An image and a vector, which says how much of each channel passes (FiLM without an offset)."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.gate = nn.Identity()
        self.head = nn.Linear(4, 2)

    def forward(self, image, vector):
        maps = self.gate(self.conv(image) * vector[:, :, None, None])
        return self.head(maps.relu().mean((2, 3)))


class Twins(nn.Module):
    """Two images, of which only the second counts."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 1)
        self.second = nn.Conv2d(3, 4, 3, padding=1)
        self.last = nn.Conv2d(4, 2, 3)

    def forward(self, a, b):
        return self.last(self.second(b).relu() + 0 * self.first(a)).mean((2, 3))


class OfDict(nn.Module):
    """A dict, with the image deep in it."""

    def __init__(self, gated):
        super().__init__()
        self.gated = gated

    def forward(self, batch):
        return self.gated(batch["views"][0]["image"], batch["vector"])


@pytest.fixture
def gated():
    torch.manual_seed(0)
    return Gated().eval()


@pytest.fixture
def twins():
    torch.manual_seed(0)
    return Twins().eval()


IMAGES = torch.rand(2, 3, 8, 8, generator=SEED)
OTHER = torch.rand(1, 3, 8, 8, generator=SEED)
ONLY_2 = torch.tensor([[0.0, 0.0, 1.0, 0.0]])

FORMS = {
    "by position": (None, ONLY_2),
    "by name": {"image": None, "vector": ONLY_2},
    "function to positions": lambda images: (images, ONLY_2.expand(len(images), -1)),
    "function to names": lambda images: {"vector": ONLY_2.expand(len(images), -1), "image": images},
}


@pytest.mark.parametrize("inputs", FORMS.values(), ids=FORMS)
def test_a_vector_picks_the_channel_that_can_be_maximised(gated, inputs):
    result = maximize(gated, "gate", [0, 2, 2], size=8, steps=6, inputs=inputs, progress=False)
    assert result.status == ("dead", "steps", "steps")
    with torch.no_grad(), capture(gated, "gate") as acts:
        gated(result.images, ONLY_2.expand(3, -1))
    by_hand = acts["gate"].mean((2, 3))
    torch.testing.assert_close(result.means, by_hand)
    torch.testing.assert_close(result.scores, by_hand[[0, 1, 2], [0, 2, 2]])


def test_the_ascent_is_that_of_the_image_alone(gated):
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.gated = gated

        def forward(self, image):
            return self.gated(image, 2 * ONLY_2.expand(len(image), -1))

    options = {"size": 8, "steps": 4, "progress": False}
    ours = maximize(gated, "gate", 2, inputs=(None, 2 * ONLY_2), **options)
    fixed = maximize(Fixed(), "gated.gate", 2, **options)
    assert torch.equal(ours.images, fixed.images)
    assert torch.equal(ours.history, fixed.history)


@pytest.mark.parametrize("inputs", FORMS.values(), ids=FORMS)
def test_explain_takes_gradients_as_by_hand(gated, inputs):
    found = explain(gated, IMAGES, 1, method="gradient", inputs=inputs)
    leaf = IMAGES.clone().requires_grad_()
    scores = gated(leaf, ONLY_2.expand(2, -1))[:, 1]
    (gradient,) = torch.autograd.grad(scores.sum(), leaf)
    torch.testing.assert_close(found.scores, scores.detach())
    torch.testing.assert_close(found.heatmaps, gradient.abs().amax(1))


@pytest.mark.parametrize(
    "method", ["gradcam", "layercam", "ablationcam", "smoothgrad", "integrated_gradients"]
)
def test_explain_gives_each_image_its_own_row(gated, method):
    vectors = torch.tensor([[0.0, 0.0, 1.0, 0.0], [3.0, 0.0, 0.0, 1.0]])
    both = explain(gated, IMAGES, 1, method=method, inputs=(None, vectors))
    torch.testing.assert_close(both.scores, gated(IMAGES, vectors)[:, 1].detach())
    assert both.trust.blurred.shape == (2,)
    for place in range(2):
        alone = explain(gated, IMAGES[place], 1, method=method, inputs=(None, vectors[place : place + 1]))
        torch.testing.assert_close(alone.scores, both.scores[place : place + 1])
        if method != "smoothgrad":  # its noise is drawn for the batch
            torch.testing.assert_close(alone.heatmaps, both.heatmaps[place : place + 1])


def test_of_two_images_the_one_that_is_asked_for_is_explained(twins):
    second = explain(twins, IMAGES, 0, method="gradient", inputs=(OTHER, None))
    assert (second.heatmaps.flatten(1).amax(1) > 0).all()
    first = explain(twins, IMAGES, 0, method="gradient", inputs=(None, OTHER))
    assert (first.heatmaps == 0).all()
    assert first.notes == ("nothing here speaks for the target in image 0, 1",)
    torch.testing.assert_close(second.scores, twins(OTHER.expand(2, -1, -1, -1), IMAGES)[:, 0].detach())
    torch.testing.assert_close(first.scores, twins(IMAGES, OTHER.expand(2, -1, -1, -1))[:, 0].detach())


def test_of_two_images_the_one_that_counts_is_maximised(twins):
    result = maximize(twins, "last", 0, size=8, steps=5, inputs=(OTHER, None), progress=False)
    assert result.status == ("steps",)
    assert result.history[0, -1] > result.history[0, 0]
    dead = maximize(twins, "last", 0, size=8, steps=5, inputs=(None, OTHER), progress=False)
    assert dead.status == ("dead",)


def test_project_goes_back_to_the_image_alone(gated):
    found = project(
        gated,
        "gate",
        IMAGES[0],
        [0, 2],
        rule="gradient",
        position=(3, 4),
        inputs={"vector": ONLY_2, "image": None},
    )
    leaf = IMAGES[:1].clone().requires_grad_()
    with capture(gated, "gate", grad=True) as acts:
        gated(leaf, ONLY_2)
    (gradient,) = torch.autograd.grad(acts["gate"][0, 2, 3, 4], leaf)
    torch.testing.assert_close(found.images[1], gradient[0])
    assert (found.images[0] == 0).all()
    assert found.regions == ((slice(2, 5), slice(3, 6)),) * 2


def test_overlays_and_pairs_are_those_of_the_model_with_the_vector_in_it(gated, twins):
    class Fixed(nn.Sequential):
        def forward(self, image):
            return self[0](image, ONLY_2)

    fixed = Fixed(gated)
    for draw in (overlay_grid, pair_grid):
        ours = draw(gated, "conv", IMAGES[0], inputs=(None, ONLY_2))
        assert ours.tobytes() == draw(fixed, "0.conv", IMAGES[0]).tobytes()
    shown = overlay_grid(gated, "gate", IMAGES[0], inputs=(None, ONLY_2))
    assert shown.tobytes() == overlay_grid(fixed, "0.gate", IMAGES[0]).tobytes()
    assert shown.tobytes() != overlay_grid(gated, "gate", IMAGES[0], inputs=(None, 1 - ONLY_2)).tobytes()


def test_a_receptive_field_is_that_in_the_image_that_is_asked_for(twins):
    assert receptive_field(twins, "last", (1, 3, 8, 8), inputs=(OTHER, None)).size == (5, 5)
    with pytest.raises(InvalidArgumentError, match="`second` does not depend on the image"):
        receptive_field(twins, "second", (1, 3, 8, 8), inputs=(None, OTHER))


def test_a_mapping_that_is_the_only_argument(gated):
    model = OfDict(gated)
    inputs = ({"vector": ONLY_2, "views": [{"image": None}]},)
    found = explain(model, IMAGES, 1, method="gradcam", layer="gated.conv", inputs=inputs)
    expected = explain(gated, IMAGES, 1, method="gradcam", layer="conv", inputs=(None, ONLY_2))
    assert torch.equal(found.heatmaps, expected.heatmaps)
    result = maximize(model, "gated.gate", 2, size=8, steps=2, inputs=inputs, progress=False)
    assert torch.equal(
        result.images,
        maximize(gated, "gate", 2, size=8, steps=2, inputs=(None, ONLY_2), progress=False).images,
    )


class TestSurvey:
    def test_one_vector_for_all(self, gated):
        found = survey(gated, IMAGES.split(1), "gate", inputs=(None, ONLY_2), progress=False)
        with torch.no_grad(), capture(gated, "gate") as acts:
            gated(IMAGES, ONLY_2.expand(2, -1))
        expected = acts["gate"].double().movedim(1, 0).flatten(1)
        torch.testing.assert_close(found.stats["gate"].mean, expected.mean(1))
        assert found.dead("gate").tolist() == [0, 1, 3]
        assert found.input_shape == (3, 8, 8)

    def test_a_vector_beside_each_image(self, gated):
        vectors = torch.tensor([[0.0, 0.0, 1.0, 0.0], [3.0, 0.0, 0.0, 1.0]])
        batches = [{"vector": vectors, "image": IMAGES}]
        found = survey(gated, batches, "gate", input_of=dict, progress=False)
        with torch.no_grad(), capture(gated, "gate") as acts:
            gated(IMAGES, vectors)
        expected = acts["gate"].double().movedim(1, 0).flatten(1)
        torch.testing.assert_close(found.stats["gate"].max, expected.amax(1))
        assert found.input_shape == (3, 8, 8)
        patch = found.patches("gate", 2, IMAGES)[0]
        row, column = found.top["gate"].positions[2, 0].tolist()
        assert patch.box == (
            slice(max(row - 1, 0), min(row + 2, 8)),
            slice(max(column - 1, 0), min(column + 2, 8)),
        )
        (at,) = found.top["gate"].samples[2, :1].tolist()
        assert torch.equal(patch.values, IMAGES[at][:, *patch.box])

    def test_effects_and_relevance_see_what_the_model_does(self, gated):
        inputs = (None, ONLY_2)
        labels = torch.tensor([0, 1])
        found = survey(gated, [(IMAGES, labels)], "gate", inputs=inputs, loss="cross_entropy", progress=False)
        with torch.no_grad(), capture(gated, "gate") as acts:
            gated(IMAGES, ONLY_2.expand(2, -1))
        gate = acts["gate"].clone().requires_grad_()
        scores = gated.head(gate.relu().mean((2, 3)))
        (slope,) = torch.autograd.grad(nn.functional.cross_entropy(scores, labels), gate)
        torch.testing.assert_close(found.effects["gate"].float(), -(slope * gate).sum((0, 2, 3)).detach())
        weighed = survey(
            gated, [IMAGES], "gate", inputs=inputs, target=lambda output, batch: output[:, 1], progress=False
        )
        assert (weighed.top_by_relevance["gate"].values[[0, 1, 3]] == 0).all()

    def test_a_list_of_images(self):
        net = nn.Sequential(nn.Conv2d(3, 2, 3))

        class OfList(nn.Module):
            def __init__(self):
                super().__init__()
                self.net = net

            def forward(self, images):
                assert isinstance(images, list)
                return self.net(torch.stack(images))

        batches = [(list(IMAGES), ["a", "b"]), (list(IMAGES + 1), ["c", "d"])]
        found = survey(OfList(), batches, "net.0", input_of=lambda batch: list(batch[0]), progress=False)
        assert (found.samples_seen, found.input_shape) == (4, (3, 8, 8))
        plain = survey(net, [IMAGES, IMAGES + 1], "0", progress=False)
        assert torch.equal(found.top["net.0"].values, plain.top["0"].values)
        assert torch.equal(found.top["net.0"].samples, plain.top["0"].samples)
        (patch,) = found.patches("net.0", 0, [*IMAGES, *(IMAGES + 1)])[:1]
        assert torch.equal(patch.values, plain.patches("0", 0, torch.cat([IMAGES, IMAGES + 1]))[0].values)


def test_a_report_of_a_model_that_takes_a_vector(gated, tmp_path):
    page = report(gated, IMAGES, tmp_path / "page.html", inputs=(None, ONLY_2)).read_text("utf-8")
    assert "<title>Gated" in page
    assert "OnImages" not in page


def test_a_checkpoint_is_refused_for_other_inputs(gated, tmp_path):
    def run(inputs):
        return maximize(
            gated, "gate", [2], size=8, steps=2, inputs=inputs, checkpoint=tmp_path, progress=False
        )

    first = run((None, ONLY_2))
    assert torch.equal(run((None, ONLY_2.clone())).images, first.images)
    with pytest.raises(ArchiveError, match="inputs"):
        run((None, 2 * ONLY_2))
    with pytest.raises(ArchiveError, match="inputs"):
        run({"image": None, "vector": ONLY_2})


def test_wrapped_and_half_models(gated):
    half = Gated().half().eval()
    half.load_state_dict(gated.state_dict())
    found = explain(half, IMAGES, 1, method="gradient", inputs=(None, ONLY_2.half()))
    exact = explain(half.float(), IMAGES, 1, method="gradient", inputs=(None, ONLY_2))
    assert torch.equal(found.heatmaps, exact.heatmaps)
    assert overlay_grid(half.half(), "gate", IMAGES[0], inputs=(None, ONLY_2)).mode == "RGB"
    parallel = nn.DataParallel(gated)
    compiled = torch.compile(gated, backend="eager")
    plain = maximize(gated, "gate", 2, size=8, steps=2, inputs=(None, ONLY_2), progress=False)
    for model in (parallel, compiled):
        made = maximize(model, "gate", 2, size=8, steps=2, inputs=(None, ONLY_2), progress=False)
        assert torch.equal(made.images, plain.images)
    notes = explain(compiled, IMAGES, 1, inputs=(None, ONLY_2)).notes
    assert "the model ran eagerly, not as it was compiled" in notes
    assert (
        "the model ran eagerly, not as it was compiled"
        not in explain(gated, IMAGES, 1, inputs=(None, ONLY_2)).notes
    )


def test_nothing_of_the_callers_changes(gated):
    class Writing(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, image, vector, number):
            vector.add_(1)
            number.mul_(2)
            return self.conv(image).mean((2, 3)) * vector * number

    vector, number = torch.ones(1, 4, requires_grad=True), torch.tensor(2.0)
    explain(Writing(), IMAGES, 1, method="gradient", inputs=(None, vector, number))
    maximize(Writing(), "conv", 1, size=8, steps=1, inputs=(None, vector, number), progress=False)
    assert torch.equal(vector, torch.ones(1, 4))
    assert (number, vector.grad) == (2, None)
    gated.train()
    explain(gated, IMAGES, 1, inputs=(None, ONLY_2))
    assert gated.training
    assert gated.conv.training


def test_what_is_no_tensor_reaches_the_model_as_it_is():
    seen = []

    class Asking(nn.Module):
        def forward(self, image, mode, *, scale, flags):
            seen.append((mode, scale, flags))
            return image.mean((2, 3)) * scale

    called = called_with(Asking(), lambda images: {"image": images, "mode": "m", "scale": 3, "flags": [True]})
    torch.testing.assert_close(called(IMAGES), 3 * IMAGES.mean((2, 3)))
    called = called_with(Asking(), {"image": None, "mode": "m", "scale": torch.tensor(3), "flags": [True]})
    torch.testing.assert_close(called(IMAGES), 3 * IMAGES.mean((2, 3)))
    assert seen == [("m", 3, [True])] * 2
    assert select_one(called, "").module is called.module
    assert called_with(called.module, None) is called.module


REFUSED = [
    ((ONLY_2,), InvalidArgumentError, "None in one place, where the images go, got 0"),
    ((None, None), InvalidArgumentError, "got 2 such places.*pass a function"),
    ((None, torch.ones(3, 4)), InvalidArgumentError, r"one row for all images.*\(3, 4\).*function"),
    ((None, torch.ones(0, 4)), InvalidArgumentError, r"got shape \(0, 4\)"),
    ([None, ONLY_2], InvalidTypeError, "tuple or a mapping.*or a function"),
    ("image", InvalidTypeError, "tuple or a mapping"),
    (ONLY_2, InvalidTypeError, "tuple or a mapping"),
]


@pytest.mark.parametrize(("inputs", "kind", "match"), REFUSED)
def test_what_cannot_be_known_is_refused(gated, inputs, kind, match):
    with pytest.raises(kind, match=f"`inputs`.*{match}"):
        maximize(gated, "gate", 0, size=8, inputs=inputs)
    with pytest.raises(kind, match=f"`inputs`.*{match}"):
        survey(gated, [IMAGES], "gate", inputs=inputs)


def test_a_model_that_takes_more_is_told_where_it_goes(gated):
    asks = [
        lambda: maximize(gated, "gate", size=8),
        lambda: explain(gated, IMAGES),
        lambda: project(gated, "gate", IMAGES[0]),
        lambda: overlay_grid(gated, "gate", IMAGES[0]),
        lambda: pair_grid(gated, "conv", IMAGES[0]),
        lambda: receptive_field(gated, "gate", (1, 3, 8, 8)),
        lambda: survey(gated, [IMAGES], "gate"),
        lambda: report(gated, IMAGES, "page.html"),
    ]
    for ask in asks:
        with pytest.raises(
            InvalidArgumentError, match=r"missing 1 required positional argument.*inputs|inputs.*missing"
        ):
            ask()


@pytest.mark.slow
def test_a_detector_takes_its_images_as_a_list():
    torch.manual_seed(0)
    net = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=96
    ).eval()
    images = torch.rand(2, 3, 64, 64, generator=SEED)
    layer = "backbone.body.4.block.0.0"
    found = explain(
        net, images, lambda output: torch.stack([each["scores"].sum() for each in output]),
        method="gradcam", layer=layer, inputs=list,
    )  # fmt: skip
    with torch.no_grad():
        by_hand = torch.stack([each["scores"].sum() for each in net(list(images))])
    torch.testing.assert_close(found.scores, by_hand)
    result = maximize(net, layer, [1, 5], size=64, steps=2, inputs=list, progress=False)
    with torch.no_grad(), capture(net, layer) as acts:
        net(list(result.images))
    torch.testing.assert_close(result.means, acts[layer].mean((2, 3)))
    seen = survey(net, [list(images)], layer, input_of=list, progress=False)
    with torch.no_grad(), capture(net, layer) as acts:
        net(list(images))
    torch.testing.assert_close(seen.stats[layer].max.float(), acts[layer].movedim(1, 0).flatten(1).amax(1))
    assert seen.samples_seen == 2


def test_a_model_of_transformers_takes_pixel_values_by_name():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config={
            "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "vocab_size": 20, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0,
        },
        vision_config={
            "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 16, "patch_size": 4,
        },
        projection_dim=8,
    )  # fmt: skip
    net = transformers.CLIPModel(config).eval()
    images = torch.rand(2, 3, 16, 16, generator=SEED)
    tokens = torch.tensor([[1, 5, 2]])
    inputs = {"input_ids": tokens, "pixel_values": None}

    def likeness(output):
        return output.logits_per_image[:, 0]

    found = explain(net, images, likeness, method="gradient", inputs=inputs)
    leaf = images.clone().requires_grad_()
    scores = net(input_ids=tokens, pixel_values=leaf).logits_per_image[:, 0]
    (gradient,) = torch.autograd.grad(scores.sum(), leaf)
    torch.testing.assert_close(found.scores, scores.detach())
    torch.testing.assert_close(found.heatmaps, gradient.abs().amax(1))
    layer = "vision_model.encoder.layers.0.mlp.fc1"
    result = maximize(net, layer, [3], size=16, steps=2, inputs=inputs, progress=False)
    with torch.no_grad(), capture(net, layer) as acts:
        net(input_ids=tokens, pixel_values=result.images)
    torch.testing.assert_close(result.means, acts[layer].mean(1))
