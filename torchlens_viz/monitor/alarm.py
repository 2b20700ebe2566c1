"""What went wrong in a training, and why: figures out of bounds, and the evidence of their cause."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple, final

from torchlens_viz.arguments import limits, number, shown
from torchlens_viz.errors import InvalidArgumentError
from torchlens_viz.monitor.evidence import Evidence
from torchlens_viz.monitor.health import Cause, Figures, Kind, Trouble

# Weights whose gain is beyond these are far from every initialisation in use, where what comes out is small
# or large as well: the latter alone may be the scale of the data.
_GAINS: Final = (0.05, 20.0)
_SIGNALS: Final = (0.01, 50.0)
_AFTER_NAN: Final = (
    ": all weights have NaN or Inf at once, as a step leaves them where the loss is not finite; look at the "
    "labels and at the data of the steps before, and for the logarithm of zero or a division by it"
)
_LEAST_STD: Final = 0.01  # growth is counted from there: what begins at nothing grows without bounds


class _Why(NamedTuple):
    cause: Cause
    words: str


@final
class Watchman:
    """Tells what went wrong since the last look: each trouble once, and again after it was gone.

    Args:
        max_dead: The greatest share of dead channels in a layer that is no trouble, 0 to 1.
        std_range: (low, high), the standard deviations that are no trouble.
        max_growth: How many times its first value the std of a layer may be.
        max_update: The greatest share of a layer's parameters that a step may change.

    Raises:
        InvalidArgumentError: A bound is out of range.
    """

    def __init__(
        self, *, max_dead: float, std_range: tuple[float, float], max_growth: float, max_update: float
    ) -> None:
        self._max_dead = number(max_dead, "max_dead", least=0, most=1)
        self._low, self._high = limits(std_range, "std_range")
        if not self._low <= self._high:
            raise InvalidArgumentError(
                f"`std_range` must be (low, high) with low <= high, got {shown(std_range)}"
            )
        self._max_growth = number(max_growth, "max_growth", above=1)
        self._max_update = number(max_update, "max_update", above=0)
        self._known: set[tuple[str, str]] = set()
        self._first: dict[str, tuple[int, Figures]] = {}
        self._alive: dict[str, int] = {}
        self._hasty: tuple[int, str, float] | None = None  # the last step that changed too much

    def look(self, health: Mapping[str, Figures], step: int, evidence: Evidence) -> list[Trouble]:
        """Return the new troubles.

        Args:
            health: The figures of each layer, in the order in which the layers ran.
            step: The global step.
            evidence: What else is known of it.
        """
        self._note_updates(step, evidence)
        found = self._spoilt(health, step, evidence)
        for layer, figures in health.items():
            if figures.nonfinite:  # what else they say is a consequence
                continue
            found += self._unhealthy(layer, figures, step, evidence, health)
            self._first.setdefault(layer, (step, figures))
            if figures.dead_fraction <= self._max_dead:
                self._alive[layer] = step
        return found + self._hasty_now(health, step, evidence, found)

    def tell(self, alarm: Callable[[Trouble], object], found: Sequence[Trouble]) -> None:
        """Call the alarm for each trouble; where it raises, those after it are news again."""
        for place, trouble in enumerate(found):
            try:
                alarm(trouble)
            except BaseException:
                for untold in found[place + 1 :]:
                    self._known.discard((untold.kind, "" if untold.kind == "update" else untold.layer))
                raise

    def _unhealthy(
        self, layer: str, figures: Figures, step: int, evidence: Evidence, health: Mapping[str, Figures]
    ) -> list[Trouble]:
        """Return what is wrong with a layer of which all values are finite: one thing, the plainest."""
        share, std, gain = figures.dead_fraction, figures.std, evidence.gains.get(layer, math.nan)
        first = self._first.get(layer, (step, figures))[1].std
        growth = std / max(first, _LEAST_STD)
        is_outside = not math.isnan(std) and not self._low <= std <= self._high
        is_odd = (0 < gain < _GAINS[0] and figures.channel_std < _SIGNALS[0]) or (
            gain > _GAINS[1] and figures.channel_std > _SIGNALS[1]
        )
        what = {
            "dead": f"{figures.dead} channels of `{layer}` ({share:.1%}) are dead, at most "
            f"{self._max_dead:.1%} are expected",
            "std": f"the std of `{layer}` is {std:.4g}, outside [{self._low:.4g}, {self._high:.4g}]",
            "growth": f"the std of `{layer}` is {std:.4g}, {growth:.0f} times what it was at first",
            "weights": f"what `{layer}` puts out varies by {figures.channel_std:.2g} within a channel",
        }
        wrong = {
            "dead": share > self._max_dead,
            "std": is_outside,
            "growth": growth > self._max_growth,
            "weights": is_odd,
        }
        found: list[Trouble] = []
        has_more = False
        kinds: tuple[Kind, ...] = ("dead", "std", "growth", "weights")
        for kind in kinds:
            if not self._is_new((kind, layer), wrong[kind]) or has_more:
                continue
            has_more = True
            if kind == "weights" and self._is_said_of_another(layer):
                continue  # an initialisation is one decision for all layers
            why = self._why(kind, layer, figures, step, evidence, list(health))
            message = f"step {step}: {what[kind]}{why.words}"
            found.append(
                Trouble(kind=kind, layer=layer, step=step, figures=figures, cause=why.cause, message=message)
            )
        return found

    def _why(
        self,
        kind: Kind,
        layer: str,
        figures: Figures,
        step: int,
        evidence: Evidence,
        layers: Sequence[str],
    ) -> _Why:
        is_high = figures.channel_std > _SIGNALS[1] or (kind in ("std", "growth") and figures.std > self._low)
        source = self._with_weights(layer, evidence, layers)
        gain, bias = evidence.gains.get(source, math.nan), evidence.biases.get(source, math.nan)
        taken = evidence.taken.get(layer, math.nan)
        if evidence.given == 0:
            return _Why("input", ": all that the network was given is zero; look at the data")
        if kind in ("std", "dead") and evidence.given is not None and evidence.given > 1e4 and is_high:
            peak = f"{evidence.given:.3g}"
            return _Why("input", f": the network was given values up to {peak}; normalise the data")
        if self._hasty is not None:
            return self._haste()
        if 0 < gain < _GAINS[0] and not is_high:
            return self._odd_weights(source, gain, "small")
        if gain > _GAINS[1]:
            return self._odd_weights(source, gain, "large")
        if kind == "dead" and bias < 0 and abs(bias) > gain * taken:
            words = f": the biases of `{source}` are {bias:.3g} on average, more than its weights make up for"
            return _Why("bias", words)
        if kind == "dead" and layer in self._alive:
            return _Why(
                "learning rate",
                f"; at step {self._alive[layer]} they were not: the learning rate is probably too high",
            )
        if kind == "growth":
            return _Why("learning rate", f" (step {self._first[layer][0]}): is the learning rate too high?")
        if kind == "std" and not is_high and evidence.given is not None and evidence.given < self._low:
            return _Why("input", f": the network was given values up to {evidence.given:.3g} only")
        return _Why("unknown", "")

    def _odd_weights(self, layer: str, gain: float, how: str) -> _Why:
        scale = (
            f"they scale what it takes by about {gain:.2g}, after He's or Glorot's initialisation by 0.5 to 2"
        )
        if layer not in self._first:
            words = f": the weights of `{layer}` are too {how} from the start: {scale}; initialise it anew"
            return _Why("initialisation", words)
        change, remedy = (
            ("shrunk", "is there too much weight decay?")
            if how == "small"
            else ("grown", "is the learning rate too high?")
        )
        return _Why("weights", f": the weights of `{layer}` have {change}: {scale}; {remedy}")

    def _haste(self) -> _Why:
        assert self._hasty is not None
        step, layer, share = self._hasty
        words = f": step {step} changed `{layer}` by {share:.0%} of its norm, so that the learning rate is "
        return _Why("learning rate", f"{words}too high; divide it by 10")

    def _spoilt(self, health: Mapping[str, Figures], step: int, evidence: Evidence) -> list[Trouble]:
        """Return the layer where NaN or Inf came up; those after it have it from there."""
        spoilt = [layer for layer, figures in health.items() if figures.nonfinite]
        if not self._is_new(("nonfinite", ""), bool(spoilt)):
            return []
        first, others = spoilt[0], len(spoilt) - 1
        figures = health[first]
        plural = "values" if figures.nonfinite > 1 else "value"
        message = f"step {step}: `{first}` puts out {figures.nonfinite:,} {plural} that are NaN or infinite"
        if others:
            message += f", and so {'does' if others == 1 else 'do'} {others} more of {len(health)} layers"
        why = self._why_spoilt(first, evidence)
        return [
            Trouble(
                kind="nonfinite",
                layer=first,
                step=step,
                figures=figures,
                cause=why.cause,
                message=message + why.words,
            )
        ]

    def _why_spoilt(self, layer: str, evidence: Evidence) -> _Why:
        if evidence.given is not None and not math.isfinite(evidence.given):
            words = ": what the network was given has NaN or Inf already; look at the data"
            return _Why("input", words)
        if layer in evidence.spoilt:
            if self._hasty is not None:
                return self._haste()
            if self._first and len(evidence.gains) > 1 and evidence.gains.keys() <= evidence.spoilt.keys():
                return _Why("loss", _AFTER_NAN)
            words = (
                f": its `{evidence.spoilt[layer]}` has NaN or Inf, while what the network is given is finite"
            )
            words = (
                words if evidence.given is not None else f": its `{evidence.spoilt[layer]}` has NaN or Inf"
            )
            return _Why("weights", words)
        if not math.isfinite(evidence.taken.get(layer, 0.0)):
            name = evidence.elsewhere()
            if name is not None:
                return _Why("weights", f": `{name}` has NaN or Inf, outside the layers that are watched")
            return _Why("unknown", ": what it takes is so already; `layers` can take in those before it")
        if self._hasty is not None:
            return self._haste()
        words = ": what it takes and its weights are finite, so that it overflows, or divides by zero"
        return _Why("overflow", words)

    def _note_updates(self, step: int, evidence: Evidence) -> None:
        hasty = {
            layer: share
            for layer, share in evidence.updates.items()
            if share > self._max_update and not 0 <= evidence.gains.get(layer, 1.0) < _GAINS[0]
        }
        if hasty:
            layer = max(hasty, key=hasty.__getitem__)
            self._hasty = (step, layer, hasty[layer])

    def _hasty_now(
        self, health: Mapping[str, Figures], step: int, evidence: Evidence, found: Sequence[Trouble]
    ) -> list[Trouble]:
        is_hasty = self._hasty is not None and self._hasty[0] == step
        if not self._is_new(("update", ""), is_hasty) or any(t.cause == "learning rate" for t in found):
            return []
        assert self._hasty is not None
        _, layer, share = self._hasty
        if layer not in health:
            return []
        message = (
            f"step {step} changed `{layer}` by {share:.0%} of its norm, at most {self._max_update:.0%} are "
            "expected, and a thousandth is usual: the learning rate is too high"
        )
        return [
            Trouble(
                kind="update",
                layer=layer,
                step=step,
                figures=health[layer],
                cause="learning rate",
                message=message,
            )
        ]

    def _with_weights(self, layer: str, evidence: Evidence, layers: Sequence[str]) -> str:
        """Return the layer itself, or where it has no weights the last one before it that has."""
        before = [name for name in layers[: layers.index(layer) + 1] if name in evidence.gains]
        return before[-1] if before else layer

    def _is_said_of_another(self, layer: str) -> bool:
        return any(kind == "weights" and name != layer for kind, name in self._known)

    def _is_new(self, key: tuple[str, str], is_there: bool) -> bool:
        is_new = is_there and key not in self._known
        if is_there:
            self._known.add(key)
        else:
            self._known.discard(key)
        return is_new
