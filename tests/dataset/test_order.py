"""The index of an input is right, or the loader is refused: planted inputs of which each tells its index."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    default_collate,
    get_worker_info,
)
from tqdm import tqdm

from tests.nets import quiet
from torchlens_viz import survey
from torchlens_viz.dataset.order import batch_sizes, loader_within
from torchlens_viz.errors import InvalidArgumentError

PLANTED = torch.zeros(10, 1, 4, 4)
PLANTED[:, 0, 0, 0] = torch.arange(1.0, 11)  # input i peaks at i + 1


@pytest.fixture
def same_as_it_is():
    net = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False))
    nn.init.ones_(net[0].weight)
    return net


class Prefetching:
    """As many write one: holds a loader and yields its batches."""

    def __init__(self, loader):
        self.inner = loader

    def __iter__(self):
        yield from self.inner


class Slotted:
    __slots__ = ("inner",)

    def __init__(self, loader):
        self.inner = loader

    def __iter__(self):
        return iter(self.inner)


class Hidden:
    """Holds a loader in a list in a dict."""

    def __init__(self, loader):
        self.parts = {"loaders": [loader]}

    def __iter__(self):
        return iter(self.parts["loaders"][0])


class Closed:
    """Holds a function that closes over a loader."""

    def __init__(self, loader):
        self.begin = lambda: iter(loader)

    def __iter__(self):
        return self.begin()


def late(loader):
    """Makes the loader once a batch is wanted."""
    options = {"shuffle": isinstance(loader.sampler, RandomSampler), "batch_size": loader.batch_size}
    dataset = loader.dataset
    del loader
    yield from DataLoader(dataset, **options)


class Late:
    def __init__(self, loader):
        self.shuffle = isinstance(loader.sampler, RandomSampler)

    def __iter__(self):
        self.running = iter(DataLoader(TensorDataset(PLANTED), batch_size=3, shuffle=self.shuffle))
        return self

    def __next__(self):
        return next(self.running)


class TwiceWrapped:
    def __init__(self, loader):
        self.prefetching = Prefetching(loader)

    def __iter__(self):
        return iter(self.prefetching)


def fabric(loader):
    return pytest.importorskip("lightning").Fabric(accelerator="cpu", devices=1).setup_dataloaders(loader)


WRAPPERS = [
    lambda loader: loader,
    lambda loader: tqdm(loader, disable=True),
    fabric,
    iter,
    Prefetching,
    TwiceWrapped,
    lambda loader: (batch for batch in loader),
    lambda loader: map(list, loader),
    lambda loader: tqdm(Prefetching(loader), disable=True),
    Slotted,
    Hidden,
    Closed,
    late,
    Late,
    lambda loader: tqdm(Late(loader), disable=True),
    lambda loader: map(list, late(loader)),
    lambda loader: itertools.islice(loader, 99),
    lambda loader: itertools.chain(loader),
    lambda loader: itertools.chain.from_iterable([loader]),
    lambda loader: itertools.takewhile(len, loader),
    lambda loader: itertools.islice(itertools.cycle(loader), 4),
    lambda loader: itertools.tee(loader)[1],
    lambda loader: iter(partial(next, iter(loader), None), None),
]


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_loader_within_something_else_is_right_or_refused(same_as_it_is, wrap):
    def loader(**options):
        return DataLoader(TensorDataset(PLANTED), batch_size=3, **options)

    assert survey(same_as_it_is, wrap(loader()), "0", top_k=4, **quiet).top["0"].samples[0].tolist() == [
        9,
        8,
        7,
        6,
    ]
    with pytest.raises(InvalidArgumentError, match=r"must not shuffle|order is not known"):
        survey(same_as_it_is, wrap(loader(shuffle=True)), "0", top_k=4, **quiet)
    known = survey(
        same_as_it_is,
        wrap(loader(shuffle=True)),
        "0",
        top_k=4,
        indices=lambda batch: (batch[0].amax((1, 2, 3)) - 1).long(),
        **quiet,
    )
    assert known.top["0"].samples[0].tolist() == [9, 8, 7, 6]


class Backwards(SequentialSampler):
    def __iter__(self):
        return reversed(range(len(self.data_source)))


@pytest.mark.parametrize("wrap", [lambda loader: loader, iter, Closed])
def test_a_sampler_that_is_sequential_by_name_alone_is_refused(same_as_it_is, wrap):
    loader = DataLoader(TensorDataset(PLANTED), batch_size=5, sampler=Backwards(PLANTED))
    with pytest.raises(InvalidArgumentError, match="a loader with a Backwards, whose order is not known"):
        survey(same_as_it_is, wrap(loader), "0", **quiet)


def test_an_iterator_that_was_begun_is_refused(same_as_it_is):
    begun = iter(DataLoader(TensorDataset(PLANTED), batch_size=3))
    next(begun)
    with pytest.raises(InvalidArgumentError, match="order is not known"):
        survey(same_as_it_is, begun, "0", **quiet)


class Files(Dataset):
    """Of which two cannot be read."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return None if index in (1, 4) else (PLANTED[index], index)


def readable(rows):
    return default_collate([row for row in rows if row is not None])


def two_views(rows):
    return torch.cat([torch.stack([row[0] for row in rows])] * 2)


@pytest.mark.parametrize("wrap", [lambda loader: loader, lambda loader: tqdm(loader, disable=True), iter])
@pytest.mark.parametrize("size", [4, 10])
def test_a_collate_function_that_drops_items_is_refused_and_indices_make_it_right(same_as_it_is, wrap, size):
    def loader():
        return wrap(DataLoader(Files(), batch_size=size, collate_fn=readable))

    with pytest.raises(InvalidArgumentError, match=r"got a batch of [38] where (4|10) were named.*`indices`"):
        survey(same_as_it_is, loader(), "0", **quiet)
    found = survey(same_as_it_is, loader(), "0", top_k=9, indices=lambda batch: batch[1], **quiet)
    assert found.top["0"].samples[0].tolist() == [9, 8, 7, 6, 5, 3, 2, 0]
    patches = found.patches("0", 0, PLANTED)
    assert [float(patch.values.max()) for patch in patches] == found.top["0"].values[0].tolist()


def test_a_collate_function_that_makes_two_of_one_is_refused(same_as_it_is):
    loader = DataLoader(TensorDataset(PLANTED), batch_size=5, collate_fn=two_views)
    with pytest.raises(
        InvalidArgumentError, match=r"got a batch of 10 where 5 were named.*makes several of one"
    ):
        survey(same_as_it_is, loader, "0", **quiet)


@pytest.mark.parametrize(("drop_last", "expected"), [(False, [4, 4, 2]), (True, [4, 4])])
def test_batches_have_the_sizes_that_the_sampler_says(drop_last, expected):
    loader = DataLoader(TensorDataset(PLANTED), batch_size=4, drop_last=drop_last)
    assert list(batch_sizes(loader)) == expected
    assert list(batch_sizes(iter(loader))) == expected
    assert batch_sizes(DataLoader(TensorDataset(PLANTED), batch_size=None)) is None
    assert batch_sizes([PLANTED]) is None
    batches = [PLANTED]
    assert loader_within(batches) is batches


class Stream(IterableDataset):
    """Shares itself among the workers, as the documentation of torch has it."""

    def __iter__(self):
        info = get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        return iter(PLANTED[first::step])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_with_one_worker_has_its_own_order(same_as_it_is, workers):
    loader = DataLoader(Stream(), batch_size=3, num_workers=workers)
    found = survey(same_as_it_is, loader, "0", top_k=4, **quiet)
    assert found.top["0"].samples[0].tolist() == [9, 8, 7, 6]


@pytest.mark.parametrize("wrap", [lambda loader: loader, iter, Closed])
def test_a_stream_with_several_workers_is_refused(same_as_it_is, wrap):
    loader = wrap(DataLoader(Stream(), batch_size=3, num_workers=2))
    with pytest.raises(
        InvalidArgumentError, match=r"IterableDataset with one worker at most, got 2.*`indices`"
    ):
        survey(same_as_it_is, loader, "0", **quiet)
    found = survey(
        same_as_it_is, loader, "0", top_k=4, indices=lambda batch: (batch.amax((1, 2, 3)) - 1).long(), **quiet
    )
    assert found.top["0"].samples[0].tolist() == [9, 8, 7, 6]


class Rows(Dataset):
    """What data sets of Hugging Face yield."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return {"image": Image.new("L", (8, 8), 20 * index), "label": index}


def to_input(picture):
    return torch.tensor(list(picture.tobytes())).view(1, 8, 8) / 255


@pytest.mark.parametrize("rule", [None, "image", lambda row: row["image"]])
def test_patches_are_cut_from_rows_with_pictures(rule):
    net = nn.Sequential(nn.Conv2d(1, 1, 3, bias=False))
    nn.init.ones_(net[0].weight)

    def collate(rows):
        return {"pixel_values": torch.stack([to_input(row["image"]) for row in rows])}

    found = survey(net, DataLoader(Rows(), batch_size=2, collate_fn=collate), "0", top_k=2, **quiet)
    patches = found.patches("0", 0, Rows(), preprocess=to_input, input_of=rule)
    assert [round(float(patch.values.mean()) * 255) for patch in patches] == [60, 40]
