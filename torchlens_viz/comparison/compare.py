"""`compare`: two networks on the same inputs, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from torchlens_viz.arguments import integer, number, one_of
from torchlens_viz.comparison.matching import Match, plain_name
from torchlens_viz.comparison.result import Comparison, LayerDifference
from torchlens_viz.comparison.run import Run, batches_of
from torchlens_viz.comparison.side import OUTPUT, Side
from torchlens_viz.errors import InvalidArgumentError, NoDataError
from torchlens_viz.models.inputs import InputOf
from torchlens_viz.models.keeping import same_random_numbers
from torchlens_viz.models.layers import Layer, Selector, select


def compare(
    a: nn.Module | torch.export.ExportedProgram,
    b: nn.Module | torch.export.ExportedProgram,
    inputs: Any,
    layers: Selector | None = None,
    *,
    rtol: float | None = None,
    atol: float = 1e-8,
    match: Match = "name",
    isolate: bool = False,
    input_of: InputOf = None,
    channel_dim: int | None = None,
    maps: int = 8,
    correlations: bool = False,
) -> Comparison:
    """Find where two networks that should do the same begin to differ.

    Both run on the same inputs, and what every layer of `b` puts out is held against what the layer of `a`
    does, in the order in which the layers of `a` run. A value is beyond the tolerance where
    `abs(a - b) > atol + rtol * max(abs(a), rms)`; rms is the root mean square of what the layer of `a` puts
    out for the batch, since rounding is as large in the values near zero as in the others. NaN and Inf are
    equal to themselves alone.

    It serves for a network and what was made of it: a copy on another device or of another type, in
    `channels_last`, quantised, exported, converted from elsewhere, or trained further. Compiled networks run
    eagerly meanwhile. What was folded into one layer, as quantisation folds a convolution, its batch
    normalisation and ReLU, is held against the last of the layers.

    Both run in eval mode, without gradients and with the same random numbers. Their flags, hooks, buffers,
    and the random numbers are afterwards as they were.

    Args:
        a: The network that is right: an `nn.Module`, wrapped or compiled too, or an `ExportedProgram`.
        b: The other, of the same kinds. Each gets inputs on its own device, and floating ones in its own
            type.
        inputs: A batch (N, ...); a mapping of keyword arguments; or an iterable of batches, as `survey` takes
            it. What a layer of `a` puts out for one batch is kept until `b` has run.
        layers: Which layers of `a`, as in `capture`; None is all, and what the network puts out,
            `"(output)"`.
        rtol: The tolerance, in parts of the value, 0 or more. None measures what rounding may do to each
            layer of `a`, by stochastic arithmetic: `a` runs once more on each batch while what its layers put
            out is changed at random in the last places. 24 times what that comes to is allowed, and at least
            64 units in the last place; in float16, bfloat16 and TF32 4 times, and at least 8 units; with 8
            bits per value at least half of the value. What counts is the coarsest type that was seen in
            either network so far.
        atol: The tolerance besides, in the units of the values, 0 or more.
        match: Which layers belong together: those of the same `"name"`; those of the same place in the
            `"order"` of execution, without containers, `nn.Identity` and dropout; or a mapping from names in
            `a` to names in `b`.
        isolate: Give each layer of `b` what the layers of `a` before it put out, so that errors do not add up
            on their way: each row tells of its own layer alone. It shows which layer of a quantised network
            loses most.
        input_of: Which part of a batch is the input, as in `survey`.
        channel_dim: The dimension that counts channels in what all layers put out; None finds it for each.
        maps: How many channels of each layer to keep for `Comparison.grid`, the worst.
        correlations: Find out too which channels respond alike, for `Comparison.channels`: as much work as a
            convolution of 1 x 1 for each layer.

    Returns:
        The errors of each layer, the first beyond the tolerance, and pictures of both.

    Raises:
        LayerNotFoundError: A selector, or a name in `match`, is no layer.
        CaptureError: Hooks on a network's layers would not fire: TorchScript, or the graph that
            `ExportedProgram.module()` makes.
        InvalidArgumentError: No layers belong together, or an argument does not fit.
        InvalidTypeError: An argument has another type.
        NoDataError: There are no inputs.

    Example:
        >>> import copy, torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
        >>> other = copy.deepcopy(net)
        >>> images = torch.randn(2, 3, 16, 16)
        >>> compare(net, other, images).first is None
        True
        >>> other[1].eps = 1e-3
        >>> found = compare(net, other, images)
        >>> found.first, [row.layer for row in found.beyond]
        ('1', ['1', '2', '3', '(output)'])
    """
    tolerance = None if rtol is None else number(rtol, "rtol", least=0)
    atol = number(atol, "atol", least=0)
    maps = integer(maps, "maps", least=1)
    if not isinstance(match, Mapping):
        one_of(match, "match", ("name", "order"))
    elif layers is not None:
        raise InvalidArgumentError("`layers` has no effect with a mapping in `match`; leave one of them out")
    choose = _choice(layers, match)
    ours = Side(a, "a", choose[0], channel_dim)
    theirs = Side(b, "b", choose[1], channel_dim)
    chosen = None
    if layers is not None:
        chosen = frozenset(plain_name(layer.name) or OUTPUT for layer in select(ours.model, layers))
    apart = [side.modules.keys() - {OUTPUT} for side in (ours, theirs)]
    if match == "name" and all(apart) and not apart[0] & apart[1]:
        raise InvalidArgumentError(
            "`a` and `b` must have layers of the same names, got none; match them by their order of "
            'execution with `match="order"`, or pass `match={name in a: name in b}`'
        )
    run = Run(
        ours,
        theirs,
        {(plain_name(mine) or OUTPUT): (plain_name(other) or OUTPUT) for mine, other in match.items()}
        if isinstance(match, Mapping)
        else match,
        chosen,
        rtol=tolerance,
        atol=atol,
        maps=maps,
        correlations=correlations,
        isolates=isolate,
    )
    with same_random_numbers():  # a loader may draw some
        for batch in batches_of(inputs):
            run.add(batch, input_of)
    if run.inputs == 0:
        raise NoDataError("`inputs` must hold at least one input, got none; was the loader used up before?")
    if not run.found:
        raise InvalidArgumentError(
            "`layers` must find layers that run in both networks and put out tensors, got none that do"
        )
    return _result(run, atol)


def _choice(
    layers: Selector | None, match: Match
) -> tuple[Callable[[nn.Module], Sequence[Layer]] | None, Callable[[nn.Module], Sequence[Layer]] | None]:
    """Return which layers of either network are hooked; None is all."""
    if isinstance(match, Mapping):
        if not match:
            raise InvalidArgumentError("`match` must name at least one layer, got an empty mapping")
        mine, others = list(match), list(match.values())
        return lambda model: select(model, mine), lambda model: select(model, others)
    if layers is None or match == "name":
        # By name all are hooked, since a layer may have been folded into one that was not chosen.
        return None, None
    return lambda model: select(model, layers), lambda model: select(model, layers)


def _result(run: Run, atol: float) -> Comparison:
    rows, exhibits, alike = [], [], []
    for row, found in run.in_order():
        gap = found.gap
        assert gap.shapes is not None
        rows.append(
            LayerDifference(
                layer=row.call.layer,
                other=found.other,
                call=row.call.number,
                part=row.part,
                shapes=gap.shapes,
                max_abs=gap.max_abs,
                relative=gap.relative,
                cosine=gap.cosine,
                excess=gap.excess,
                channel=gap.channel,
                sample=gap.sample,
                by_channel=gap.by_channel,
                rtol=gap.rtol,
                atol=atol,
            )
        )
        exhibits.append(gap.exhibit)
        alike.append(None if found.alike is None else found.alike.compute())
    only_in_a, only_in_b = run.only_in()
    return Comparison(
        rows,
        exhibits,
        alike,
        only_in_a=only_in_a,
        only_in_b=only_in_b,
        folded=run.folded,
        samples_seen=run.inputs,
    )
