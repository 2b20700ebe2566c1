"""Gradients at the pixels: of the image, of noisy copies of it, on the way to it, and with guided ReLUs.

Images are written (N, C, H, W), and may have any number of spatial axes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
import torch

from torchlens_viz.attribution.goal import Goal
from torchlens_viz.attribution.twin import Twin, fitting
from torchlens_viz.backprop.relu import gradient_within
from torchlens_viz.backprop.rules import Rectified
from torchlens_viz.errors import InvalidArgumentError
from torchlens_viz.models.state import refuse_quantized
from torchlens_viz.nested import tensors

_ROWS: Final = 16  # of a batch, where an image is shown several times


def gradient(twin: Twin, batch: torch.Tensor, goal: Goal) -> torch.Tensor:
    """Return the gradient of every image's score, (N, C, H, W) float32.

    Args:
        twin: The network.
        batch: (k * N, C, H, W), what it takes.
        goal: What is scored.

    Raises:
        InvalidArgumentError: The score does not depend on the image, as far as gradients can tell.

    Source:
        Simonyan, Vedaldi & Zisserman, "Deep Inside Convolutional Networks: Visualising Image Classification
        Models and Saliency Maps", ICLR workshop 2014.
    """
    image = batch.detach().clone().requires_grad_()
    return _taken(twin, twin.scores(image, goal), image)


def _taken(twin: Twin, scores: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    with fitting():
        taken = gradient_within(scores.sum(), image)[0] if scores.requires_grad else None
    if taken is None:
        refuse_quantized(twin.model)
        raise InvalidArgumentError(
            "no gradient leads from the score to the image: the model runs under `torch.no_grad`, or "
            'detaches, or `target` does; choose `method="ablationcam"`, which needs no gradient'
        )
    return taken.float()


def guided(twin: Twin, batch: torch.Tensor, goal: Goal) -> torch.Tensor:
    """Return the gradient with guided ReLUs, (N, C, H, W) float32; see `backprop.rules`.

    Raises:
        InvalidArgumentError: The network has no ReLU, or an activation that the rule says nothing about.
    """
    image, rule = batch.detach().clone().requires_grad_(), Rectified(twin.model, "guided", option="method")
    with rule:
        output = twin.output(image)
    for tensor in tensors(output):
        rule.check(tensor)
    if not rule.met:
        raise InvalidArgumentError(
            '`method="guided"` changes what ReLUs pass on, of which this network runs none; use "gradient"'
        )
    scores = goal.scores(output, len(batch))  # outside of the rule: a softmax of it is no part of the network
    with rule:  # because checkpointing runs parts of the network again
        return _taken(twin, scores, image)


def smoothgrad(
    twin: Twin, batch: torch.Tensor, goal: Goal, *, samples: int, noise: float, seed: int
) -> torch.Tensor:
    """Return the mean gradient of noisy copies of every image, (N, C, H, W) float32.

    Args:
        twin: The network.
        batch: (N, C, H, W), what it takes.
        goal: What is scored.
        samples: How many copies of each.
        noise: Its standard deviation, as a share of the range of the image's values.
        seed: What it follows from: copy by copy, `torch.randn(batch.shape)` of one CPU generator.

    Source:
        Smilkov et al., "SmoothGrad: removing noise by adding noise", 2017.
    """
    random = torch.Generator(device="cpu").manual_seed(seed)
    low, high = (limit(batch.flatten(1), 1) for limit in (torch.amin, torch.amax))
    spread = (noise * (high - low)).view(-1, *[1] * (batch.ndim - 1))
    total = torch.zeros_like(batch)
    for count in _portions(samples, len(batch), goal):
        drawn = torch.cat([torch.randn(batch.shape, generator=random, device="cpu") for _ in range(count)])
        noisy = torch.cat([batch] * count) + torch.cat([spread] * count) * drawn.to(batch.device)
        total += gradient(twin, noisy, goal).view(count, *batch.shape).sum(0)
    return total / samples


def integrated_gradients(twin: Twin, batch: torch.Tensor, goal: Goal, *, samples: int) -> torch.Tensor:
    """Return each value's part in how much the score differs from that of zeros, (N, C, H, W) float32.

    The parts sum to that difference, as nearly as the integral along the straight line from zeros to the
    image is told by Gauss and Legendre's points.

    Args:
        twin: The network.
        batch: (N, C, H, W), what it takes.
        goal: What is scored.
        samples: How many points on the line.

    Source:
        Sundararajan, Taly & Yan, "Axiomatic Attribution for Deep Networks", ICML 2017.
    """
    points, weights = (
        torch.from_numpy(each / 2).float().to(batch.device)
        for each in np.polynomial.legendre.leggauss(samples)
    )
    total = torch.zeros_like(batch)
    first = 0
    for count in _portions(samples, len(batch), goal):
        at, share = (each[first : first + count].view(-1, *[1] * batch.ndim) for each in (points, weights))
        between = ((at + 0.5) * batch).flatten(0, 1)
        total += (share * gradient(twin, between, goal).view(count, *batch.shape)).sum(0)
        first += count
    return total * batch


def strength(gradients: torch.Tensor) -> torch.Tensor:
    """Return the largest size of a gradient (N, C, H, W) among the channels of each pixel, (N, H, W)."""
    return gradients.abs().amax(1)


def _portions(samples: int, images: int, goal: Goal) -> Iterator[int]:
    """Yield how many copies of the batch to show at once; a function of the caller's always gets N rows."""
    each = 1 if goal.function is not None else max(1, _ROWS // images)
    for first in range(0, samples, each):
        yield min(each, samples - first)
