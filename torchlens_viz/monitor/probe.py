"""A probe: a fixed batch that a network looks at while it trains, without leaving a trace in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, TypeAlias, final

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils.data import DataLoader, IterableDataset

from torchlens_viz.arguments import shown
from torchlens_viz.errors import InvalidArgumentError, InvalidTypeError, one_line
from torchlens_viz.models.inputs import InputOf, input_of, shown_to
from torchlens_viz.models.keeping import same_random_numbers
from torchlens_viz.models.state import (
    inference,
    like_parameters,
    no_autocast_cache,
    no_cached_parametrizations,
    require_values,
)
from torchlens_viz.nested import cloned, map_tensors

Probe: TypeAlias = torch.Tensor | Mapping[str, Any] | DataLoader[Any]

_INPUTS: Final = 16


@final
class ProbeBatch:
    """A copy of what the network is to look at.

    Args:
        probe: A batch (N, C, H, W); the keyword arguments of a model that takes more than that; or a
            DataLoader, of whose dataset 16 items are taken, at even distances, put together by its
            `collate_fn`. Random numbers that the dataset draws are given back.
        rule: Which part of a DataLoader's batch is the input, as in `torchlens_viz.survey`.
        model: What will look at it.

    Raises:
        InvalidArgumentError: There is no input in it, or a part of the model waits for other processes.
        InvalidTypeError: It is something else.
    """

    __slots__ = ("_args", "_kwargs")

    def __init__(self, probe: Probe, rule: InputOf, model: nn.Module) -> None:
        for name, module in model.named_modules():
            if isinstance(module, nn.parallel.DistributedDataParallel):
                raise InvalidArgumentError(
                    f"`probe` cannot be shown to a model with DistributedDataParallel inside it (`{name}`), "
                    "which waits for the other processes; leave it out and use `watch`"
                )
        self._args: tuple[torch.Tensor, ...] = ()
        self._kwargs: dict[str, Any] = {}
        if isinstance(probe, DataLoader):
            probe = input_of(_first(probe), rule)
        if isinstance(probe, tuple) and probe:
            self._args = tuple(map_tensors(_own, probe))
        elif isinstance(probe, torch.Tensor):
            if probe.ndim == 0 or probe.numel() == 0:
                raise InvalidArgumentError(
                    f"`probe` must be a batch (N, C, H, W) with at least one input, got shape "
                    f"{tuple(probe.shape)}"
                )
            self._args = (_own(probe),)
        elif isinstance(probe, Mapping) and probe:
            self._kwargs = dict(map_tensors(_own, dict(probe)))
        else:
            raise InvalidTypeError(
                "`probe` must be a batch (N, C, H, W), a mapping of keyword arguments or a DataLoader, got "
                f"{type(probe).__name__}; of a batch of inputs and labels, pass the inputs"
            )

    def show(self, model: nn.Module) -> None:
        """Run the model on the batch, in eval mode and without gradients.

        Training flags, buffers, random numbers and the cache of autocast are afterwards what they were.
        """

        def placed(tensor: torch.Tensor) -> torch.Tensor:
            return like_parameters(tensor, model)

        if any(is_lazy(tensor) for tensor in [*model.parameters(), *model.buffers()]):
            raise InvalidArgumentError(
                "the model has lazy parameters, which the probe would give values: train a step before"
            )
        require_values(model)
        with (
            inference(model),
            no_autocast_cache(),
            no_cached_parametrizations(),
        ):
            args, kwargs = map_tensors(placed, cloned((self._args, self._kwargs)))
            with shown_to(model, (args, kwargs), "probe", remedy="pass what the network takes in training"):
                model(*args, **kwargs)

    def picture(self) -> torch.Tensor | None:
        """Return the inputs where they are pictures: (N, 1, H, W) or (N, 3, H, W), else None."""
        batch = self._args[0] if self._args else None
        return batch if batch is not None and batch.ndim == 4 and batch.shape[1] in (1, 3) else None


def _own(tensor: torch.Tensor) -> torch.Tensor:
    try:
        with torch.inference_mode(False):
            return tensor.detach().clone()
    except (RuntimeError, MemoryError, TypeError) as error:
        raise InvalidArgumentError(
            f"`probe` must be a batch that can be copied, got {shown(tensor)} ({one_line(error)}); pass "
            "fewer inputs"
        ) from error


def _first(loader: DataLoader[Any]) -> Any:
    if isinstance(loader.dataset, IterableDataset) or not hasattr(loader.dataset, "__len__"):
        raise InvalidTypeError(
            "`probe` must be a DataLoader over a dataset with a length and indices, got one over "
            f"{type(loader.dataset).__name__}; pass a batch, as in `probe=next(iter(loader))[0]`"
        )
    if loader.batch_sampler is None:
        raise InvalidArgumentError(
            "`probe` must be a DataLoader that makes batches, got one with `batch_size=None`; pass a batch"
        )
    count = len(loader.dataset)
    if count == 0:
        raise InvalidArgumentError("`probe` must have at least one input, got a DataLoader without any")
    most = min(_INPUTS, count)
    with same_random_numbers():
        items = [loader.dataset[index * count // most] for index in range(most)]
        return loader.collate_fn(items)
