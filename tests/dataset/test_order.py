"""The index of an input is right, or the loader is refused: planted inputs of which each tells its index."""

from __future__ import annotations

import itertools
import queue
import threading
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
from torchlens_viz.dataset.order import Watch, batch_sizes, loader_within
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


SIGNALS = [torch.cat([torch.zeros(1), PLANTED[index].flatten()[: 3 + 7 * index % 11]]) for index in range(10)]
for index, signal in enumerate(SIGNALS):
    signal[0] = index + 1.0


class Pairs(Dataset):
    """Rows of a tensor, or signals of many lengths, with labels."""

    def __init__(self, values, labels=None):
        self.values, self.labels = values, list(range(len(values))) if labels is None else labels

    def __len__(self):
        return len(self.values)

    def __getitem__(self, index):
        return self.values[index], self.labels[index]


def by_length(rows):
    rows.sort(key=lambda row: -len(row[0]))  # in place, as packed sequences want it
    padded = nn.utils.rnn.pad_sequence([row[0] for row in rows], batch_first=True)
    return padded[:, None], torch.tensor([row[1] for row in rows])


def by_label(rows):
    return default_collate(sorted(rows, key=lambda row: -row[1]))


def turned(rows):
    return {"images": torch.stack([row[0] for row in rows]).flip(0)}


def shuffled(rows):
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(len(rows))).tolist()
    return default_collate([rows[place] for place in order])


def normalised_and_turned(rows):
    images, labels = default_collate(rows[::-1])
    return (images - 0.5) / 0.25, labels


def itself(loader):
    return loader


TURNED = [by_label, turned, shuffled, normalised_and_turned]


@pytest.mark.parametrize(
    ("collate", "wrap", "workers"),
    [
        *((collate, wrap, 0) for collate in TURNED for wrap in (itself, Prefetching, iter)),
        (by_label, Prefetching, 2),
    ],
)
def test_a_collate_function_that_changes_the_order_is_refused(same_as_it_is, collate, wrap, workers):
    loader = DataLoader(Pairs(PLANTED), batch_size=5, collate_fn=collate, num_workers=workers)
    with pytest.raises(
        InvalidArgumentError, match=r"^`loader` must keep the order of .*`indices`, a function"
    ):
        survey(same_as_it_is, wrap(loader), "0", **quiet)
    assert loader.collate_fn is collate


def test_a_collate_function_that_sorts_by_length_is_refused_and_indices_make_it_right():
    net = nn.Sequential(nn.Conv1d(1, 1, 1, bias=False))
    nn.init.ones_(net[0].weight)
    loader = DataLoader(Pairs(SIGNALS), batch_size=5, collate_fn=by_length)
    for indices in (None, range(10)):
        with pytest.raises(
            InvalidArgumentError, match="`loader` must keep the order of the items in a batch"
        ):
            survey(net, loader, "0", indices=indices, **quiet)
    found = survey(net, loader, "0", top_k=10, indices=lambda batch: batch[1], **quiet)
    assert found.top["0"].samples[0].tolist() == list(range(9, -1, -1))


def dropped_and_turned(rows):
    return default_collate([row for row in rows[::-1] if row[1] % 2])


def test_a_collate_function_that_drops_items_and_turns_the_others_is_refused(same_as_it_is):
    loader = DataLoader(Pairs(PLANTED), batch_size=5, collate_fn=dropped_and_turned)
    with pytest.raises(InvalidArgumentError, match="got a batch of 2 where 5 were named"):
        survey(same_as_it_is, loader, "0", **quiet)


def normalised(rows):
    images, labels = default_collate(rows)
    return (images - 0.5) / 0.25, labels


def mixed_up(rows):
    images, labels = default_collate(rows)
    return 0.9 * images + 0.1 * images.flip(0), labels, labels.flip(0)


def padded(rows):
    return nn.utils.rnn.pad_sequence([row[0] for row in rows], batch_first=True)[:, None]


def as_a_list(rows):
    return [row[0] for row in rows], [row[1] for row in rows[::-1]]


def other_labels(rows):
    return torch.stack([row[0] for row in rows]), torch.tensor([row[1] for row in rows[::-1]])


@pytest.mark.parametrize("collate", [readable, normalised, mixed_up, as_a_list, other_labels])
@pytest.mark.parametrize(
    "values", [PLANTED, PLANTED[[0, 0, 1, 1, 1, 1, 2, 2, 9, 9]], torch.ones(10, 1, 4, 4)]
)
def test_a_collate_function_that_keeps_the_order_is_taken(same_as_it_is, collate, values):
    loader = DataLoader(Pairs(values, [1, 0, 1, 1, 0] * 2), batch_size=5, collate_fn=collate)
    images = (lambda batch: torch.stack(batch[0])) if collate is as_a_list else None
    found = survey(same_as_it_is, loader, "0", top_k=1, input_of=images, **quiet)
    assert found.top["0"].samples[0].tolist() == [int(values.flatten(1).amax(1).argmax())]


def test_signals_that_are_padded_in_their_order_are_taken():
    net = nn.Sequential(nn.Conv1d(1, 1, 1, bias=False))
    nn.init.ones_(net[0].weight)
    found = survey(net, DataLoader(Pairs(SIGNALS), batch_size=5, collate_fn=padded), "0", top_k=3, **quiet)
    assert found.top["0"].samples[0].tolist() == [9, 8, 7]


@pytest.mark.parametrize("is_begun", [False, True])
def test_workers_that_stay_are_watched_for_one_pass(same_as_it_is, is_begun):
    loader = DataLoader(
        Pairs(PLANTED), batch_size=5, collate_fn=turned, num_workers=1, persistent_workers=True
    )
    if is_begun:
        list(loader)
    with pytest.raises(InvalidArgumentError, match="`loader` must keep the order of the items in a batch"):
        survey(same_as_it_is, loader, "0", **quiet)
    assert loader.collate_fn is turned
    assert [batch["images"][0, 0, 0, 0].item() for batch in loader] == [5, 10]


def test_the_default_collate_function_is_not_watched():
    loader = DataLoader(Pairs(PLANTED), batch_size=5)
    watch = Watch(loader)
    assert loader.collate_fn is default_collate
    loader = DataLoader(Pairs(PLANTED), batch_size=5, collate_fn=shuffled)
    watch = Watch(loader)
    assert loader.collate_fn is not shuffled
    watch.give_back(is_over=False)
    assert loader.collate_fn is shuffled


class Threaded:
    """Reads ahead in a thread, of which nobody hears when it fails."""

    def __init__(self, loader):
        self.loader = loader

    def __iter__(self):
        ahead = queue.Queue(2)

        def read():
            for batch in self.loader:
                ahead.put(batch)
            ahead.put(None)

        threading.Thread(target=read, daemon=True).start()
        return iter(ahead.get, None)


def late_with(collate):
    yield from DataLoader(Pairs(PLANTED), batch_size=5, collate_fn=collate)


def repeated(rows):
    """Leaves one item out and has another twice, so that there are as many."""
    return default_collate([*rows[1:], rows[1]])


def filled(rows):
    """Puts copies of others in the place of those that could not be read."""
    good = [row for row in rows if row is not None]
    return default_collate(good + good[: len(rows) - len(good)])


def dropped(rows):
    return default_collate(rows[1:])


def changed(rows):
    """Makes something else of the items, such as a processor does, and turns them round."""
    return torch.stack([1.5 * row[0] + 0.25 for row in rows[::-1]])


@pytest.mark.parametrize("collate", [turned, shuffled, repeated, changed])
@pytest.mark.parametrize("wrap", [lambda loader: loader, Threaded, iter])
@pytest.mark.parametrize("workers", [0, 1])
def test_an_order_that_is_lost_is_refused_wherever_it_is_lost(same_as_it_is, collate, wrap, workers):
    loader = wrap(DataLoader(Pairs(PLANTED), batch_size=5, collate_fn=collate, num_workers=workers))
    with pytest.raises(InvalidArgumentError, match="`loader` must keep the order of the items in a batch"):
        survey(same_as_it_is, loader, "0", **quiet)


@pytest.mark.parametrize(
    ("collate", "said"),
    [
        (turned, "keep the order of the items"),
        (changed, "keep the order of the items"),
        (repeated, "keep the order of the items"),
        (dropped, "got a batch of 4 where 5 were named"),
    ],
)
def test_the_first_batch_of_a_loader_that_is_made_late_is_watched_too(same_as_it_is, collate, said):
    with pytest.raises(InvalidArgumentError, match=said):
        survey(same_as_it_is, late_with(collate), "0", **quiet)
    found = survey(same_as_it_is, late_with(default_collate), "0", top_k=3, **quiet)
    assert found.top["0"].samples[0].tolist() == [9, 8, 7]


class Unreadable(Pairs):
    def __getitem__(self, index):
        return None if index in (1, 6) else super().__getitem__(index)


def blank(rows):
    return default_collate([(torch.zeros(1, 4, 4), -1) if row is None else row for row in rows])


def test_items_that_could_not_be_read_keep_their_place_or_are_refused(same_as_it_is):
    def loader(collate):
        return DataLoader(Unreadable(PLANTED), batch_size=5, collate_fn=collate)

    with pytest.raises(InvalidArgumentError, match="`loader` must keep the order of the items in a batch"):
        survey(same_as_it_is, loader(filled), "0", **quiet)
    found = survey(same_as_it_is, loader(blank), "0", top_k=10, **quiet)
    assert found.top["0"].samples[0].tolist() == [9, 8, 7, 5, 4, 3, 2, 0, 1, 6]


def to_pixels(row):
    return torch.tensor(list(row["image"].tobytes())).view(1, 8, 8) / 255


@pytest.mark.parametrize("step", [1, -1])
def test_pictures_are_followed_through_what_is_made_of_them(same_as_it_is, step):
    def collate(rows):
        return {"pixel_values": torch.stack([to_pixels(row) for row in rows[::step]])}

    loader = DataLoader(Rows(), batch_size=4, collate_fn=collate)
    if step < 0:
        with pytest.raises(InvalidArgumentError, match="keep the order of the items in a batch"):
            survey(same_as_it_is, loader, "0", **quiet)
        return
    found = survey(same_as_it_is, loader, "0", top_k=4, **quiet)
    assert found.top["0"].samples[0].tolist() == [3, 2, 1, 0]


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


@pytest.mark.parametrize(
    "wrap",
    [
        lambda loader: itertools.islice(loader, 1, None),
        lambda loader: itertools.dropwhile(lambda batch: batch[0].amax() < 4, loader),
        lambda loader: filter(lambda batch: batch[0].amax() > 4, loader),
    ],
)
def test_an_iterator_that_leaves_out_the_first_batches_is_refused(same_as_it_is, wrap):
    def loader():
        return wrap(DataLoader(TensorDataset(PLANTED), batch_size=3))

    with pytest.raises(
        InvalidArgumentError, match=r"must begin with the first batch.* left out 1.*`indices`"
    ):
        survey(same_as_it_is, loader(), "0", **quiet)
    found = survey(same_as_it_is, loader(), "0", indices=range(3, 10), top_k=3, **quiet)
    assert found.top["0"].samples[0].tolist() == [9, 8, 7]
    first = itertools.islice(DataLoader(TensorDataset(PLANTED), batch_size=3), 2)
    found = survey(same_as_it_is, first, "0", top_k=3, **quiet)
    assert found.top["0"].samples[0].tolist() == [5, 4, 3]
