"""The input is found in batches of every kind, and loaders that are no good are refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from tests.nets import Given, quiet, same_survey
from torchlens_viz import survey
from torchlens_viz.errors import InvalidArgumentError, InvalidTypeError, NoDataError


@pytest.mark.parametrize(
    ("wrap", "input_of"),
    [
        (lambda x: x, None),
        (lambda x: (x, torch.zeros(len(x))), None),
        (lambda x: [x, ["name"] * len(x)], None),
        (lambda x: {"labels": torch.zeros(len(x)), "pixel_values": x}, None),
        (lambda x: {"labels": torch.zeros(len(x)), "picture": x}, "picture"),
        (lambda x: (torch.zeros(len(x)), x), 1),
        (lambda x: {"deep": {"x": x}}, lambda batch: batch["deep"]["x"]),
        (lambda x: {"deep": x}, lambda batch: {"input": batch["deep"]}),
    ],
)
def test_the_input_is_found_in_batches_of_every_kind(net, wrap, input_of):
    images = torch.randn(5, 3, 9, 9)
    expected = survey(net, images.split(2), "0", **quiet)
    same_survey(survey(net, map(wrap, images.split(2)), "0", input_of=input_of, **quiet), expected)


# Bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (list, "must yield at least one batch"),
        (lambda: [torch.zeros(0, 3, 9, 9)], "one or more inputs, got shape"),
        (lambda: [{"a": torch.zeros(1, 3, 9, 9)}], "the keys 'a'"),
        (lambda: [np.zeros((1, 3, 9, 9))], "got a ndarray"),
        (lambda: DataLoader(TensorDataset(torch.zeros(4, 3, 9, 9)), shuffle=True), "must not shuffle"),
        (
            lambda: DataLoader(TensorDataset(torch.zeros(4, 3, 9, 9)), batch_sampler=[[1, 0], [2, 3]]),
            "order is not known",
        ),
    ],
)
def test_a_loader_that_is_no_good_is_refused(net, make, message):
    with pytest.raises((NoDataError, InvalidArgumentError, InvalidTypeError), match=message):
        survey(net, make(), "0", **quiet)


def test_a_shuffling_loader_is_taken_with_its_indices():
    maps = torch.randn(10, 2, 3, 3)
    order = torch.randperm(10).tolist()
    loader = DataLoader(TensorDataset(maps), batch_size=3, sampler=order)
    expected = survey(Given(), maps.split(3), "layer", **quiet)
    same_survey(survey(Given(), loader, "layer", **quiet), expected)  # a list says its order itself
    same_survey(survey(Given(), maps[order].split(4), "layer", indices=order, **quiet), expected)
    pairs = zip(maps[order].split(4), torch.tensor(order).split(4), strict=True)
    same_survey(survey(Given(), pairs, "layer", indices=lambda batch: batch[1], **quiet), expected)


def test_padding_of_a_distributed_sampler_counts_once():
    data = TensorDataset(torch.randn(11, 2, 3, 3))
    parts = []
    for rank in range(4):
        sampler = DistributedSampler(data, num_replicas=4, rank=rank, shuffle=True, seed=3)
        loader = DataLoader(data, batch_size=2, sampler=sampler)
        parts.append(survey(Given(), loader, "layer", top_k=20, **quiet))
    assert [part.samples_seen for part in parts] == [3, 3, 3, 2]
    merged = parts[0].merge(parts[1]).merge(parts[2]).merge(parts[3])
    same_survey(merged, survey(Given(), [data.tensors[0]], "layer", top_k=20, **quiet))


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (torch.rand(4, 3, 8, 8), r"got a Tensor, .*`x.split\(64\)`"),
        (TensorDataset(torch.rand(4, 3, 8, 8)), "got a TensorDataset, .*`DataLoader"),
    ],
)
def test_single_inputs_are_not_taken_for_batches(net, loader, message):
    with pytest.raises(InvalidTypeError, match=message):
        survey(net, loader, "*", progress=False)


def test_a_loader_that_loses_the_order_is_refused(net):
    loader = DataLoader(TensorDataset(torch.rand(4, 3, 8, 8)), num_workers=2, in_order=False)
    with pytest.raises(InvalidArgumentError, match="`loader` must keep the order"):
        survey(net, loader, "*", progress=False)


def test_inputs_that_a_sampler_names_and_the_loader_drops_are_refused(net):
    loader = DataLoader(
        TensorDataset(torch.rand(8, 3, 8, 8)),
        batch_size=4,
        sampler=[4, 5, 6, 7],
        collate_fn=lambda rows: torch.stack([row[0] for row in rows[1:]]),
    )
    with pytest.raises(InvalidArgumentError, match="got a batch of 3 where 4 were named"):
        survey(net, loader, "*", progress=False)


def test_an_index_given_twice_is_refused(net):
    batches = torch.rand(8, 3, 8, 8).split(4)
    with pytest.raises(InvalidArgumentError, match="`indices` must name each input once"):
        survey(net, batches, "*", indices=lambda batch: range(len(batch)), progress=False)
