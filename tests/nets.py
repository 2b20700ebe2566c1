"""What several rooms test with: small networks, what is found on them, and when two results are the same."""

from __future__ import annotations

from torch import nn


class Repeats(nn.Module):
    """Calls its only layer twice, which bears two names, and another never."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1)
        self.alias = self.conv
        self.unused = nn.Conv2d(2, 2, 1)

    def forward(self, value):
        return self.conv(self.conv(value)[:, :, ::2])


class Gives(nn.Module):
    """Puts out what a function makes of the input."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, value):
        return self.make(value)


class Catches(nn.Module):
    """Goes on to the next of three layers where one fails."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(1, 1, 1) for _ in range(3))
        self.ran = []

    def forward(self, value):
        for name in ("first", "second", "third"):
            try:
                value = getattr(self, name)(value)
                self.ran.append(name)
            except Exception:
                pass
        return value


def everything(name: str, module: nn.Module) -> bool:
    """Select every layer."""
    return True


def hook_count(model: nn.Module) -> int:
    """Count the forward hooks on all modules."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def instance_state(model: nn.Module) -> list[set[str]]:
    """Name what every module holds, and so whatever somebody has left there."""
    return [set(module.__dict__) for module in model.modules()]
