"""Run `capture` and its peers where activations are easily recorded wrong, and print who is right.

    python benchmarks/peers_on_traps.py [--markdown] [--peer NAME] [--trap WORD]

Every cell runs in a process of its own, with a time limit, because some peers patch torch or the model.
Values are judged against the layer's own arithmetic, computed from its weights. Each peer is used as its
documentation says, with its defaults; "hooks" is what most people write, which stores `output.detach()`.
"""

from __future__ import annotations

import argparse
import copy
import gc
import os
import pickle
import select
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, fields, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from peers import PEERS, NotOfferedError, Recorder
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

SECONDS = 60
SYMBOLS = {"right": "✓", "wrong": "✗", "nothing": "∅", "raises": "!", "not offered": "–", "missing": "?"}


@dataclass
class Verdict:
    kind: str
    note: str = ""


RIGHT = Verdict("right")

# Judging.


def leaves(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of a nested value; peers that flatten it are as right as those that keep it."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from leaves(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from leaves(item)
    elif is_dataclass(value):
        for field in fields(value):
            yield from leaves(getattr(value, field.name))


def same(value: Any, expected: Any, tolerance: float = 1e-5) -> bool:
    found, wanted = list(leaves(value)), list(leaves(expected))
    return len(found) == len(wanted) and all(
        a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, rtol=tolerance, atol=tolerance)
        for a, b in zip(found, wanted, strict=True)
    )


def judge(recorded: dict[str, list[Any]], expected: dict[str, list[Any]], tolerance: float = 1e-5) -> Verdict:
    for name, calls in expected.items():
        found = recorded.get(name, [])
        if not found:
            return Verdict("nothing", f"`{name}` is missing")
        if len(found) < len(calls):
            return Verdict("wrong", f"{len(found)} of {len(calls)} calls")
        if len(found) > len(calls):
            return Verdict("wrong", f"{len(found)} calls instead of {len(calls)}")
        if not all(same(value, wanted, tolerance) for value, wanted in zip(found, calls, strict=True)):
            return Verdict("wrong", "other values than the layer put out")
    return RIGHT


def worst(*verdicts: Verdict) -> Verdict:
    order = ["wrong", "nothing", "raises", "not offered", "right"]
    return min(verdicts, key=lambda verdict: order.index(verdict.kind))


def convolved(layer: nn.Conv2d, value: torch.Tensor) -> torch.Tensor:
    bias = None if layer.bias is None else layer.bias.detach()
    return F.conv2d(value, layer.weight.detach(), bias, layer.stride, layer.padding)


# Networks.


def three_convolutions(*, inplace: bool) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.ReLU(inplace),
        nn.Conv2d(4, 5, 3),
        nn.ReLU(inplace),
        nn.Conv2d(5, 2, 3),
    ).eval()


def expected_of(net: nn.Sequential, value: torch.Tensor) -> dict[str, list[torch.Tensor]]:
    expected = {}
    for name, layer in net.named_children():
        if isinstance(layer, nn.Conv2d):
            value = convolved(layer, value)
            expected[name] = [value]
        else:
            value = F.relu(value)
    return expected


def picture(*shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (2, 3, 12, 12)), generator=torch.Generator().manual_seed(1))


# Traps. Each takes the recorder class and returns a verdict; what it raises becomes one.

TRAPS: dict[str, Callable[[type[Recorder]], Verdict]] = {}


def trap(title: str):
    def register(function):
        TRAPS[title] = function
        return function

    return register


def recorded(peer, model, names, *args, mode=torch.no_grad, **options) -> dict[str, list[Any]]:
    with mode(), peer(model, names, **options) as recorder:
        recorder(*args)
        return recorder.read()


@trap("a later layer works in place")
def in_place(peer):
    net, x = three_convolutions(inplace=True), picture()
    return judge(recorded(peer, net, ["0", "2", "4"], x), expected_of(net, x))


@trap("AlexNet, every convolution")
def alexnet(peer):
    from torchvision.models import alexnet

    model, x = alexnet(weights=None).eval(), picture(1, 3, 64, 64)
    value, expected = x, {}
    for name, layer in model.features.named_children():
        if isinstance(layer, nn.Conv2d):
            value = convolved(layer, value)
            expected[f"features.{name}"] = [value]
        elif isinstance(layer, nn.ReLU):
            value = F.relu(value)
        else:
            value = F.max_pool2d(value, layer.kernel_size, layer.stride)
    return judge(recorded(peer, model, list(expected), x), expected)


@trap("an in-place layer's input")
def input_of_in_place(peer):
    net, x = three_convolutions(inplace=True), picture()
    expected = expected_of(net, x)
    return judge(recorded(peer, net, ["1", "3"], x, io="input"), {"1": expected["0"], "3": expected["2"]})


class Pyramid(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Conv2d(3, 2, 3)

    def forward(self, x):
        return self.head(x).mean() + self.head(x[..., 2:]).mean() + self.head(x[..., 2:, 4:]).mean()


@trap("a layer runs several times, with different shapes")
def several_calls(peer):
    net, x = Pyramid().eval(), picture()
    expected = {"head": [convolved(net.head, part) for part in (x, x[..., 2:], x[..., 2:, 4:])]}
    return judge(recorded(peer, net, ["head"], x), expected)


class Auxiliary(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.aux = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        x = self.conv(x)
        return x + self.aux(x) if self.training else x


class Bypass(Auxiliary):
    def forward(self, x):
        return F.conv2d(self.conv(x), self.aux.weight, self.aux.bias)


def one_is_absent(peer, net):
    x = picture()
    found = recorded(peer, net, ["conv", "aux"], x)
    verdict = judge(found, {"conv": [convolved(net.conv, x)]})
    return verdict if verdict is not RIGHT or "aux" not in found else Verdict("wrong", "`aux` did not run")


@trap("a selected layer does not run")
def never_runs(peer):
    return one_is_absent(peer, Auxiliary().eval())


@trap("the model bypasses a layer")
def bypassed(peer):
    return one_is_absent(peer, Bypass().eval())


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 3, 3)
        self.second = self.first

    def forward(self, x):
        return self.first(x) * 2


@trap("a module is shared under two names")
def shared(peer):
    net, x = Shared().eval(), picture()
    value = convolved(net.first, x)
    return judge(recorded(peer, net, ["first", "second"], x), {"first": [value], "second": [value]})


@dataclass
class Pair:
    low: torch.Tensor
    high: torch.Tensor


class Branches(nn.Module):
    def __init__(self, kind: str):
        super().__init__()
        self.conv, self.kind = nn.Conv2d(3, 4, 3), kind

    def forward(self, x):
        low = self.conv(x)
        high = low + 1
        if self.kind == "tuple":
            return low, high
        return {"low": low, "high": high} if self.kind == "dict" else Pair(low, high)


class UsesBranches(nn.Module):
    def __init__(self, kind: str):
        super().__init__()
        self.branches, self.last = Branches(kind), nn.Conv2d(4, 2, 3)

    def forward(self, x):
        pair = self.branches(x)
        if self.branches.kind == "tuple":
            low, high = pair[0], pair[1]
        elif self.branches.kind == "dict":
            low, high = pair["low"], pair["high"]
        else:
            low, high = pair.low, pair.high
        return self.last(low.relu_() + high.mul_(3))


def structure(peer, kind):
    net, x = UsesBranches(kind).eval(), picture()
    low = convolved(net.branches.conv, x)
    found = recorded(peer, net, ["branches", "last"], x, leaves=[Branches])
    last = convolved(net.last, low.relu() + (low + 1) * 3)
    return judge(found, {"branches": [(low, low + 1)], "last": [last]})


@trap("a tuple, changed in place later")
def tuples(peer):
    return structure(peer, "tuple")


@trap("a dict, changed in place later")
def dicts(peer):
    return structure(peer, "dict")


@trap("a dataclass, changed in place later")
def dataclasses(peer):
    return structure(peer, "dataclass")


@trap("recorded in inference mode, used in autograd")
def inference_mode(peer):
    net, x = three_convolutions(inplace=False), picture()
    found = recorded(peer, net, ["0"], x, mode=torch.inference_mode)
    verdict = judge(found, {"0": expected_of(net, x)["0"]})
    value = next(leaves(found["0"]))
    weight = torch.ones((), requires_grad=True)
    (value * weight).sum().backward()
    return verdict


@trap("the model is compiled, and has run")
def compiled_before(peer):
    net, x = three_convolutions(inplace=False), picture()
    model = torch.compile(net, backend="eager")
    with torch.no_grad():
        model(x)
    return judge(recorded(peer, model, ["0", "2", "4"], x), expected_of(net, x))


@trap("the first torch.compile of the process, within the block")
def compiled_within(peer):
    net, x = three_convolutions(inplace=False), picture()
    with torch.no_grad(), peer(net, ["0", "2", "4"]) as recorder:
        recorder.compile()
        recorder(x)
        return judge(recorder.read(), expected_of(net, x))


class Checkpointed(nn.Module):
    def __init__(self, *, reentrant: bool):
        super().__init__()
        self.stem, self.reentrant = nn.Conv2d(3, 4, 3), reentrant
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3))

    def forward(self, x):
        return checkpoint(self.block, self.stem(x), use_reentrant=self.reentrant)


def checkpointed(peer, *, reentrant):
    net, x = Checkpointed(reentrant=reentrant).eval(), picture()
    stem = convolved(net.stem, x)
    expected = {"stem": [stem], "block.0": [convolved(net.block[0], stem)]}
    with peer(net, list(expected)) as recorder:
        output = recorder(x)
        if output is not None and output.requires_grad:
            output.sum().backward()
        return judge(recorder.read(), expected)


@trap("gradient checkpointing, non-reentrant, with backward")
def checkpointing(peer):
    return checkpointed(peer, reentrant=False)


@trap("gradient checkpointing, reentrant, with backward")
def checkpointing_reentrant(peer):
    return checkpointed(peer, reentrant=True)


class Swallows(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.late = nn.Conv2d(3, 3, 3, padding=1), Late()

    def forward(self, x):
        with suppress(Exception):
            x = self.conv(x)
        return self.late(x)


class Late(nn.Module):
    ran = 0

    def forward(self, x):
        Late.ran += 1
        return x + 1


@trap("early stop in a model that catches exceptions")
def swallowed(peer):
    net, x = Swallows().eval(), picture()
    with torch.no_grad(), peer(net, ["conv"], stop=True) as recorder:
        Late.ran = 0
        recorder(x)
        verdict = judge(recorder.read(), {"conv": [convolved(net.conv, x)]})
    return Verdict("wrong", "did not stop") if Late.ran and verdict is RIGHT else verdict


@trap("copy.deepcopy of the model within the block")
def deep_copied(peer):
    net, x = three_convolutions(inplace=False), picture()
    with torch.no_grad(), peer(net, ["0"]) as recorder:
        if not recorder.stands_between_calls:
            raise NotOfferedError("there is no block")
        recorder(x)
        copy.deepcopy(net)(x + 1)
        return judge(recorder.read(), {"0": expected_of(net, x)["0"]})


class Fails(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)

    def forward(self, x):
        return fail(self.conv(x))


@torch.fx.wrap
def fail(x):
    raise ZeroDivisionError


@trap("an exception in the forward pass: what is left behind")
def exception(peer):
    net, x = Fails().eval(), picture()
    with suppress(Exception):
        recorded(peer, net, ["conv"], x)
    gc.collect()  # the recorder is gone, and whatever it cleans up in `__del__`
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules())
    if hooks:
        return Verdict("wrong", f"{hooks} hooks stay for as long as the model lives")
    if "forward" in net.conv.__dict__:
        return Verdict("wrong", "`forward` of each module stays replaced")
    return RIGHT


class Pause(nn.Module):
    meanwhile: Callable[[], Any] | None = None

    def forward(self, x):
        meanwhile, Pause.meanwhile = Pause.meanwhile, None
        if meanwhile is not None:
            meanwhile()
        return x


@trap("another thread runs the model meanwhile")
def another_thread(peer):
    net, x = nn.Sequential(nn.Conv2d(3, 4, 3), Pause(), nn.Conv2d(4, 4, 3)).eval(), picture()
    value = convolved(net[0], x)
    expected = {"0": [value], "2": [convolved(net[2], value)]}
    problems = []

    def elsewhere():
        try:
            with torch.no_grad():
                net(x + 1)
        except BaseException as error:
            problems.append(error)

    def meanwhile():
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()

    with torch.no_grad(), peer(net, ["0", "2"], leaves=[Pause]) as recorder:
        Pause.meanwhile = meanwhile
        recorder(x)
        verdict = judge(recorder.read(), expected)
    if verdict is RIGHT and problems:
        return Verdict("wrong", f"the other thread fails: {reason(problems[0])}")
    return verdict


@trap("a quantised convolution")
def quantised(peer):
    from torch.ao.nn import quantized

    layer = quantized.Conv2d(3, 4, 3)
    layer.set_weight_bias(
        torch.quantize_per_tensor(picture(4, 3, 3, 3), 0.05, 0, torch.qint8), torch.zeros(4)
    )
    layer.scale, layer.zero_point = 0.1, 64
    net = nn.Sequential(quantized.Quantize(0.05, 64, torch.quint8), layer, quantized.DeQuantize()).eval()
    x = picture()
    taken = torch.quantize_per_tensor(x, 0.05, 64, torch.quint8).dequantize()
    wanted = F.conv2d(taken, layer.weight().dequantize())
    wanted = torch.quantize_per_tensor(wanted, 0.1, 64, torch.quint8).dequantize()
    found = recorded(peer, net, ["1"], x)
    if "1" in found:
        if not all(tensor.is_quantized for tensor in leaves(found["1"])):
            return Verdict("wrong", "not a quantised tensor")
        found["1"] = [tensor.dequantize() for tensor in leaves(found["1"])]
    return judge(found, {"1": [wanted]}, tolerance=0.11)  # integer arithmetic may round to the next step


@trap("autocast")
def autocast(peer):
    net, x = three_convolutions(inplace=False), picture()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = recorded(peer, net, ["0"], x)
    wanted = F.conv2d(x.bfloat16(), net[0].weight.detach().bfloat16(), net[0].bias.detach().bfloat16())
    return judge(found, {"0": [wanted]}, tolerance=0.05)


@trap("channels_last")
def channels_last(peer):
    net, x = three_convolutions(inplace=False), picture().to(memory_format=torch.channels_last)
    found = recorded(peer, net, ["0"], x)
    verdict = judge(found, {"0": expected_of(net, x)["0"]})
    with torch.no_grad():
        own = net[0](x).stride()
    if verdict is RIGHT and next(leaves(found["0"])).stride() != own:
        return Verdict("wrong", "other strides")
    return verdict


@trap("meta tensors")
def meta(peer):
    net, x = three_convolutions(inplace=False).to("meta"), picture().to("meta")
    found = recorded(peer, net, ["0"], x)
    if not found.get("0"):
        return Verdict("nothing")
    tensor = next(leaves(found["0"]))
    return RIGHT if tensor.shape == (2, 4, 10, 10) and tensor.is_meta else Verdict("wrong")


@trap("torch.vmap over the call, read inside it")
def vmap(peer):
    net, x = three_convolutions(inplace=False), picture()
    with torch.no_grad(), peer(net, ["0"]) as recorder:

        def one(image):
            recorder(image[None])
            return next(leaves(recorder.read()["0"]))[0]

        found = torch.vmap(one)(x)
    return judge({"0": [found]}, {"0": expected_of(net, x)["0"]})


@trap("a scripted model")
def scripted(peer):
    net, x = three_convolutions(inplace=False), picture()
    return judge(recorded(peer, torch.jit.script(net), ["0"], x), {"0": expected_of(net, x)["0"]})


@trap("a limit on memory")
def memory(peer):
    net, x = three_convolutions(inplace=False), picture()
    recorder = peer(net, ["0", "2", "4"])
    recorder.limit(4_000)  # the first convolution's output has 3,200 bytes, the second's 2,560
    try:
        with torch.no_grad(), recorder:
            recorder(x)
    except (MemoryError, RuntimeError) as error:
        if not any(word in type(error).__name__ for word in ("Memory", "Budget")):
            raise
        return Verdict("right", reason(error))
    return Verdict("wrong", "the limit was passed")


# Running.


def reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:150]}"


def run_cell(name: str, title: str) -> Verdict:
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        return TRAPS[title](PEERS[name])
    except NotOfferedError as error:
        return Verdict("not offered", str(error))
    except BaseException as error:
        return Verdict("raises", reason(error))


def cell(name: str, title: str) -> Verdict:
    """Run one trap in a fork of this process, which has imported torch and done nothing with it."""
    if installed(name) is None:
        return Verdict("missing", "not installed")
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, pickle.dumps(run_cell(name, title)))
        finally:
            os._exit(0)
    os.close(writing)
    try:
        if not select.select([reading], [], [], SECONDS)[0]:
            return Verdict("raises", f"nothing within {SECONDS} s")
        answer = os.read(reading, 1 << 16)
        return pickle.loads(answer) if answer else Verdict("raises", "the process died")
    finally:
        os.close(reading)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def installed(name: str) -> str | None:
    try:
        return version(PEERS[name].distribution)
    except PackageNotFoundError:
        return None


@contextmanager
def progress(text: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    if sys.stderr.isatty():
        print(f"{text}: {time.monotonic() - start:.0f} s", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--markdown", action="store_true", help="print a table for the docs")
    parser.add_argument("--peer", choices=PEERS, help="only this one")
    parser.add_argument("--trap", default="", help="only traps that have this in their title")
    arguments = parser.parse_args()
    names = [arguments.peer] if arguments.peer else list(PEERS)
    versions = [
        f"{name} {installed(name) or 'not installed'}" for name in names if name not in ("here", "hooks")
    ]
    print(", ".join([f"torch {torch.__version__}", *versions]))
    if arguments.markdown:
        print("", f"| case | {' | '.join(names)} |", f"|---|{':-:|' * len(names)}", sep="\n")
    for title in TRAPS:
        if arguments.trap not in title:
            continue
        with progress(title) if not arguments.markdown else nullcontext():
            verdicts = {name: cell(name, title) for name in names}
        if arguments.markdown:
            print(f"| {title} | {' | '.join(SYMBOLS[v.kind] for v in verdicts.values())} |", flush=True)
            continue
        print(f"\n{title}")
        for name, verdict in verdicts.items():
            print(f"  {SYMBOLS[verdict.kind]} {name:15}{verdict.kind:12}{verdict.note}", flush=True)


if __name__ == "__main__":
    main()
