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

    def after(self, step: int) -> dict[str, float]:
        """Measure, after a step: `<layer>/weight_norm`, and where `before` was called for it, the change.

        Returns:
            The Euclidean norm of all parameters of each layer; that of what the step added to them, as
            `<layer>/update_norm`; and the second over the first, as `<layer>/update_ratio`.
        """
        found: dict[str, float] = {}
        is_known, before = self._step == step, self._before
        self._before = {}  # a copy of all weights should not be held for longer than a step
        self._step = None
        for name, module in self._layers.items():
            now = [parameter.detach() for parameter in module.parameters()]
            weight = found[f"{name}/weight_norm"] = _norm(now)
            if is_known:
                update = _norm(new - old for new, old in zip(now, before[name], strict=True))
                found[f"{name}/update_norm"] = update
                if weight > 0:
                    found[f"{name}/update_ratio"] = update / weight
        return found


def _norm(parts: Iterable[torch.Tensor]) -> float:
    squares = [
        torch.linalg.vector_norm(part, dtype=torch.promote_types(part.dtype, torch.float32)) for part in parts
    ]
    whole: float = torch.stack([square.double().cpu() for square in squares]).norm().item()
    return whole
