"""How far a heatmap can be trusted: what the score loses without it, and whether it shows what was learnt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from typing import Final, final

import torch
from torch import nn

from torchlens_viz.attribution.goal import Goal
from torchlens_viz.attribution.layers import above
from torchlens_viz.attribution.twin import Twin
from torchlens_viz.errors import InvalidArgumentError

_SHARE: Final = 0.2
_BLUR: Final = 0.05  # its standard deviation, of the shorter side: about what a detail of an object is
_SEED: Final = 0
_ALIKE: Final = 0.7  # a rank correlation, from where on a heatmap tells little
_PARTLY: Final = 0.4
_DETAILS: Final = 0.1  # of the score, below which shares of what they add to it say nothing


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Trust:
    """Three figures beside each heatmap; where one cannot be told, it is NaN.

    All are about scores between that of the image and that of the image blurred as a whole, in which no
    detail is left. A heatmap that ranks pixels at random has the area's share of both the first two, 0.2.

    Attributes:
        kept: (N,) float32, the part of the score that is left where only the hottest fifth of the pixels is
            sharp: 1 is all of it. Higher is better.
        lost: (N,) float32, the part that is lost where the hottest fifth is blurred. Higher is better.
        rank_correlation: (N,) float32 in [-1, 1], Spearman's, of the heatmap with the one that the same
            method makes of the same network with random weights in the layer and in all above it. Lower is
            better: a heatmap that stays the same does not show what the network has learnt there.
        blurred: (N,) float32, the score of the blurred image.

    Source:
        Adebayo et al., "Sanity Checks for Saliency Maps", NeurIPS 2018, for the last one; Petsiuk et al.,
        "RISE", BMVC 2018, for deletion, and insertion into a blurred image.
    """

    kept: torch.Tensor
    lost: torch.Tensor
    rank_correlation: torch.Tensor
    blurred: torch.Tensor


def measure(
    twin: Twin,
    batch: torch.Tensor,
    goal: Goal,
    heatmaps: torch.Tensor,
    scores: torch.Tensor,
    *,
    explain_again: Callable[[Twin], torch.Tensor],
    layer: str | None,
) -> Trust:
    """Find how far heatmaps can be trusted.

    Args:
        twin: The network.
        batch: (N, C, H, W), what it takes.
        goal: What was scored.
        heatmaps: (N, ...).
        scores: (N,), those of the batch.
        explain_again: Makes the heatmaps of another network.
        layer: The lowest layer that gets random weights; None is all of the network.
    """
    with twin.running():
        hot = hottest(heatmaps, _SHARE)[:, None].to(batch.device)
        blurred = blur(batch)
        shown, hidden, without = (
            _scored(twin, images, goal)
            for images in (torch.where(hot, batch, blurred), torch.where(hot, blurred, batch), blurred)
        )
        other = redrawn(twin, batch, layer, _SEED)
        try:
            random = explain_again(other)
        except InvalidArgumentError:  # `target` may find nothing in what random weights make
            random = torch.full_like(heatmaps, torch.nan)
    span = scores - without
    span = torch.where(span == 0, torch.nan, span)
    return Trust(
        kept=(shown - without) / span,
        lost=(scores - hidden) / span,
        rank_correlation=rank_correlation(heatmaps, random),
        blurred=without,
    )


def hottest(heatmaps: torch.Tensor, share: float) -> torch.Tensor:
    """Return where the hottest pixels of each heatmap are, (N, H, W) bool.

    Args:
        heatmaps: (N, H, W).
        share: Of all pixels. There are fewer where the rest has one and the same, least value; of others that
            are equal, those above and to the left come first.
    """
    flat = heatmaps.flatten(1).nan_to_num(0.0)
    count = ceil(share * flat.shape[1])
    order = flat.sort(dim=1, descending=True, stable=True).indices[:, :count]
    chosen = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, order, True)
    return (chosen & (flat > flat.amin(1, keepdim=True))).view(heatmaps.shape)


def blur(batch: torch.Tensor) -> torch.Tensor:
    """Return images (N, C, ...) blurred by a Gaussian that leaves no detail; it stops at the border."""
    spread = max(1.0, _BLUR * min(batch.shape[2:]))
    for axis, size in enumerate(batch.shape[2:], 2):
        batch = torch.tensordot(batch, _smoothing(size, spread, batch), ([axis], [1])).movedim(-1, axis)
    return batch


def _smoothing(size: int, spread: float, like: torch.Tensor) -> torch.Tensor:
    places = torch.arange(size, device=like.device, dtype=like.dtype)
    weights = torch.exp(-((places[:, None] - places) ** 2) / (2 * spread**2))
    return weights / weights.sum(1, keepdim=True)


def rank_correlation(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return Spearman's rank correlation of heatmaps (N, H, W) with others, (N,) float32.

    Equal values share the mean of their ranks. NaN where one is the same everywhere, or not finite.
    """
    found = []
    for left, right in zip(one, other, strict=True):
        if not bool(left.isfinite().all() & right.isfinite().all()):
            found.append(torch.nan)
            continue
        ranks = [_ranks(each.flatten()) for each in (left, right)]
        first, second = (each - each.mean() for each in ranks)
        scale = float((first.square().sum() * second.square().sum()).sqrt())
        found.append(float((first * second).sum()) / scale if scale > 0 else torch.nan)
    return torch.tensor(found, device="cpu")


def _ranks(values: torch.Tensor) -> torch.Tensor:
    _, place, count = torch.unique(values, return_inverse=True, return_counts=True)
    last = count.cumsum(0).double()
    ranks: torch.Tensor = last - (count.double() - 1) / 2
    return ranks[place]


def redrawn(twin: Twin, batch: torch.Tensor, layer: str | None, seed: int) -> Twin:
    """Return a copy of a network in which a layer and all above it have random weights.

    Each tensor of them is drawn anew from a normal distribution of its own mean and deviation, so that
    values stay about as large as they were. What does not vary, such as a scale of ones, stays, and so do the
    statistics of batch normalisation.

    Args:
        twin: The network.
        batch: What it takes.
        layer: The lowest layer to draw anew; None draws all.
        seed: What the numbers follow from.
    """
    other = twin.again()
    modules = set(other.model.modules()) if layer is None else above(other, batch, layer)
    random = torch.Generator(device="cpu").manual_seed(seed)
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in other.model.modules():  # in their own order, which a set has not
        for name, weight in module._parameters.items():
            if weight is None or module not in modules or not weight.is_floating_point():
                continue
            if weight not in made:  # a key, since TorchScript makes a new object whenever it is asked for one
                made[weight] = nn.Parameter(_drawn(weight.detach(), random), requires_grad=False)
            setattr(module, name, made[weight])
    return other


def _drawn(weight: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    noise = torch.randn(weight.shape, generator=random, device="cpu").to(weight.device, weight.dtype)
    spread = weight.std(correction=0) if weight.numel() > 1 else weight.abs().sum()
    return weight.mean() + spread * noise


def _scored(twin: Twin, images: torch.Tensor, goal: Goal) -> torch.Tensor:
    try:
        with torch.no_grad():
            return twin.scores(images, goal).float().cpu()
    except InvalidArgumentError:  # `target` may find nothing in a blurred image
        return torch.full((len(images),), torch.nan, device="cpu")


def shares(kept: float, lost: float, score: float, blurred: float) -> str:
    """Return what the score keeps of a heatmap and loses without it, as far as that means anything.

    Args:
        kept: As in `Trust`.
        lost: As in `Trust`.
        score: That of the image.
        blurred: That of the image blurred as a whole.
    """
    if kept != kept or lost != lost:
        return "what the score keeps of the hottest fifth cannot be told"
    if score < blurred:
        return f"all of the image blurred scores more, {blurred:.3g}: its details speak against the target"
    if score - blurred < _DETAILS * max(abs(score), abs(blurred)):
        return f"all of the image blurred scores nearly as much, {blurred:.3g}: its details count for little"
    return f"the hottest fifth alone keeps {kept:.0%} of the score, hiding it costs {lost:.0%}"


def verdict(like: float) -> str:
    """Return what it means how alike a heatmap is to that of the same network with random weights.

    Args:
        like: Their rank correlation, from -1 to 1.
    """
    if like != like:
        return "whether random weights would make it look alike cannot be told"
    told = f"(rank correlation {like:.2f})"
    if abs(like) >= _ALIKE:
        return f"with random weights it looks much the same {told}: it tells little of what was learnt"
    if abs(like) >= _PARTLY:
        return f"with random weights it looks partly the same {told}"
    return f"with random weights it looks different {told}, as it should"
