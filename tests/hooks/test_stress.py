"""2,000 random nested captures with random failures: nothing is left behind, and no value is wrong."""

from __future__ import annotations

import contextlib
import functools
import gc
import random
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from torchlens_viz import capture
from torchlens_viz.errors import CaptureMemoryError, TorchlensVizError

ROUNDS = 2_000
HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


class Planned(BaseException):
    """A failure that the test brings about; not an `Exception`, like an interrupt."""


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.alias = self.conv
        self.relu = nn.ReLU(inplace=True)
        self.unused = nn.Conv2d(3, 3, 1)

    def forward(self, value):
        return {"first": self.relu(self.conv(value)), "second": [self.alias(value)[:, :, :2]]}


class Suppresses(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Hardtanh(inplace=True))

    def forward(self, value):
        for channels in (1, 3):
            with contextlib.suppress(Exception):
                value = self.body(value[:, :channels])
        return value


class Checkpoints(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(inplace=True), nn.Flatten())
        self.head = nn.Linear(2 * 3 * 3, 2)

    def forward(self, value):
        return self.head(checkpoint(self.body, value, use_reentrant=False))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(5, 4)

    def forward(self, value):
        return self.lstm(value[:, 0])


def pool() -> list[nn.Module]:
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 1), nn.Sigmoid())
    return [model.eval() for model in (plain, Shared(), Suppresses(), Checkpoints(), Recurrent())]


def flat(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value
    return [tensor for item in items for tensor in flat(item)]


def outputs_of(model: nn.Module, value: torch.Tensor) -> dict[str, list[list[torch.Tensor]]]:
    """Return what each module puts out in each call, by wrapping `forward` and without any hook."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    found: dict[str, list[list[torch.Tensor]]] = {}

    def wrapped(module, forward, *args):
        output = forward(*args)
        for name in names[module]:
            found.setdefault(name, []).append([tensor.clone() for tensor in flat(output)])
        return output

    for module in names:
        module.forward = functools.partial(wrapped, module, module.forward)
    with torch.no_grad():
        model(value)
    for module in names:
        del module.forward
    return found


def traces(models: list[nn.Module]) -> list:
    """List what a capture puts on modules, empty but for what was there before."""
    return [
        ([len(getattr(module, hooks)) for hooks in HOOKS], set(vars(module)), module.training)
        for model in models
        for module in model.modules()
    ]


def alive() -> tuple[int, int, int]:
    """Return how many tensors there are, the bytes of the dense ones, and how many objects there are."""
    gc.collect()
    objects = gc.get_objects()
    found = [item for item in objects if issubclass(type(item), torch.Tensor)]
    dense = (tensor for tensor in found if tensor.layout is torch.strided)
    return len(found), sum(tensor.nbytes for tensor in dense), len(objects)


def some_options(chance: random.Random) -> dict:
    return {
        "io": chance.choice(["output", "output", "input", "both"]),
        "copy": chance.choice([True, True, "lazy", False]),
        "grad": chance.random() < 0.3,
        "stop": chance.random() < 0.25,
        "reduce": chance.choice([None] * 12 + [torch.sum, lambda tensor: 1 / 0]),
        "dtype": chance.choice([None] * 5 + [torch.float64]),
        "max_bytes": chance.choice([None] * 12 + [50, 5_000]),
    }


def some_layers(chance: random.Random, model: nn.Module):
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    return chance.choice([chance.choice(names), chance.sample(names, 2), lambda name, module: True, 0])


@contextlib.contextmanager
def unable_to_register(model: nn.Module, chance: random.Random):
    """Make one module of the model refuse new hooks, now and then."""
    if chance.random() > 0.05:
        yield
        return

    def refuse(*args, **kwargs):
        raise Planned("no hook here")

    module = chance.choice(list(model.modules()))
    module.register_forward_hook = module.register_forward_pre_hook = refuse
    try:
        yield
    finally:
        del module.register_forward_hook, module.register_forward_pre_hook


def is_plain(options: dict) -> bool:
    return options["io"] == "output" and options["copy"] and not (options["reduce"] or options["dtype"])


def one_round(models, values, expected, chance: random.Random, seen: Counter) -> None:
    index = chance.randrange(len(models))
    model, value = models[index], values[index]
    blocks = []
    open_: list = []
    try:
        for _ in range(chance.randint(1, 4)):
            options = some_options(chance)
            manager = capture(model, some_layers(chance, model), **options)
            with unable_to_register(model, chance):
                acts = manager.__enter__()
            open_.append(manager)
            blocks.append((options, acts))
        if chance.random() < 0.1:
            raise Planned("in the block")
        broken = chance.random() < 0.1
        with torch.set_grad_enabled(chance.random() < 0.5):
            output = model(value[:, :0] if broken else value)
        if output is not None and not broken:
            losses = [tensor.sum() for tensor in flat(output) if tensor.requires_grad]
            if losses:
                torch.autograd.grad(sum(losses), list(model.parameters()), allow_unused=True)
        seen["stopped" if output is None else "ran"] += 1
        if not any(options["reduce"] or options["max_bytes"] for options, _ in blocks) and not broken:
            check(blocks, expected[index], seen)
    except (Planned, TorchlensVizError, ZeroDivisionError, RuntimeError, IndexError) as error:
        seen[type(error).__name__] += 1
    finally:
        if chance.random() < 0.3:
            chance.shuffle(open_)  # blocks overlap without nesting
        while open_:
            try:
                open_.pop().__exit__(None, None, None)
            except CaptureMemoryError:  # which a model may have caught before
                seen["at the end"] += 1


def check(blocks, expected, seen: Counter) -> None:
    stops = any(options["stop"] for options, _ in blocks)
    for options, acts in blocks:
        if not is_plain(options):
            continue
        for name in acts:
            kept = [[tensor.detach() for tensor in flat(call)] for call in acts.calls(name)]
            assert len(kept) == len(expected[name]) or stops
            for call, wanted in zip(kept, expected[name], strict=False):
                for actual, reference in zip(call, wanted, strict=True):
                    assert torch.equal(actual, reference), name
                    seen["tensors"] += 1


@pytest.mark.slow
def test_random_captures_leave_hooks_and_memory_at_baseline():
    chance = random.Random(20)
    models = pool()
    values = [torch.randn(1, 3, 5, 5) for _ in models]
    expected = [outputs_of(model, value) for model, value in zip(models, values, strict=True)]
    before = traces(models)
    rng = torch.get_rng_state()
    seen: Counter = Counter()
    for turn in range(ROUNDS):
        one_round(models, values, expected, chance, seen)
        assert traces(models) == before, turn
        assert torch.is_grad_enabled()
        if turn == ROUNDS // 4:  # caches are warm
            tensors, held, objects = alive()
    tensors_after, held_after, objects_after = alive()
    assert (tensors_after, held_after) == (tensors, held)
    assert objects_after - objects < 500  # a third of an object per round would be more
    assert torch.equal(torch.get_rng_state(), rng)
    for model, value, wanted in zip(models, values, expected, strict=True):
        after = outputs_of(model, value)
        assert all(map(torch.equal, after[""][0], wanted[""][0]))
    assert seen["tensors"] > 1_000
    assert min(seen[kind] for kind in ("ran", "stopped", "Planned", "CaptureMemoryError")) > 50
    assert min(seen[kind] for kind in ("RuntimeError", "ZeroDivisionError")) > 50  # the plans came true


def test_a_capture_that_is_never_left_would_be_noticed():
    model = pool()[0]
    before, (tensors, held, objects) = traces([model]), alive()
    manager = capture(model, "0", stop=True)
    acts = manager.__enter__()
    assert model(torch.ones(1, 3, 5, 5)) is None
    assert traces([model]) != before
    assert alive()[0] > tensors
    assert alive()[1] >= held + acts["0"].nbytes
    assert alive()[2] > objects
    manager.__exit__(None, None, None)
    assert traces([model]) == before
