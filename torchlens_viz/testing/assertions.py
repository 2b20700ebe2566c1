"""Assertions on activations: what should hold inside a network, in a test or while it trains.

Every assertion takes a tensor (N, C, ...), `Activations`, a `ChannelStats` or `RunningStats`, a mapping from
layer names to those, or a `Survey`; a layer that ran several times is held to it in each of its calls.
`layers` are names or globs of the layers that count, `msg` is put before the message. A failure is an
`AssertionError` that names the layers that fail, their channels, the values and the bounds. NaN and Inf fail
every assertion.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from torchlens_viz.arguments import a_name, integer, one_of, real, shown
from torchlens_viz.errors import InvalidArgumentError
from torchlens_viz.stats.channels import ChannelStats
from torchlens_viz.testing.messages import differences, nonfinite, share, some
from torchlens_viz.testing.subjects import Globs, Subject, read, statistics_of


def assert_finite(x: Subject, *, layers: Globs = None, msg: str | None = None) -> None:
    """Assert that there is no NaN and no Inf; tensors of any shape will do, and tuples of them.

    Example:
        >>> import torch
        >>> assert_finite(torch.zeros(2, 3, 4, 4))
        >>> assert_finite(torch.tensor([[1.0, torch.inf]]))
        Traceback (most recent call last):
        AssertionError: the tensor: 1 of 2 values (50.0%) is NaN or infinite, in 1 of 2 channels
          channels: 1 (1 value)
          first: inf at index (0, 1)
    """
    __tracebackhide__ = True
    _raise([nonfinite(*reading) for reading in read(x, layers, whole=True)], msg)


def assert_no_dead_channels(
    x: Subject,
    *,
    eps: float = 0.0,
    max_dead: int = 0,
    layers: Globs = None,
    channel_dim: int | None = None,
    msg: str | None = None,
) -> None:
    """Assert that at most `max_dead` channels of each layer are dead: their maximum never exceeded `eps`.

    Args:
        x: See `torchlens_viz.testing`.
        eps: What a live channel exceeds somewhere, in some sample.
        max_dead: How many dead channels are allowed, in each layer.
        layers: Names or globs of the layers that count.
        channel_dim: The dimension that counts channels, where there are tensors; None is what `capture` found
            where it handed a tensor out, else 1.
        msg: Put before the message.
    """
    __tracebackhide__ = True
    max_dead = integer(max_dead, "max_dead")
    if max_dead < 0:
        raise InvalidArgumentError(f"`max_dead` must be 0 or more, got {shown(max_dead)}")
    eps = real(eps, "eps")
    if eps != eps:
        raise InvalidArgumentError("`eps` must be a number, got NaN")

    def failure(label: str, stats: ChannelStats) -> str | None:
        dead = stats.dead(eps).tolist()
        if len(dead) <= max_dead:
            return None
        most = stats.max.tolist()
        return (
            f"{label}: {share(len(dead), stats.channels, 'channel')} {'is' if len(dead) == 1 else 'are'} "
            f"dead, at most {max_dead} allowed\n"
            f"  channels: {some([f'{channel} (max {most[channel]:.6g})' for channel in dead])}\n"
            f"  dead: no value of {int(stats.count[0])} in the channel exceeds eps = {eps:g}"
        )

    _raise(_judge(x, layers, channel_dim, "channel", failure), msg)


def assert_mean(
    x: Subject,
    low: float,
    high: float,
    *,
    per: Literal["channel", "layer"] = "channel",
    layers: Globs = None,
    channel_dim: int | None = None,
    msg: str | None = None,
) -> None:
    """Assert `low <= mean <= high` for every channel, or with `per="layer"` for each layer as a whole.

    Example:
        >>> import torch
        >>> assert_mean(torch.ones(2, 3, 4, 4), 0, 1)
        >>> assert_mean(torch.tensor([[1.0, 5.0]]), 0, 1, msg="after the first step")
        Traceback (most recent call last):
        AssertionError: after the first step
        the tensor: the mean of 1 of 2 channels (50.0%) is outside [0, 1]
          channels: 1 (5)
          worst: channel 1 with 5, which is 4 above the upper bound
    """
    __tracebackhide__ = True
    _raise(_judge(x, layers, channel_dim, per, _outside("mean", low, high)), msg)


def assert_std(
    x: Subject,
    low: float,
    high: float,
    *,
    per: Literal["channel", "layer"] = "channel",
    layers: Globs = None,
    channel_dim: int | None = None,
    msg: str | None = None,
) -> None:
    """Assert `low <= std <= high`, of the population, for every channel, or for each layer as a whole."""
    __tracebackhide__ = True
    _raise(_judge(x, layers, channel_dim, per, _outside("std", low, high)), msg)


def assert_zero_fraction(
    x: Subject,
    low: float,
    high: float,
    *,
    per: Literal["channel", "layer"] = "channel",
    layers: Globs = None,
    channel_dim: int | None = None,
    msg: str | None = None,
) -> None:
    """Assert that the share of zeros is `low` to `high`, within 0 to 1, of every channel or of each layer."""
    __tracebackhide__ = True
    _raise(_judge(x, layers, channel_dim, per, _outside("zero_fraction", low, high)), msg)


def assert_activations_close(
    actual: Subject,
    expected: Subject,
    *,
    rtol: float = 1.3e-6,
    atol: float = 1e-5,
    layers: Globs = None,
    msg: str | None = None,
) -> None:
    """Assert `abs(actual - expected) <= atol + rtol * abs(expected)` for every value.

    Tensors are compared by value, in float64, whatever their type and device. Of statistics, the mean, std,
    min, max and zero fraction are compared. Both sides must have the same layers, calls, tensors and shapes.

    Example:
        >>> import torch
        >>> assert_activations_close(torch.ones(2), torch.tensor([1.0, 1.5]), rtol=0.0, atol=0.5)
        >>> assert_activations_close(torch.ones(2), torch.tensor([1.0, 1.5]), rtol=0.0, atol=0.1)
        Traceback (most recent call last):
        AssertionError: the tensor: 1 of 2 values (50.0%) differs by more than 0.1 + 0 * abs(expected)
          worst: 1 where 1.5 was expected, at index (1,); the difference is 0.5, or 33.3% of what was expected
    """
    __tracebackhide__ = True
    for name, tolerance in (("rtol", rtol), ("atol", atol)):
        if not real(tolerance, name) >= 0:
            raise InvalidArgumentError(f"`{name}` must be 0 or more, got {tolerance}")
    rtol, atol = real(rtol, "rtol"), real(atol, "atol")
    ours, theirs = dict(read(actual, layers, whole=True)), dict(read(expected, layers, whole=True))
    failures = [f"{label}: there, and not expected" for label in ours if label not in theirs]
    failures += [f"{label}: expected, and not there" for label in theirs if label not in ours]
    for label, value in ours.items():
        if label in theirs:
            failures += differences(label, value, theirs[label], rtol=rtol, atol=atol)
    _raise(failures, msg)


def _judge(
    x: Subject,
    layers: Globs,
    channel_dim: int | None,
    per: str,
    failure: Callable[[str, ChannelStats], str | None],
) -> list[str | None]:
    """Return what `failure` says of each reading; of one with NaN or Inf, say that instead."""
    one_of(per, "per", ("channel", "layer"))
    found = []
    for reading in read(x, layers):
        stats = statistics_of(reading, channel_dim)
        spoilt = nonfinite(reading.label, stats)
        found.append(spoilt or failure(reading.label, stats.pooled() if per == "layer" else stats))
    return found


def _outside(name: str, low: float, high: float) -> Callable[[str, ChannelStats], str | None]:
    low, high = real(low, "low"), real(high, "high")
    if not low <= high:
        raise InvalidArgumentError(f"`low` must not exceed `high`, got {low:g} and {high:g}")
    what, bounds = name.replace("_", " "), f"[{low:.6g}, {high:.6g}]"

    def failure(label: str, stats: ChannelStats) -> str | None:
        values = getattr(stats, name).tolist()
        beyond = [max(low - value, value - high) for value in values]
        bad = [channel for channel, distance in enumerate(beyond) if distance > 0]
        if not bad:
            return None
        worst = max(bad, key=beyond.__getitem__)
        side = "below the lower" if values[worst] < low else "above the upper"
        distance = f"{beyond[worst]:.6g} {side} bound"
        if stats.channels == 1:
            return f"{label}: the {what} is {values[0]:.6g}, outside {bounds}, {distance}"
        return (
            f"{label}: the {what} of {share(len(bad), stats.channels, 'channel')} is outside {bounds}\n"
            f"  channels: {some([f'{channel} ({values[channel]:.6g})' for channel in bad])}\n"
            f"  worst: channel {worst} with {values[worst]:.6g}, which is {distance}"
        )

    return failure


def _raise(failures: Sequence[str | None], msg: str | None) -> None:
    __tracebackhide__ = True
    if msg is not None:
        a_name(msg, "msg")
    told = [failure for failure in failures if failure]
    if not told:
        return
    count = [f"{len(told)} of {len(failures)} failed"] if len(failures) > 1 else []
    raise AssertionError("\n".join([*([msg] if msg is not None else []), *count, *told]))
