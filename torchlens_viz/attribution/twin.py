"""A private copy of a network that is asked for scores, and for the maps of layers as leaves of its graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
from torch import nn

from torchlens_viz.attribution.goal import Goal
from torchlens_viz.backprop.device import isolated
from torchlens_viz.backprop.leaves import Leaves, Muted
from torchlens_viz.backprop.network import shadow_of
from torchlens_viz.draw.maps import maps_of
from torchlens_viz.errors import (
    CaptureError,
    CaptureMemoryError,
    InvalidArgumentError,
    ModelFailedError,
    TorchlensVizError,
    is_out_of_memory,
    one_line,
)
from torchlens_viz.hooks.capture import Capture
from torchlens_viz.hooks.forward import refuse_torchscript, refuse_unhookable
from torchlens_viz.hooks.layout import Layout, mixes_layouts
from torchlens_viz.hooks.sink import Sink
from torchlens_viz.models.keeping import same_random_numbers
from torchlens_viz.models.layers import select
from torchlens_viz.models.state import device_of, going_back, inference, refuse_quantized
from torchlens_viz.models.watching import Parting


@dataclass(frozen=True, slots=True)
class Maps:
    """What a layer put out, and how the score changes with it.

    Attributes:
        layer: The layer's name.
        values: (N, C, h, w) float32.
        gradients: (N, C, h, w) float32; zeros where none were asked for.
        channel_dim: The dimension that counted channels in what the layer put out.
        is_connected: Whether the score depends on the layer.
    """

    layer: str
    values: torch.Tensor
    gradients: torch.Tensor
    channel_dim: int
    is_connected: bool


@final
class Twin:
    """A copy of a model that shares its weights, in eval mode and float32, which nobody else uses.

    Nothing of it requires a gradient, so that a graph begins where a layer's maps are made a leaf, and a
    backward pass ends there.

    Args:
        model: Any module; wrappers (`torch.compile`, DDP) are left out.
        channel_dim: The dimension of what layers put out that counts channels; None finds it.
        grid: Rows and columns in which the last tokens of a transformer lie.
        keeps_types: Leave weights in their types, for a model that converts what its parts take by itself.

    Raises:
        CaptureError: The model is TorchScript.
        InvalidArgumentError: It has lazy parameters, without values yet.
        InvalidTypeError: It cannot be copied.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        channel_dim: int | None,
        grid: tuple[int, int] | None,
        keeps_types: bool = False,
    ) -> None:
        refuse_torchscript(model)
        with torch.inference_mode(False):  # what is made in that mode takes no part in a graph
            self.model = shadow_of(model, keeps_types=keeps_types)
        self._in_first_pass: Callable[[], AbstractContextManager[None]] = Parting(self.model).on
        self.keeps_types = keeps_types
        self.channel_dim = channel_dim
        self.grid = grid
        self.device = device_of(self.model)
        self.mixes_layouts = mixes_layouts(self.model)
        self._grows = True  # whether a batch may grow at a layer, until the network has shown that it may not

    def again(self) -> Twin:
        """Return another copy, of which the weights may be replaced."""
        return Twin(self.model, channel_dim=self.channel_dim, grid=self.grid, keeps_types=self.keeps_types)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Compute with gradients and in true float32, and leave modes and random numbers as they were."""
        with same_random_numbers(), isolated(self.device):
            yield

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Run the block without gradients, and leave the copy as it is: it may learn from what it sees."""
        in_first_pass, self._in_first_pass = self._in_first_pass, _nothing
        try:
            with inference(self.model):
                yield
        finally:
            self._in_first_pass = in_first_pass

    def scores(self, batch: torch.Tensor, goal: Goal) -> torch.Tensor:
        """Return the score of every row of a batch, on its graph."""
        return goal.scores(self.output(batch), len(batch))

    def maps(self, batch: torch.Tensor, layers: Sequence[str], goal: Goal, *, gradients: bool = True) -> Any:
        """Run once, and return the score of every image (N,) and the `Maps` of every layer.

        Args:
            batch: (N, C, H, W), what the model takes.
            layers: Names of layers.
            goal: What to score.
            gradients: Take the gradients of the scores.

        Raises:
            CaptureError: A layer does not run.
            InvalidArgumentError: A layer runs several times or puts out no maps, or no score depends on any
                of the layers.
        """
        leaves = Leaves()
        layout = Layout(select(self.model, list(layers)), self.channel_dim)
        with layout.following() if self.mixes_layouts else _nothing(), self.capture(layers, leaves):
            scores = self.scores(batch, goal)
            dims = {}
            for name in layers:
                if any(getattr(each, "is_quantized", False) for each in leaves.calls.get(name, [])):
                    refuse_quantized(self.model)
                tensor = _only(name, leaves.calls.get(name, []), len(batch))
                dims[name] = layout.channel_dim(tensor, name) if self._must_ask(tensor, batch) else 1
        self._refuse_shared(leaves.shared(), batch, goal, scores)
        tensors = [leaves.calls[name][0] for name in layers]
        if self.grid is not None and not any(tensor.ndim == 3 for tensor in tensors):
            raise InvalidArgumentError(
                f"`grid` has no effect on `{layers[0]}`, which puts out no tokens (N, L, C) but shape "
                f"{tuple(tensors[0].shape)}; leave it out"
            )
        taken: list[torch.Tensor | None] = [None] * len(tensors)
        if gradients and scores.requires_grad:
            with going_back(), fitting():
                leaves_only = [each for each in tensors if each.requires_grad]
                found = iter(torch.autograd.grad(scores.sum(), leaves_only, allow_unused=True))
            taken = [next(found) if each.requires_grad else None for each in tensors]
        if gradients and all(each is None for each in taken):
            raise InvalidArgumentError(
                f"`layer` must lie on the way to the score, but no gradient leads from the score to "
                f"{', '.join(f'`{name}`' for name in layers)}: it is beside that way, or the model runs what "
                "comes after it under `torch.no_grad`, or `target` detaches; choose another layer or target"
            )
        return scores.detach().float(), [
            Maps(
                name,
                self._as_maps(tensor, name, dims[name]),
                self._as_maps(torch.zeros_like(tensor) if each is None else each, name, dims[name]),
                dims[name],
                each is not None,
            )
            for name, tensor, each in zip(layers, tensors, taken, strict=True)
        ]

    def _refuse_shared(
        self, layers: Sequence[str], batch: torch.Tensor, goal: Goal, scores: torch.Tensor
    ) -> None:
        """Refuse layers that share memory, where scores are others than without a look at them."""
        if not layers:
            return
        with torch.no_grad():
            expected = self.scores(batch, goal)
        size = float(expected.nan_to_num(0.0).abs().max())
        if not torch.allclose(scores.detach(), expected, rtol=1e-3, atol=1e-4 * size, equal_nan=True):
            raise InvalidArgumentError(
                f"`layer` must put out maps of its own, but `{layers[0]}` puts out memory that it took, and "
                "the model writes to it in place later; choose the layer before it"
            )

    def ablated(
        self, batch: torch.Tensor, maps: Maps, channels: Sequence[int], goal: Goal, scores: torch.Tensor
    ) -> torch.Tensor:
        """Return the scores with one channel of a layer set to zero at a time, (channels, N) float32.

        What comes before the layer runs once for all channels, where the network allows it: the batch grows
        at the layer. A part without any change tells whether it does; if its scores are others than before,
        all of the network runs on the larger batch. A function of the caller's always gets N rows.

        Args:
            batch: (N, C, H, W), what the model takes.
            maps: What the layer puts out for it.
            channels: Which channels.
            goal: What to score.
            scores: (N,) the scores without any change.
        """
        images = len(batch)
        with torch.no_grad():
            if goal.function is not None:
                return torch.cat([self._muted(batch, maps, [channel], 0, goal) for channel in channels])
            if self._grows:
                try:
                    found = self._muted(batch, maps, channels, 1, goal)
                    if torch.allclose(found[0], scores, rtol=1e-3, atol=1e-4 * float(scores.abs().max())):
                        return found[1:]
                except InvalidArgumentError:  # it counts the images before the layer
                    pass
                self._grows = False
            return self._muted(torch.cat([batch] * len(channels)), maps, channels, 0, goal, images)

    def _muted(
        self,
        batch: torch.Tensor,
        maps: Maps,
        channels: Sequence[int],
        intact: int,
        goal: Goal,
        images: int | None = None,
    ) -> torch.Tensor:
        images = images or len(batch)
        parts = len(channels) + intact
        with self.capture([maps.layer], Muted(images, maps.channel_dim, channels, intact=intact)):
            output = self.output(batch)
        return goal.scores(output, parts * images).float().view(parts, images)

    def capture(self, layers: Sequence[str], sink: Sink[Any]) -> Capture[Any]:
        """Hook layers of the copy."""
        selected = select(self.model, list(layers))
        check = partial(refuse_unhookable, self.model, selected, stop=False, compiled="eager")
        return Capture(self.model, selected, check, sink)

    def _must_ask(self, tensor: torch.Tensor, batch: torch.Tensor) -> bool:
        return self.channel_dim is not None or self.mixes_layouts or tensor.ndim != batch.ndim

    def _as_maps(self, tensor: torch.Tensor, layer: str, dim: int) -> torch.Tensor:
        grid = self.grid if tensor.ndim == 3 else None
        what = f"what `{layer}` puts out"
        rows = [maps_of(tensor, row, channel_dim=dim, grid=grid, what=what) for row in range(len(tensor))]
        return torch.stack(rows).float()

    def output(self, batch: torch.Tensor) -> Any:
        """Return what the copy makes of a batch.

        Raises:
            CaptureMemoryError: There is not enough memory.
            InvalidArgumentError: It cannot take the batch.
        """
        try:
            with fitting(), self._in_first_pass():
                self._in_first_pass = _nothing
                return self.model(batch.clone())  # it may work in place on what it gets
        except TorchlensVizError:
            raise
        except Exception as error:  # whatever the model raises
            raise ModelFailedError(
                f"the model cannot take images of shape {tuple(batch.shape[1:])}: {one_line(error)}; choose "
                "another `image` or `preprocess`, or say with `inputs` what it takes beside images"
            ) from error


@contextmanager
def fitting() -> Iterator[None]:
    """Say what to do where memory runs out within."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise CaptureMemoryError(
            "there is not enough memory for this batch; explain fewer images at a time, or choose a layer "
            f"nearer to the output ({one_line(error)})"
        ) from error


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _only(name: str, calls: Sequence[Any], rows: int) -> torch.Tensor:
    """Return what the only call of a layer put out, a row per image."""
    if not calls:
        raise CaptureError(
            f"`{name}` did not run on this image; choose a layer that runs in eval mode, and that the model "
            "calls rather than its weights"
        )
    if len(calls) > 1:
        raise InvalidArgumentError(
            f"`layer` must run once for each image, but `{name}` ran {len(calls)} times; choose the block "
            "around one of its calls"
        )
    tensor = calls[0]
    if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point() or tensor.ndim < 2:
        kind = f"shape {tuple(tensor.shape)}" if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise InvalidArgumentError(
            f"`layer` must put out one tensor of maps (N, C, H, W), but `{name}` puts out {kind}; choose a "
            "layer inside it, or a convolution"
        )
    if len(tensor) != rows:
        raise InvalidArgumentError(
            f"`layer` must put out one row per image, (N, C, H, W), but `{name}` puts out shape "
            f"{tuple(tensor.shape)} for {rows} images: it folds windows or heads into the batch; choose the "
            "block around it"
        )
    return tensor
