"""Running a model for its values only, and leaving it as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Run the block in eval mode without gradients.

    Afterwards every module has its own `training` flag back, and random numbers go on as if nothing had run.
    """
    flags = {module: module.training for module in model.modules()}
    devices = {parameter.get_device() for parameter in model.parameters() if parameter.is_cuda}
    for module in flags:  # `eval()` may be overridden, to merge weights for one, and could not be undone
        module.training = False
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            yield
    finally:
        for module, training in flags.items():
            module.training = training
