"""`Explanation`: how it is drawn, told and kept."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import torch
from torch import nn

from torchlens_viz import Explanation, explain
from torchlens_viz.attribution.trust import shares, verdict
from torchlens_viz.errors import InvalidArgumentError, PictureError


@pytest.fixture
def found() -> Explanation:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 48, 3))
    return explain(net, torch.rand(2, 3, 6, 8), [0, 2], method="hirescam")


def test_a_row_for_each_image_shows_it_its_heatmap_and_both(found):
    sheet = np.asarray(found.grid(upscale=2, labels=False, legend=False)).astype(int)
    assert sheet.shape == (2 * 13 + 1, 3 * 17 + 1, 3)
    for row in (0, 1):
        tiles = [
            sheet[1 + 13 * row : 13 + 13 * row, 1 + 17 * column : 17 + 17 * column] for column in range(3)
        ]
        expected = (found.images[row] * 255).round().repeat_interleave(2, 1).repeat_interleave(2, 2)
        assert (tiles[0] == expected.permute(1, 2, 0).numpy()).all()
        hottest = np.unravel_index(int(found.heatmaps[row].argmax()), (6, 8))
        brightness = tiles[1].sum(2)[::2, ::2]
        assert brightness[hottest] == brightness.max() == 3 * 255  # the white end of "hot"
        assert brightness[found.heatmaps[row].numpy() == 0].tolist() == [brightness.min()] * int(
            (found.heatmaps[row] == 0).sum()
        )
        hot = (found.heatmaps[row] > 0).float()[None]  # and what is beside it, as far as it is interpolated
        cold = (
            (nn.functional.max_pool2d(hot, 3, 1, 1)[0] == 0).repeat_interleave(2, 0).repeat_interleave(2, 1)
        )
        over = np.asarray(found.overlay(row, upscale=2)).astype(int)
        assert (tiles[2] == over).all()
        assert (np.abs(over - tiles[0])[cold.numpy()] <= 1).all()  # what is zero hides nothing


def test_negative_values_are_blue_and_zero_is_clear():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 1, bias=False))
    net[1].weight.data = torch.tensor([[1.0, -1.0, 0.0, 0.0]])
    found = explain(net, torch.ones(1, 1, 2, 2), 0, method="integrated_gradients")
    assert found.heatmaps[0].flatten().tolist() == pytest.approx([1.0, -1.0, 0.0, 0.0])
    heat = np.asarray(found.grid(upscale=1, labels=False, legend=False))[1:3, 4:6].astype(int)
    assert heat[0, 0, 0] > heat[0, 0, 2]  # red
    assert heat[0, 1, 0] < heat[0, 1, 2]  # blue
    assert heat[1].tolist() == [[255, 255, 255]] * 2


def test_labels_name_what_was_explained_with_its_score(found):
    assert (found.label(0), found.label(1)) == ("target 0", "target 2")
    assert found.label(1, ["cat", "dog", "owl"]) == "owl"
    assert found.label(1, ["cat"]) == "target 2"
    assert found.grid(labels=list("abcdef")).height == found.grid().height
    assert found.grid(labels=list("abcdef")).width <= found.grid().width  # a cell is as wide as its label
    with pytest.raises(InvalidArgumentError, match="`labels` must be 6 strings"):
        found.grid(labels=["a"])


def test_the_legend_says_how_it_was_made_and_trust_once_it_is_known(found):
    assert found.legend() == ["hirescam at 1"]
    trust = found.trust
    assert trust is found.trust
    assert len(found.legend()) == 5
    score, blurred = found.scores[0].item(), trust.blurred[0].item()
    assert found.legend()[1] == f"0: {shares(trust.kept[0].item(), trust.lost[0].item(), score, blurred)}"


@pytest.mark.parametrize(
    ("kept", "lost", "score", "blurred", "words"),
    [
        (0.8, 0.4, 5.0, 1.0, "the hottest fifth alone keeps 80% of the score, hiding it costs 40%"),
        (0.8, 0.4, -1.0, -5.0, "the hottest fifth alone keeps 80% of the score, hiding it costs 40%"),
        (25.0, -3.0, 5.0, 4.9, "all of the image blurred scores nearly as much, 4.9"),
        (0.8, 0.4, 5.0, 7.25, "all of the image blurred scores more, 7.25"),
        (float("nan"), 0.4, 5.0, 5.0, "what the score keeps of the hottest fifth cannot be told"),
    ],
)
def test_what_the_score_keeps_is_told_where_it_means_anything(kept, lost, score, blurred, words):
    assert shares(kept, lost, score, blurred).startswith(words)


@pytest.mark.parametrize(
    ("like", "words"),
    [
        (0.99, "much the same (rank correlation 0.99): it tells little of what was learnt"),
        (-0.5, "partly the same (rank correlation -0.50)"),
        (0.1, "different (rank correlation 0.10), as it should"),
        (float("nan"), "cannot be told"),
    ],
)
def test_a_rank_correlation_is_told_in_words(like, words):
    assert verdict(like).endswith(words)


def test_a_heatmap_of_zeros_can_be_drawn():
    net = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.Flatten(), nn.Linear(4, 1, bias=False))
    nn.init.zeros_(net[2].weight)
    found = explain(net, torch.rand(1, 2, 2), 0, method="hirescam", layer="0")
    picture = np.asarray(found.overlay(upscale=1))
    expected = (found.images[0] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    assert (np.abs(picture.astype(int) - expected) <= 1).all()
    assert found.grid().mode == "RGB"


def test_what_is_saved_can_be_read_by_anybody(found, tmp_path):
    assert found.save(tmp_path / "new" / "folder", names=["cat", "dog", "owl"]) == tmp_path / "new" / "folder"
    folder = tmp_path / "new" / "folder"
    assert sorted(path.name for path in folder.iterdir()) == [
        *("0.png", "1.png", "explanation.npz", "grid.png", "scores.csv"),
    ]
    with np.load(folder / "explanation.npz") as arrays:
        assert (arrays["heatmaps"] == found.heatmaps.numpy()).all()
        assert arrays["targets"].tolist() == [0, 2]
    rows = list(csv.reader((folder / "scores.csv").read_text("utf-8").splitlines()))
    assert rows[0] == ["image", "target", "score"]
    assert [row[:2] for row in rows[1:]] == [["0", "cat"], ["1", "owl"]]
    assert [float(row[2]) for row in rows[1:]] == pytest.approx(found.scores.tolist())
    _ = found.trust
    found.save(folder)
    rows = list(csv.reader((folder / "scores.csv").read_text("utf-8").splitlines()))
    assert rows[0] == ["image", "target", "score", "kept", "lost", "rank_correlation"]
    assert float(rows[2][3]) == pytest.approx(found.trust.kept[1].item(), nan_ok=True)


def test_it_shows_itself(found):
    assert repr(found).splitlines()[0] == "Explanation by hirescam at 1, heatmaps (2, 6, 8)"
    assert repr(found).splitlines()[3].split() == ["target", "2", f"{found.scores[1].item():.5g}"]
    assert found._repr_png_().startswith(b"\x89PNG")


def test_what_cannot_be_drawn_is_refused(found, tmp_path):
    with pytest.raises(InvalidArgumentError, match="`index` must be at most 1, got 2"):
        found.overlay(2)
    with pytest.raises(InvalidArgumentError, match="`alpha` must be at most 1"):
        found.overlay(alpha=1.5)
    with pytest.raises(InvalidArgumentError, match="the sheet would have"):
        found.grid(upscale=5000)
    (tmp_path / "file").write_text("")
    with pytest.raises(PictureError, match="cannot write"):
        found.save(tmp_path / "file")
