"""Single units of a layer: their values on one image, and the gradient of each with respect to it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Final, NamedTuple, final

import torch
from torch import nn

from torchlens_viz.backprop.device import free_bytes
from torchlens_viz.backprop.network import Cut, shadow_of
from torchlens_viz.backprop.relu import gradient_within
from torchlens_viz.backprop.rules import Rectified, Rule
from torchlens_viz.errors import (
    CaptureError,
    CaptureMemoryError,
    InvalidArgumentError,
    ModelFailedError,
    TorchlensVizError,
    is_out_of_memory,
    one_line,
)
from torchlens_viz.hooks.layout import Layout
from torchlens_viz.models.layers import Selector, select_one
from torchlens_viz.models.state import refuse_quantized
from torchlens_viz.models.watching import Parting
from torchlens_viz.receptive.crops import Crop, crops_for
from torchlens_viz.receptive.field import ReceptiveField
from torchlens_viz.receptive.find import receptive_field

_MOST_CROPS: Final = 64  # at a time; more gain nothing
_SHARE: Final = 0.25  # of the free memory
# How far a crop may be from the whole image: of the largest value, and of the norm of a gradient. Rounding
# stays far below; statistics that a layer takes over the whole image, and a crop has others, are far above.
_SAME_VALUE: Final = 1e-4
_SAME_GRADIENT: Final = 1e-3


class Unit(NamedTuple):
    """A unit, or all units of a channel together.

    Attributes:
        channel: Its channel.
        position: Its row and column; None for the sum of the map.
    """

    channel: int
    position: tuple[int, int] | None


@final
class Units:
    """The units of one layer on one image, in a copy of the network that ends at the layer.

    Args:
        model: The network; it is copied, its weights are not.
        layer: Which of its layers, by a selector that finds exactly one.
        batch: (1, C, H, W) float32, the image as the model takes it.
        rule: What passes ReLUs on the way back.
        channel_dim: Which dimension of what the layer puts out counts channels; None finds it.

    Attributes:
        layer: The layer's name.
        field: What positions of the layer see; None where that cannot be told.

    Raises:
        CaptureError: The layer does not run.
        CaptureMemoryError: There is no room for the image.
        InvalidArgumentError: The network cannot take the image, the layer puts out no maps, nothing leads
            back from it to the image, or the rule is not defined for what does.
    """

    def __init__(
        self, model: nn.Module, layer: Selector, batch: torch.Tensor, rule: Rule, *, channel_dim: int | None
    ) -> None:
        self.layer: Final = select_one(model, layer).name
        self._rule: Final = rule
        self._channel_dim = channel_dim
        self._leaf = _leaf_of(batch)
        try:
            self._look(model, keeps_types=False)
        except InvalidArgumentError:
            types = {each.dtype for each in model.parameters() if each.is_floating_point()}
            if len(types) < 2:
                raise
            self._look(model, keeps_types=True)  # a model of several types may convert by itself

    @property
    def maps(self) -> torch.Tensor:
        """(C, h, w) float32: what the layer puts out; tokens and vectors are maps of one row."""
        return self._maps.detach()[0]

    def on(self, batch: torch.Tensor) -> Units:
        """Return the units of the same layer on another image, with the same copy of the network.

        Args:
            batch: (1, C, H, W) float32, the image as the model takes it.

        Raises:
            CaptureError: As for the first image.
            CaptureMemoryError: As for the first image.
            InvalidArgumentError: As for the first image.
        """
        other = copy.copy(self)
        other._leaf = _leaf_of(batch)
        if batch.shape != self._leaf.shape:
            other.field = other._seen(self._network)
        other._begin()
        return other

    def gradients(self, units: Sequence[Unit], *, batch_size: int | None) -> torch.Tensor:
        """Return the gradient of each of K units with respect to the image, (K, C, H, W) float32 on the CPU.

        Where units see but a small part of the image, only that part is gone through, many of them at a time;
        that the network makes of it what it makes of the whole is looked at, unit by unit, or else each unit
        is gone back from through the whole.

        Args:
            units: Which units.
            batch_size: How many parts at a time; None for what fits.
        """
        positions = [unit.position for unit in units if unit.position is not None]
        if self.field is not None and len(positions) == len(units):
            crops = crops_for(self.field, positions)
            found = None if crops is None else self._through_crops(units, crops, batch_size)
            if found is not None:
                return found
        return torch.stack([self._through_all(unit).cpu() for unit in units])

    def _look(self, model: nn.Module, *, keeps_types: bool) -> None:
        self._network = network = shadow_of(model, keeps_types=keeps_types)
        self._parting = Parting(network)
        self._layout = Layout([select_one(network, self.layer)], self._channel_dim)
        self._mode = None if self._rule == "gradient" else Rectified(network, self._rule)
        self.field: ReceptiveField | None = self._seen(network)
        self._cut = Cut(network, [self.layer], io="output", is_compiled=False)
        self._begin()

    def _begin(self) -> None:
        """Run the network once, as far as the layer."""
        shape = tuple(self._leaf.shape)
        try:
            self._maps = self._run(self._leaf)
            if self.field is not None and self.field.map_shape not in ((), tuple(self._maps.shape[2:])):
                self.field = None  # it counts positions otherwise than the layer's maps do
            if self._parting.has_moved:
                self.field = None  # another pass would write over weights that the graph of this one needs
        except CaptureError as error:
            raise CaptureError(
                f"`{self.layer}` does not run on this image; choose a layer that runs in eval mode"
            ) from error
        except TorchlensVizError:
            raise
        except Exception as error:  # whatever the model raises
            if is_out_of_memory(error):
                raise _too_large(shape, error) from error
            raise ModelFailedError(
                f"the model cannot take an image of shape {shape[1:]} ({one_line(error)}); give another "
                "`image`, a `preprocess` that makes of it what the model takes, or as `inputs` what it takes "
                "beside"
            ) from error

    def _seen(self, network: nn.Module) -> ReceptiveField | None:
        try:
            return receptive_field(
                network, self.layer, tuple(self._leaf.shape), channel_dim=self._channel_dim
            )
        except Exception:  # whatever the model cannot do without its values; what is wrong is said with them
            return None

    def _rules(self) -> AbstractContextManager[object]:
        return self._mode or nullcontext()

    def _run(self, images: torch.Tensor) -> torch.Tensor:
        """Return what the layer makes of images, (N, C, h, w) on their graph."""
        with self._rules(), self._parting.on(), self._layout.following():
            output = self._cut(images * 1)[
                self.layer
            ]  # a model may work in place on its input, not on a leaf
            is_fine = (
                isinstance(output, torch.Tensor) and 2 <= output.ndim <= 4 and output.is_floating_point()
            )
            if not is_fine or len(output) != len(images):
                refuse_quantized(self._network)
                raise InvalidArgumentError(
                    "`layer` must put out one tensor (N, C, H, W), (N, L, C) or (N, C), a row per image, "
                    f"got {_kind(output)} from `{self.layer}` for {tuple(images.shape)}; choose another layer"
                )
            dim = self._layout.channel_dim(output, self.layer)
        if dim == 0:
            raise InvalidArgumentError(
                f"`channel_dim` must be a dimension after the first of {tuple(output.shape)}, got 0"
            )
        if self._mode is not None:
            self._mode.check(output)
        if not output.requires_grad:
            raise InvalidArgumentError(
                f"nothing leads back from `{self.layer}` to the image: something between them detaches, "
                "rounds, or runs without gradients; choose an earlier layer"
            )
        maps = output.movedim(dim, 1).float()
        return maps.reshape(*maps.shape[:2], *[1] * (4 - maps.ndim), *maps.shape[2:])

    def _back(self, score: torch.Tensor, leaf: torch.Tensor, *, keep_graph: bool) -> torch.Tensor:
        with self._rules():  # because checkpointing runs parts of the network again
            (gradient,) = gradient_within(score, leaf, keep_graph=keep_graph)
        return torch.zeros_like(leaf) if gradient is None else gradient

    def _through_all(self, unit: Unit) -> torch.Tensor:
        """Return the gradient of a unit, (C, H, W), through the whole image."""
        values = self._maps[0, unit.channel]
        score = values.sum() if unit.position is None else values[unit.position]
        return self._back(score, self._leaf, keep_graph=True)[0]

    def _through_crops(
        self, units: Sequence[Unit], crops: Sequence[Crop], batch_size: int | None
    ) -> torch.Tensor | None:
        """Return the gradients of units through what each sees; None where the whole image gives others."""
        found = torch.zeros(len(units), *self._leaf.shape[1:], device="cpu")
        try:
            for size in sorted({crop.size for crop in crops}):
                places = [place for place, crop in enumerate(crops) if crop.size == size]
                most = batch_size or self._fitting(crops[places[0]])
                for start in range(0, len(places), most):
                    chosen = places[start : start + most]
                    gradients = self._of_crops([units[at] for at in chosen], [crops[at] for at in chosen])
                    if gradients is None:
                        return None
                    for at, gradient in zip(chosen, gradients.cpu(), strict=True):
                        found[at, :, slice(*crops[at].rows), slice(*crops[at].columns)] = gradient
        except Exception:  # the model cannot take images of that size, or there is no room for them
            return None
        norms = found.flatten(1).norm(dim=1).nan_to_num(0.0)
        strongest = int(norms.argmax())
        expected = self._through_all(units[strongest]).cpu()
        is_same = (found[strongest] - expected).norm() <= _SAME_GRADIENT * expected.norm()
        return found if bool(is_same) else None

    def _of_crops(self, units: Sequence[Unit], crops: Sequence[Crop]) -> torch.Tensor | None:
        """Return the gradient of each unit with respect to its crop; None if it has another value there."""
        leaf = self._cut_out(crops).requires_grad_()
        maps = self._run(leaf)
        images = torch.arange(len(crops), device=maps.device)
        rows, columns = _pair([crop.place for crop in crops], maps.device)
        theirs = maps.detach()[images, :, rows, columns]
        own_rows, own_columns = _pair([unit.position or (0, 0) for unit in units], maps.device)
        ours = self.maps[:, own_rows, own_columns].T
        if not bool(((theirs - ours).abs() <= _SAME_VALUE * self.maps.abs().amax()).all()):
            return None
        channels = torch.tensor([unit.channel for unit in units], device="cpu").to(maps.device)
        return self._back(maps[images, channels, rows, columns].sum(), leaf, keep_graph=False)

    def _cut_out(self, crops: Sequence[Crop]) -> torch.Tensor:
        image = self._leaf.detach()[0]
        return torch.stack([image[:, slice(*crop.rows), slice(*crop.columns)] for crop in crops])

    def _fitting(self, crop: Crop) -> int:
        """Return how many crops of that size fit into memory at a time."""
        held: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
            return tensor.detach()  # a result that its own graph holds would never be freed

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            self._run(self._cut_out([crop]).requires_grad_())
        weights = {weight.untyped_storage().data_ptr() for weight in self._network.parameters()}
        each = max(1, sum(size for place, size in held.items() if place not in weights))
        return min(_MOST_CROPS, max(1, int(_SHARE * free_bytes(self._leaf.device) / each)))


def _leaf_of(batch: torch.Tensor) -> torch.Tensor:
    try:
        return batch.detach().clone().requires_grad_()
    except Exception as error:
        if is_out_of_memory(error):
            raise _too_large(tuple(batch.shape), error) from error
        raise


def _too_large(shape: tuple[int, ...], error: Exception) -> CaptureMemoryError:
    return CaptureMemoryError(
        f"the image of shape {shape[1:]} is more than there is memory for; give a smaller one, or choose an "
        f"earlier layer or a larger device ({one_line(error)})"
    )


def _pair(places: Sequence[tuple[int, int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = torch.tensor(places, device="cpu").T.to(device)
    return rows, columns


def _kind(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"
