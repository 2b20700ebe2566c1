"""The peers of `capture` behind one face: how each is told to record layers, by its documentation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class NotOfferedError(Exception):
    """The peer has no such function."""


class Recorder:
    """What one peer records of some layers: made for a model, entered, called, then read."""

    distribution = ""
    stands_between_calls = False

    def __init__(self, model: nn.Module, names: list[str], *, io="output", stop=False, leaves=()):
        self.model, self.names, self.io, self.stop, self.leaves = model, names, io, stop, list(leaves)
        self.run: Callable[..., Any] = model
        self.attach()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def __call__(self, *args):
        return self.run(*args)

    def attach(self) -> None:
        raise NotImplementedError

    def read(self) -> dict[str, list[Any]]:
        """Return, for each layer that has run, what it put out (or took) in each of its calls."""
        raise NotImplementedError

    def compile(self) -> None:
        """Compile the model now that the recorder stands."""
        raise NotOfferedError("there is no block to compile in")

    def limit(self, limit: int) -> None:
        """Hold no more than this many bytes."""
        raise NotOfferedError

    def refuse(self, *options: str) -> None:
        for option in options:
            if self.stop if option == "stop" else self.io == option:
                raise NotOfferedError(option)

    def own_name(self, name: str) -> str:
        known = dict(self.model.named_modules(remove_duplicate=False))
        return f"_orig_mod.{name}" if name not in known and f"_orig_mod.{name}" in known else name


class Here(Recorder):
    distribution = "torchlens_viz"
    stands_between_calls = True

    def attach(self):
        self.make(max_bytes=None)

    def make(self, max_bytes):
        from torchlens_viz import capture

        self.block = capture(self.model, self.names, io=self.io, stop=self.stop, max_bytes=max_bytes)

    def __enter__(self):
        self.acts = self.block.__enter__()
        return self

    def __exit__(self, *exception):
        return self.block.__exit__(*exception)

    def read(self):
        return {name: list(self.acts.calls(name)) for name in self.names if name not in self.acts.not_called}

    def compile(self):
        self.run = torch.compile(self.model, backend="eager")

    def limit(self, limit):
        self.make(max_bytes=limit)


class Hooks(Recorder):
    distribution = "torch"
    stands_between_calls = True

    def attach(self):
        self.kept, self.handles = {}, []
        modules = dict(self.model.named_modules(remove_duplicate=False))
        for name in self.names:
            module = modules[self.own_name(name)]
            if self.io == "input":
                self.handles.append(module.register_forward_pre_hook(self.before(name)))
            else:
                self.handles.append(module.register_forward_hook(self.after(name)))

    def before(self, name):
        kept = self.kept

        def hook(module, args):
            kept[name] = args[0].detach()

        return hook

    def after(self, name):
        kept, stop = self.kept, self.stop

        def hook(module, args, output):
            kept[name] = output.detach() if isinstance(output, torch.Tensor) else output
            if stop:
                raise RuntimeError("stop here")

        return hook

    def __exit__(self, *exception):
        for handle in self.handles:
            handle.remove()

    def read(self):
        return {name: [value] for name, value in self.kept.items()}

    def compile(self):
        self.run = torch.compile(self.model, backend="eager")


class Torchvision(Recorder):
    distribution = "torchvision"

    def attach(self):
        self.refuse("input")
        from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

        options = {"tracer_kwargs": {"leaf_modules": self.leaves}, "suppress_diff_warning": True}
        _, nodes = get_graph_node_names(self.model, **options)
        self.nodes = {}
        for name in self.names:  # a layer's second call is its own node, with a number at its end
            own = self.own_name(name)
            again = [n for n in nodes if n.startswith(f"{own}_") and n.removeprefix(f"{own}_").isdecimal()]
            self.nodes[name] = [own, *again]
        wanted = [node for nodes in self.nodes.values() for node in nodes]
        self.run = create_feature_extractor(self.model, wanted, **options)

    def __call__(self, *args):
        self.values = self.run(*args)

    def read(self):
        return {name: [self.values[node] for node in nodes] for name, nodes in self.nodes.items()}

    def compile(self):
        self.run = torch.compile(self.run, backend="eager")


class Timm(Recorder):
    distribution = "timm"
    stands_between_calls = True

    def attach(self):
        self.refuse("stop")
        from timm.models import FeatureHooks

        kind = "forward_pre" if self.io == "input" else "forward"
        hooks = [{"module": self.own_name(name), "hook_type": kind} for name in self.names]
        self.hooks = FeatureHooks(hooks, self.model.named_modules(), out_map=self.names)

    def __call__(self, *args):
        self.device = args[0].device
        return self.run(*args)

    def read(self):
        return {name: [value] for name, value in self.hooks.get_output(self.device).items()}

    def compile(self):
        self.run = torch.compile(self.model, backend="eager")


class Torchextractor(Recorder):
    distribution = "torchextractor"
    stands_between_calls = True

    def attach(self):
        self.refuse("input", "stop")
        from torchextractor import Extractor

        self.own = {self.own_name(name): name for name in self.names}
        self.run = self.extractor = Extractor(self.model, list(self.own))

    def __call__(self, *args):
        output, _ = self.run(*args)
        return output

    def read(self):
        return {self.own[name]: [value] for name, value in self.extractor.collect().items()}

    def compile(self):
        self.run = torch.compile(self.extractor, backend="eager")


class Captum(Recorder):
    distribution = "captum"

    def attach(self):
        self.refuse("stop")
        from captum.attr import LayerActivation

        modules = dict(self.model.named_modules(remove_duplicate=False))
        self.layers = LayerActivation(self.model, [modules[self.own_name(name)] for name in self.names])

    def __call__(self, *args):
        self.values = self.layers.attribute(args, attribute_to_layer_input=self.io == "input")

    def read(self):
        return {name: [value] for name, value in zip(self.names, self.values, strict=True)}


class Torchlens(Recorder):
    distribution = "torchlens"

    def attach(self):
        import torchlens

        self.options = {}
        if self.stop:
            self.options["halt"] = torchlens.module(self.names[-1])

    def __call__(self, *args):
        import torchlens

        self.log = torchlens.trace(self.model, list(args), **self.options)
        return None if self.stop else self.log[self.log.output_layers[0]].out

    def read(self):
        values = {}
        for name in self.names:
            try:
                module = self.log.modules[name]
            except KeyError:
                continue
            calls = list(module.calls.values())
            if self.io == "input":
                calls = [[self.log[label].out for label in call.input_ops] for call in calls]
            else:
                calls = [list(call.outs) for call in calls]
            values[name] = calls
        return values

    def limit(self, limit):
        import torchlens

        self.options["capture"] = torchlens.options.CaptureOptions(save_budget=limit)


class Nnsight(Recorder):
    distribution = "nnsight"

    def attach(self):
        from nnsight import NNsight

        self.traced = NNsight(self.model)
        self.paths = {name: f"model.{self.own_name(name)}" for name in self.names}

    def __call__(self, *args):
        paths, traced, is_input = list(self.paths.values()), self.traced, self.io == "input"
        if self.stop:
            last = traced.get(self.own_name(self.names[-1]))
            with traced.trace(*args) as tracer:
                cache = tracer.cache(modules=paths)
                last.output  # noqa: B018 - waits for the layer
                tracer.stop()
            self.cache = cache
            return None
        with traced.trace(*args) as tracer:
            cache = tracer.cache(modules=paths, include_inputs=is_input, include_output=not is_input)
            output = traced.output.save()
        self.cache = cache
        return output

    def read(self):
        values = {}
        for name, path in self.paths.items():
            if path in self.cache.keys():  # noqa: SIM118 - a view, not a mapping
                found = self.cache[path]
                value = found.input if self.io == "input" else found.output
                values[name] = value if len(found) > 1 else [value]
        return values


PEERS: dict[str, type[Recorder]] = {
    "here": Here,
    "hooks": Hooks,
    "torchvision": Torchvision,
    "timm": Timm,
    "torchextractor": Torchextractor,
    "captum": Captum,
    "torchlens": Torchlens,
    "nnsight": Nnsight,
}
