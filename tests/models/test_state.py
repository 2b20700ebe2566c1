"""Whatever is done with a model: its flags and the random numbers are given back as they were."""

from __future__ import annotations

import torch

from tests.nets import Noisy, mixed_model
from torchlens_viz.models.state import inference


def test_inference_leaves_every_flag_and_the_random_numbers():
    model = mixed_model(Noisy())
    flags, state = [module.training for module in model.modules()], torch.get_rng_state()
    with inference(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        torch.rand(3)
    assert [module.training for module in model.modules()] == flags
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)
