"""A model cut at the layers that an objective looks at: images in, a score per image out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Literal, NamedTuple, final

import torch
from torch import nn

from torchlens_viz.backprop.device import autocasting
from torchlens_viz.backprop.network import Cut, shadow_of
from torchlens_viz.backprop.objective import Objective, Scene
from torchlens_viz.errors import (
    CaptureError,
    CaptureMemoryError,
    InvalidArgumentError,
    ModelFailedError,
    TorchlensVizError,
    calling,
    is_out_of_memory,
    one_line,
    reason_of,
)
from torchlens_viz.hooks.activations import Activations
from torchlens_viz.hooks.capture import capture
from torchlens_viz.hooks.layout import Layout
from torchlens_viz.models.layers import Selector, select_one
from torchlens_viz.models.state import device_of, refuse_quantized
from torchlens_viz.models.watching import Parting, address_of

_LINEAR: Final = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear,
)  # fmt: skip


class Sensitivity(NamedTuple):
    """What an affine objective is in terms of what its layer takes: `offset + (slope * taken).sum()`.

    Attributes:
        offset: (N,) float32.
        slope: (N, ...) float32, in the shape of what the layer takes.
    """

    offset: torch.Tensor
    slope: torch.Tensor


class Evaluation(NamedTuple):
    """What the network makes of images in true float32.

    Attributes:
        scores: (N,) the objective.
        means: (N, C) the mean of every channel of the layer.
    """

    scores: torch.Tensor
    means: torch.Tensor


@final
class Scorer:
    """Scores images by an objective; the model that it is made of is not touched, only copied.

    Args:
        model: The network.
        layer: Which of its layers, by a selector that finds exactly one.
        objective: What to score.
        example: (1, C, ...) float32, an image like those to come, of one to three spatial axes: the network
            runs once on it, to learn what shapes it has.
        preprocess: Makes of images what the model takes; None takes them as they are.
        dtype: What the network computes gradients in.
        channel_dim: Which dimension of what its layers put out counts channels; None finds it.
        is_compiled: Whether `torch.compile` is to be used for the gradients.

    Raises:
        CaptureError: The layer does not run.
        CaptureMemoryError: There is no room for a single image.
        InvalidArgumentError: The network cannot take such images, or the layer puts out no channels.
    """

    def __init__(
        self,
        model: nn.Module,
        layer: Selector,
        objective: Objective,
        example: torch.Tensor,
        *,
        preprocess: Callable[[torch.Tensor], torch.Tensor] | None,
        dtype: torch.dtype,
        channel_dim: int | None,
        is_compiled: bool,
    ) -> None:
        self.objective = objective
        self.layer = select_one(model, layer).name
        self.device = device_of(model)
        self.dtype = dtype
        self.is_compiled = is_compiled
        self._preprocess = preprocess
        self._others = {
            other: select_one(model, other).name for other in objective.layers if other is not None
        }
        self._layers = [self.layer, *sorted({*self._others.values()} - {self.layer})]
        self._channel_dim = channel_dim
        keeps_types = False
        self._copy(model, keeps_types=False)
        try:
            acts = self._look(example)
        except InvalidArgumentError:
            types = {each.dtype for each in model.parameters() if each.is_floating_point()}
            if len(types) < 2:
                raise
            keeps_types = True  # a model of several types may convert by itself
            self._copy(model, keeps_types=True)
            acts = self._look(example)
        self._module = select_one(self._exact, self.layer).module
        taken, output = acts.calls(self.layer)[0]
        self._check_rows(output, len(example))
        self.channel_dim = self._layout.channel_dim(output, self.layer)
        self.channels = int(self._by_channel(output, self.layer).shape[1])
        self._taken_shape = taken.shape[1:] if self._stands_for(acts, taken) else None
        io: Literal["input", "output"] = "input" if self.is_affine else "output"
        # Another one in any case, as it is cut for good; of the first, which has written what it writes.
        self._fast = shadow_of(self._exact, dtype=dtype, keeps_types=keeps_types)
        if self._memory_format == torch.contiguous_format:
            self._fast.to(memory_format=torch.contiguous_format)
        self._cut = Cut(self._fast, self._layers, io=io, is_compiled=is_compiled)

    def _copy(self, model: nn.Module, *, keeps_types: bool) -> None:
        self._exact = shadow_of(model, keeps_types=keeps_types)
        self._parting = Parting(self._exact)
        self._memory_format = torch.channels_last
        self._layout = Layout([select_one(self._exact, name) for name in self._layers], self._channel_dim)

    @property
    def is_affine(self) -> bool:
        """Whether the layer itself need not run: `sensitivity` stands for it and the objective."""
        return self._taken_shape is not None

    def _look(self, images: torch.Tensor) -> Activations:
        """Run the network once, and return what the layers took and put out."""
        prepared = self._prepared(images)
        looking = capture(self._exact, self._layers, io="both", stop=True)
        try:
            try:
                with torch.no_grad(), self._parting.on(), self._layout.following(), looking as acts:
                    self._exact(prepared)
            except RuntimeError:  # perhaps of `view`, which many a model uses where it means `reshape`
                self._memory_format = torch.contiguous_format
                prepared = self._prepared(images)
                with torch.no_grad(), self._parting.on(), self._layout.following(), looking as acts:
                    self._exact(prepared)
        except TorchlensVizError:
            raise
        except Exception as error:  # whatever the model raises
            if is_out_of_memory(error):
                raise CaptureMemoryError(
                    "a single image is more than there is memory for; choose a smaller `size`, an earlier "
                    f"layer, or a larger device ({reason_of(error)})"
                ) from error
            after = f" (after `preprocess`, {tuple(prepared.shape[1:])})" if self._preprocess else ""
            raise ModelFailedError(
                f"the model cannot take images of shape {tuple(images.shape[1:])}{after}: "
                f"{reason_of(error)}; choose another `size`, `image` or `preprocess`, or say "
                "with `inputs` what it takes beside images"
            ) from error
        if acts.not_called:
            raise CaptureError(
                f"`{acts.not_called[0]}` does not run on this input, so that nothing can drive it: choose a "
                "layer that runs in eval mode"
            )
        for name in self._layers:
            output = acts.calls(name)[0].output
            if not isinstance(output, torch.Tensor) or not output.is_floating_point():
                refuse_quantized(self._exact)
            _check_output(name, output)
            self._layout.channel_dim(output, name)  # while it is known how it was made
        return acts

    def _check_rows(self, output: torch.Tensor, images: int) -> None:
        if len(output) != images:
            raise InvalidArgumentError(
                f"`layer` must put out one row per image, (N, C, ...), got {_kind(output)} from "
                f"`{self.layer}` for one image: it folds windows into the batch, or counts the batch in "
                "another dimension; choose a layer around it"
            )
        if self._layout.channel_dim(output, self.layer) == 0:
            raise InvalidArgumentError(
                f"`channel_dim` must be a dimension after the first of {tuple(output.shape)}, got 0"
            )

    def _stands_for(self, acts: Activations, taken: object) -> bool:
        """Tell whether the objective is affine in what the layer takes, so that the layer need not run."""
        module = self._module
        has_hooks = bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))
        runs_once = len(acts.calls(self.layer)) == 1 and len(self._layers) == 1
        is_plain = type(module) in _LINEAR and not has_hooks and isinstance(taken, torch.Tensor)
        is_plain = is_plain and all(each.dtype == torch.float32 for each in module.parameters())
        return self.objective.is_linear and runs_once and is_plain

    def require_type(self, example: torch.Tensor) -> None:
        """Hold that the network runs in the type that gradients are to be computed in.

        Args:
            example: (1, C, ...), an image.

        Raises:
            InvalidArgumentError: It does not: not every operation takes values of two types.
        """
        if self.dtype == torch.float32:
            return
        try:
            with torch.no_grad(), autocasting(self.device, self.dtype):
                self._cut(self._prepared(example), eagerly=True)
        except Exception as error:  # whatever the model raises
            if is_out_of_memory(error):
                return  # which is said where the batch is chosen
            raise InvalidArgumentError(
                f"the model runs in float32 and fails in {str(self.dtype).removeprefix('torch.')} "
                f'({one_line(error)}); pass `precision="float32"`'
            ) from error

    def sensitivity(self, images: torch.Tensor, channels: torch.Tensor) -> Sensitivity:
        """Return what an affine objective is for N channels: one backward pass through the layer alone."""
        assert self._taken_shape is not None
        taken = torch.zeros(len(channels), *self._taken_shape, device=self.device, requires_grad=True)
        with torch.enable_grad():  # also where a climb begins anew, amid steps without a graph
            output = self._by_channel(self._module(taken), self.layer)
            offset = self.objective(self._scene(images, channels, {self.layer: output}))
            (slope,) = torch.autograd.grad(offset.sum(), taken)
        slope = self._laid_out(slope)
        return Sensitivity(offset.detach(), slope)

    def scores(
        self,
        images: torch.Tensor,
        seen: torch.Tensor,
        channels: torch.Tensor,
        sensitivity: Sensitivity | None,
        *,
        eagerly: bool = False,
    ) -> torch.Tensor:
        """Return the score of every image, (N,) float32, on the graph of `images`.

        Args:
            images: (N, C, ...), the images as they are.
            seen: (N, C, ...), the images as the network is to see them.
            channels: (N,) int64, what each is to maximise.
            sensitivity: For an affine objective, that of these channels.
            eagerly: Run in plain Python even if it is compiled.
        """
        prepared = self._prepared(seen)
        with autocasting(self.device, self.dtype):
            values = self._cut(prepared, eagerly=eagerly)
        if sensitivity is None:
            activations = {name: self._by_channel(value, name) for name, value in values.items()}
            return self.objective(self._scene(images, channels, activations))
        taken: torch.Tensor = values[self.layer]
        return sensitivity.offset + (taken.float() * sensitivity.slope).flatten(1).sum(1)

    def saved_bytes(self, images: torch.Tensor) -> int:
        """Return how much memory the graph of one step holds on to."""
        held: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            if address := address_of(tensor):
                held[address] = tensor.untyped_storage().nbytes()
            return tensor.detach()  # a result that its own graph holds would never be freed

        images = images.detach().requires_grad_()
        channels = torch.zeros(len(images), dtype=torch.int64, device=self.device)
        sensitivity = self.sensitivity(images, channels) if self.is_affine else None
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            scores = self.scores(images, images, channels, sensitivity, eagerly=True)
        del scores
        weights = set(map(address_of, self._fast.parameters()))
        return sum(size for place, size in held.items() if place not in weights)

    def evaluate(self, images: torch.Tensor, channels: torch.Tensor) -> Evaluation:
        """Return what the network makes of images, untransformed and in true float32."""
        with torch.no_grad():
            with capture(self._exact, self._layers, stop=True) as acts:
                self._exact(self._prepared(images))
            activations = {name: self._by_channel(acts.calls(name)[0], name) for name in self._layers}
            scores = self.objective(self._scene(images, channels, activations))
        target = activations[self.layer].float()
        return Evaluation(scores, target.flatten(2).mean(2) if target.ndim > 2 else target)

    def _scene(self, images: torch.Tensor, channels: torch.Tensor, acts: dict[str, torch.Tensor]) -> Scene:
        called = {other: acts[name] for other, name in self._others.items()}  # a glob, or a wrapped name
        return Scene(images=images, channels=channels, target=self.layer, activations={**acts, **called})

    def _prepared(self, images: torch.Tensor) -> torch.Tensor:
        if self._preprocess is None:  # a copy in any case: the network may work in place on what it gets
            is_plane = images.ndim == 4
            return images.clone(memory_format=self._memory_format if is_plane else torch.contiguous_format)
        with calling("preprocess(images)", "make a batch of a batch (N, C, H, W)"):
            prepared = self._preprocess(images.clone())
        if not isinstance(prepared, torch.Tensor) or len(prepared) != len(images):
            raise InvalidArgumentError(
                f"`preprocess` must make a batch of a batch (N, C, ...), got {_kind(prepared)} for "
                f"{tuple(images.shape)}"
            )
        if prepared.is_floating_point():
            prepared = prepared.float()  # the network is float32, whatever the model is
        return self._laid_out(prepared)

    def _laid_out(self, values: torch.Tensor) -> torch.Tensor:
        """Return images, or maps, as the network computes fastest with them."""
        return values.contiguous(memory_format=self._memory_format) if values.ndim == 4 else values

    def _by_channel(self, values: torch.Tensor, layer: str) -> torch.Tensor:
        return values.movedim(self._layout.channel_dim(values, layer), 1).float()


def _check_output(layer: str, output: object) -> None:
    if not isinstance(output, torch.Tensor) or output.ndim < 2 or not output.is_floating_point():
        raise InvalidArgumentError(
            f"`layer` must put out one tensor (N, C, ...), got {_kind(output)} from `{layer}`; "
            "choose a layer inside it"
        )


def _kind(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"
