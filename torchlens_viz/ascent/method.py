"""How an image climbs: by gradients of one size, which serve all layers, or by the plain recipe of Keras."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import ClassVar, Final, Literal, TypeAlias, final

import torch

from torchlens_viz.arguments import integer, shown
from torchlens_viz.ascent.optimizer import Adam, Slope, as_it_is, normalised
from torchlens_viz.ascent.parametrization import Parametrization, Pixels
from torchlens_viz.ascent.transforms import Transforms
from torchlens_viz.errors import InvalidArgumentError, InvalidTypeError

MethodName: TypeAlias = Literal["normalized", "classic"]

MOST_RESTARTS: Final = 1_000
_CLASSIC_RATE: Final = 2.5
_CLASSIC_RANGE: Final = (128.0, 148.0)
_LIMITS: Final = (0.0, 255.0)


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """How an image climbs, and what is kept of its way.

    Attributes:
        compile: Run the network's share of each step through `torch.compile`, which takes its time at the
            first step. On a CPU this has been slower than without wherever it was measured.
        frames: Keep the image at every so many steps, for `Maximization.save_animation`; None keeps none.
        references: (R, C, ...), images to compare with: `z_means` and `z_ranks` of the result are relative to
            them, and a channel without a gradient is tried on the one that drives it hardest.
    """

    compile: bool = False
    frames: int | None = None
    references: torch.Tensor | None = field(default=None, repr=False, compare=False)

    wakes: ClassVar[bool]  # whether an image without a gradient gets redirected ReLUs and further starts
    shares_start: ClassVar[bool]  # whether every channel begins from the same image

    def __post_init__(self) -> None:
        if not isinstance(self.compile, bool):
            raise InvalidTypeError(f"`compile` must be True or False, got {self.compile!r}")
        if self.frames is not None:
            object.__setattr__(self, "frames", integer(self.frames, "frames", least=1))

    def limits(self, by: Parametrization) -> tuple[float, float] | None:
        """Return the smallest and largest value of a pixel as it is drawn; None where there are no limits."""
        return None if by.low is None or by.high is None else (by.low, by.high)

    @property
    def starts(self) -> int:
        """From how many images it is tried, of noise or given, where there is no gradient."""
        return 1

    @property
    def copies(self) -> int:
        """How many copies of a smaller image, along each axis, make the one that the end is climbed with."""
        return 1

    @abstractmethod
    def parametrization(self, given: Parametrization, transforms: Transforms, seed: int) -> Parametrization:
        """Return what images are made of.

        Raises:
            InvalidArgumentError: What was given does not go with this method.
        """

    @abstractmethod
    def learning_rate(self, by: Parametrization) -> float:
        """Return the rate where none was given."""

    @abstractmethod
    def pixels_of(self, picture: torch.Tensor, by: Parametrization) -> torch.Tensor:
        """Return a picture with values from 0 to 1 as the pixels to begin from."""

    @abstractmethod
    def slope(self, gradient: torch.Tensor) -> Slope:
        """Return how steep it is at each image."""

    @abstractmethod
    def optimizer(self, rate: float) -> Adam:
        """Return what turns slopes into steps."""


@final
@dataclass(frozen=True, kw_only=True)
class Normalized(Method):
    """Scale the gradient of each image to unit root mean square, so that one rate serves all layers.

    Attributes:
        restarts: From how many further starts to try where there is no gradient. What has none under the
            transforms from any of them is tried without, and `Maximization.evidence` says so.
        tiles: Climb three quarters of the steps with a smaller image, of which so many along each axis, side
            by side, are what the last quarter begins from. The mean of a map gets as high in about half of
            the time; the image shows its pattern several times. 1 climbs with the whole image throughout.
    """

    restarts: int = 4
    tiles: int = 1

    wakes = True
    shares_start = False

    def __post_init__(self) -> None:
        super().__post_init__()
        restarts = integer(self.restarts, "restarts", least=0, most=MOST_RESTARTS)
        object.__setattr__(self, "restarts", restarts)
        object.__setattr__(self, "tiles", integer(self.tiles, "tiles", least=1))

    @property
    def starts(self) -> int:
        """The first start and the further ones."""
        return 1 + self.restarts

    @property
    def copies(self) -> int:
        """Those that were asked for."""
        return self.tiles

    def parametrization(self, given: Parametrization, transforms: Transforms, seed: int) -> Parametrization:
        """Return what was given."""
        return given

    def learning_rate(self, by: Parametrization) -> float:
        """Return the rate that suits the parametrisation."""
        return by.learning_rate

    def pixels_of(self, picture: torch.Tensor, by: Parametrization) -> torch.Tensor:
        """Spread the picture over the range of pixels."""
        return (by.low or 0.0) + by.width * picture

    def slope(self, gradient: torch.Tensor) -> Slope:
        """Scale the gradient of each image."""
        return normalised(gradient)

    def optimizer(self, rate: float) -> Adam:
        """Return Adam as it was published."""
        return Adam(rate, like_keras=False)


@final
@dataclass(frozen=True, kw_only=True)
class Classic(Method):
    """The plain recipe of Keras, in units of 0 to 255 and without limits.

    Every channel begins from the same image, uniform in [128, 148] (with `seed=42`, the well-known one), and
    Adam has Keras' epsilon. The learning rate is 2.5 where none is given. What has no gradient is dead.
    """

    wakes = False
    shares_start = True

    def parametrization(self, given: Parametrization, transforms: Transforms, seed: int) -> Parametrization:
        """Return pixels without limits, smoothed as those that were given."""
        plain = Pixels()
        if isinstance(given, Pixels):
            plain = replace(plain, decay=given.decay, blur=given.blur, blur_every=given.blur_every)
        if given != plain or transforms != Transforms():
            raise InvalidArgumentError(
                '`method="classic"` has neither `parametrization` nor `transforms`; leave them out'
            )
        if not 0 <= seed < 2**32:
            raise InvalidArgumentError(
                f'`seed` must be from 0 to 2**32 - 1 with `method="classic"`, got {seed}'
            )
        return replace(plain, low=None, high=None, uniform=_CLASSIC_RANGE)

    def limits(self, by: Parametrization) -> tuple[float, float]:
        """Return those of the recipe's pixels, which may pass them."""
        return _LIMITS

    def learning_rate(self, by: Parametrization) -> float:
        """Return that of the recipe."""
        return _CLASSIC_RATE

    def pixels_of(self, picture: torch.Tensor, by: Parametrization) -> torch.Tensor:
        """Return values from 0 to 255."""
        return 255 * picture

    def slope(self, gradient: torch.Tensor) -> Slope:
        """Leave the gradient in its own scale."""
        return as_it_is(gradient)

    def optimizer(self, rate: float) -> Adam:
        """Return Adam with Keras' epsilon."""
        return Adam(rate, like_keras=True)


def method_of(chosen: MethodName | Method) -> Method:
    """Return the method of that name with its defaults, or the one that was given."""
    kinds: dict[str, type[Method]] = {"normalized": Normalized, "classic": Classic}
    if isinstance(chosen, Method):
        return chosen
    if not isinstance(chosen, str) or chosen not in kinds:
        raise InvalidArgumentError(
            f'`method` must be "normalized", "classic", Normalized(...) or Classic(...), got {shown(chosen)}'
        )
    return kinds[chosen]()
