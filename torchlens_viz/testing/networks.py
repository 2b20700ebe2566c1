"""Whether two networks do the same, layer by layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from torchlens_viz.comparison.compare import compare
from torchlens_viz.comparison.matching import Match
from torchlens_viz.comparison.result import Comparison, LayerDifference
from torchlens_viz.models.inputs import InputOf
from torchlens_viz.models.layers import Selector
from torchlens_viz.testing.messages import share, some


def assert_same_activations(
    a: nn.Module | torch.export.ExportedProgram,
    b: nn.Module | torch.export.ExportedProgram,
    inputs: Any,
    layers: Selector | None = None,
    *,
    rtol: float | None = None,
    atol: float = 1e-8,
    match: Match = "name",
    input_of: InputOf = None,
    channel_dim: int | None = None,
    msg: str | None = None,
) -> None:
    """Assert that two networks put out the same in every layer, within a tolerance.

    The message names the first layer that differs, and in it the worst channel. Layers that only one of both
    has are passed over, unless they were chosen with `layers` or `match`.

    Args:
        a: The network that is right, as in `torchlens_viz.compare`.
        b: The other.
        inputs: A batch, or an iterable of batches.
        layers: Which layers of `a`; None is all that both have, and what the networks put out.
        rtol: The tolerance, in parts of the value or of the root mean square of its layer; None measures
            what rounding may do.
        atol: The tolerance besides.
        match: Which layers belong together.
        input_of: Which part of a batch is the input.
        channel_dim: The dimension that counts channels.
        msg: Put before the message.

    Raises:
        AssertionError: A layer is beyond the tolerance, or one that was chosen ran in one of both alone.

    Example:
        >>> import copy, torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU())
        >>> _ = net.requires_grad_(False).get_parameter("0.bias").copy_(torch.tensor([1.0, 2.0]))
        >>> other, images = copy.deepcopy(net), torch.zeros(1, 1, 4, 4)
        >>> assert_same_activations(net, other, images)
        >>> _ = other[0].bias.add_(torch.tensor([0.0, 0.5]))
        >>> assert_same_activations(net, other, images)
        Traceback (most recent call last):
        AssertionError: 3 of 3 layers (100.0%) differ by more than 1e-08 + 7.62939e-06 * max(abs(a), rms)
          first: `0`, channel 1 of 2, input 0: the largest difference is 0.5, 3.27e+04 times what is allowed
          `0` in all: 0.224 of its root mean square, cosine 0.996546
          layers: `0`, `1`, `(output)`
    """
    __tracebackhide__ = True
    found = compare(
        a,
        b,
        inputs,
        layers,
        rtol=rtol,
        atol=atol,
        match=match,
        input_of=input_of,
        channel_dim=channel_dim,
        maps=1,
    )
    failures = []
    if found.only_in_a and (layers is not None or not isinstance(match, str)):
        missing = some([f"`{name}`" for name in found.only_in_a])
        failures.append(f"not compared, since they have no counterpart that ran in `b`: {missing}")
    if found.beyond:
        failures.append(_told(found, found.beyond[0]))
    if failures:
        raise AssertionError("\n".join([*([msg] if msg is not None else []), *failures]))


def _told(found: Comparison, first: LayerDifference) -> str:
    beyond = found.beyond
    head = (
        f"{share(len(beyond), len(found.layers), 'layer')} {'differs' if len(beyond) == 1 else 'differ'} by "
        f"more than {first.atol:g} + {first.rtol:g} * max(abs(a), rms)"
    )
    names = some([f"`{row.label}`" for row in beyond])
    if first.shapes[0] != first.shapes[1]:
        return (
            f"{head}\n  first: `{first.label}` puts out {first.shapes[0]} in `a` and {first.shapes[1]} in "
            f"`b`\n  layers: {names}"
        )
    channels = 0 if first.by_channel is None else len(first.by_channel)
    place = "" if first.channel is None else f", channel {first.channel} of {channels:,}"
    place += "" if first.sample is None else f", input {first.sample}"
    return (
        f"{head}\n"
        f"  first: `{first.label}`{place}: the largest difference is {first.max_abs:.6g}, "
        f"{first.excess:.3g} times what is allowed\n"
        f"  `{first.label}` in all: {first.relative:.3g} of its root mean square, "
        f"cosine {first.cosine:.6f}\n"
        f"  layers: {names}"
    )
