"""No memory grows with calls: of every public function, called again and again."""

from __future__ import annotations

import ctypes
import gc
import os
from pathlib import Path

import pytest
import torch

import torchlens_viz as tv
from tests.public import IMAGES, PUBLIC, captured, make_net
from torchlens_viz.errors import CaptureMemoryError


def trained_on(net, images, folder):
    with tv.capture(net, "*", io="both", grad=True) as acts:
        loss = net(images.clone().requires_grad_()).square().sum()
    torch.autograd.grad(loss, [call.output for name in ("0", "3") for call in acts.calls(name)])


def refused(net, images, folder):
    with pytest.raises(CaptureMemoryError, match="max_bytes"), tv.capture(net, "*", max_bytes=9):
        net(images)


def kept_in_files(net, images, folder):
    captured(net, images).save(folder / "acts.safetensors")
    dict(tv.Activations.load(folder / "acts.safetensors"))
    found = tv.survey(net, [images], ["0", "3"], top_k=2, progress=False)
    found.save(folder / "survey.safetensors")
    tv.Survey.load(folder / "survey.safetensors")


def drawn_in_files(net, images, folder):
    tv.save_kernel_sheets(net, folder)
    tv.save_feature_maps(captured(net, images), folder)
    tv.save_kernel_grid(net, folder / "k.png")


def climbed_and_kept(net, images, folder):
    tv.maximize(net, "3", [0], size=10, steps=4).save(folder / "best")
    tv.Maximization.load(folder / "best")


OTHERS = [trained_on, refused, kept_in_files, drawn_in_files, climbed_and_kept]
CALLS = 50
MOST = 6 * 2**20
_PAGE = os.sysconf("SC_PAGE_SIZE")


def live_tensors() -> int:
    return sum(issubclass(type(item), torch.Tensor) for item in gc.get_objects())


def resident_bytes() -> int:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # else what other tests gave back to the allocator would hide what is left behind
        trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE


def growth(function) -> tuple[int, int]:
    """Return how many tensors and how many bytes 50 calls leave behind, after a few to warm up.

    What an allocator comes to keep once, it does not keep again with the next 50; what leaks does.
    """
    for _ in range(5):
        function()
    gc.collect()
    # The collector comes by after so many objects, however large: what waits for it can be many gigabytes.
    gc.disable()
    try:
        for _ in range(3):
            tensors, resident = live_tensors(), resident_bytes()
            for _ in range(CALLS):
                function()
            tensors, resident = live_tensors() - tensors, resident_bytes() - resident
            if tensors or resident < MOST:
                break
        return tensors, resident
    finally:
        gc.enable()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="there is no /proc here")
@pytest.mark.parametrize("name", PUBLIC)
def test_no_memory_grows_with_calls(name):
    net = make_net()
    tensors, resident = growth(lambda: PUBLIC[name](net, IMAGES))
    assert tensors == 0
    assert resident < MOST


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="there is no /proc here")
@pytest.mark.parametrize("use", OTHERS)
def test_no_memory_grows_with_gradients_errors_and_files(use, tmp_path):
    net = make_net()
    tensors, resident = growth(lambda: use(net, IMAGES, tmp_path))
    assert tensors == 0
    assert resident < MOST


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="there is no /proc here")
def test_a_tensor_that_is_left_behind_by_each_call_would_be_noticed():
    kept = []
    tensors, resident = growth(lambda: kept.append(torch.ones(2**20)))
    assert tensors == CALLS
    assert resident >= CALLS * 2**21
