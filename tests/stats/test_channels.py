"""`ChannelStats`: statistics that can be written down."""

from __future__ import annotations

import pickle

import torch

from tests.nets import seeded, stats_of
from torchlens_viz import ChannelStats


def test_channel_stats_survive_being_written_down():
    stats = stats_of(seeded(4, 3), bins=[0])
    again = ChannelStats(**pickle.loads(pickle.dumps(stats)).to_dict())
    assert torch.equal(again.std, stats.std)
    assert again.bins == stats.bins
    assert torch.equal(stats.to("cpu").histogram, stats.histogram)
