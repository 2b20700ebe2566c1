"""Assertions on activations: what should hold inside a network, in a test or while it trains.

Every assertion takes a tensor (N, C, ...), `Activations`, a `ChannelStats` or `RunningStats`, a mapping from
layer names to those, or a `Survey`; a layer that ran several times is held to it in each of its calls.
`layers` are names or globs of the layers that count, `msg` is put before the message. A failure is an
`AssertionError` that names the layers that fail, their channels, the values and the bounds. NaN and Inf fail
every assertion. `assert_same_activations` takes two networks and inputs instead.
"""

from torchlens_viz.testing.assertions import (
    assert_activations_close,
    assert_finite,
    assert_mean,
    assert_no_dead_channels,
    assert_std,
    assert_zero_fraction,
)
from torchlens_viz.testing.networks import assert_same_activations

__all__ = [
    "assert_activations_close",
    "assert_finite",
    "assert_mean",
    "assert_no_dead_channels",
    "assert_same_activations",
    "assert_std",
    "assert_zero_fraction",
]
