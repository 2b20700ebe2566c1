"""How large the parameters of layers are, and how far one step of the optimiser moved them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import final

import torch
from torch import nn


@final
class Norms:
    """Takes a copy of the parameters before a step, and measures what the step added.

    Args:
        layers: The layers by name.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self._layers = {name: module for name, module in layers.items() if list(module.parameters())}
        self._before: dict[str, list[torch.Tensor]] = {}
        self._step: int | None = None

    def before(self, step: int) -> None:
        """Note the parameters as they are before the step of this number."""
        self._before = {
            name: [p.detach().clone() for p in m.parameters()] for name, m in self._layers.items()
        }
        self._step = step

    def weights(self) -> dict[str, float]:
        """Return the Euclidean norm of all parameters of each layer, as `<layer>/weight_norm`."""
        return {f"{name}/weight_norm": _norm(own) for name, own in self._now().items()}

    def updates(self, step: int) -> dict[str, float]:
        """Measure, after a step for which `before` was called, what it added to the parameters.

        Returns:
            The Euclidean norm of what was added to each layer, as `<layer>/update_norm`, and its share of the
            norm of the parameters, as `<layer>/update_ratio`. Nothing where no parameter changed: the
            optimiser is yet to step, as it is while gradients accumulate, and the next call may know.
        """
        if self._step != step:
            return {}
        found: dict[str, float] = {}
        for name, now in self._now().items():
            update = _norm(new - old for new, old in zip(now, self._before[name], strict=True))
            found[f"{name}/update_norm"] = update
            weight = _norm(now)
            if weight > 0:
                found[f"{name}/update_ratio"] = update / weight
        if not any(found.values()):
            return {}
        self._before = {}  # a copy of all weights should not be held for longer than a step
        self._step = None
        return found

    def _now(self) -> dict[str, list[torch.Tensor]]:
        return {name: [p.detach() for p in module.parameters()] for name, module in self._layers.items()}


def _norm(parts: Iterable[torch.Tensor]) -> float:
    squares = [
        torch.linalg.vector_norm(part, dtype=torch.promote_types(part.dtype, torch.float32)) for part in parts
    ]
    whole: float = torch.stack([square.double().cpu() for square in squares]).norm().item()
    return whole
