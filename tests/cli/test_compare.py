"""`torchlens-viz compare` prints where two models begin to differ, and says so by its exit code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from torchlens_viz.zoo.load import load_model


@pytest.fixture
def weights(folder):
    """Weights of the tiny network, with a fault in one channel of the second convolution."""
    state = load_model("tiny_net:Net").model.state_dict()
    torch.save(state, "right.pth")
    state["second.bias"][3] += 1
    torch.save(state, "wrong.pth")
    return folder


def test_the_same_model_has_no_difference(weights, run):
    code, out, err = run("compare", "tiny_net:Net", "tiny_net:Net", "photo.png")
    assert code == 0
    assert out[0] == "Comparison of 6 layers on 1 input: none beyond the tolerance"
    assert len(err) == 2


def test_a_fault_is_found_and_drawn(weights, run):
    code, out, _ = run(
        *("compare", "tiny_net:Net", "tiny_net:Net", "photo.png", "photo.png", "-o", "new/first.png"),
        *("--weights-a", "right.pth", "--weights-b", "wrong.pth"),
    )
    assert code == 1
    assert out[0].endswith("4 beyond the tolerance, the first is `second`")
    assert out[-1] == str(weights / "new" / "first.png")
    with Image.open(Path("new/first.png")) as picture:
        assert picture.width > 3 * 56


def test_options_reach_the_comparison(weights, run):
    fault = ("--weights-a", "right.pth", "--weights-b", "wrong.pth")
    command = ("compare", "tiny_net:Net", "tiny_net:Net", "photo.png", *fault)
    assert run(*command, "--atol", "10")[0] == 0
    assert run(*command, "--layer", "first", "--rtol", "0")[0] == 0
    assert run(*command, "--match", "order")[0] == 1
    code, out, _ = run(*command, "--isolate")
    assert (code, out[0].split(": ")[1]) == (1, "1 beyond the tolerance, the first is `second`")


def test_models_that_take_other_pictures_are_refused_in_one_line(folder, run):
    code, out, err = run("compare", "tiny_net:Net", "tiny_net:four", "photo.png", "--match", "order")
    assert (code, out) == (2, [])
    assert len(err) == 1
    assert "what the preprocessing of tiny_net:Net makes" in err[0]
    code, _, err = run("compare", "tiny_net:Net", "tiny_net:Net", "photo.png", "--match", "place")
    assert (code, err) == (
        2,
        ['torchlens-viz: error: `match` must be "name" or "order", got \'place\''],
    )
