"""`maximize`: gradient ascent on input images, to see what a channel responds to."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from statistics import median
from typing import Any, Literal

import torch
from PIL import Image
from torch import nn

from torchlens_viz.arguments import function, integer, number
from torchlens_viz.ascent.checkpoint import Resumption
from torchlens_viz.ascent.climb import climb, climb_in_phases
from torchlens_viz.ascent.method import Method, MethodName, method_of
from torchlens_viz.ascent.options import (
    MOST_STEPS,
    channel_means,
    check_independence,
    chosen_channels,
    fitting_batch,
    parametrization_of,
    references_of,
    requests_for,
    require_room,
    settings_of,
    shape_of,
    size_of,
    small_scorer,
    start_of,
)
from torchlens_viz.ascent.parametrization import Parametrization, ParametrizationName
from torchlens_viz.ascent.plan import Climb, Plan, Request, range_of
from torchlens_viz.ascent.result import Maximization
from torchlens_viz.ascent.transforms import Transforms, TransformsName, transforms_of
from torchlens_viz.backprop.device import Precision, isolated, resolve_precision
from torchlens_viz.backprop.objective import Objective, Scene
from torchlens_viz.backprop.scorer import Scorer
from torchlens_viz.distributed import gathered, world
from torchlens_viz.errors import InvalidArgumentError
from torchlens_viz.files.paths import as_path
from torchlens_viz.hooks.forward import refuse_torchscript
from torchlens_viz.models.calls import ModelInputs, called_with
from torchlens_viz.models.keeping import same_random_numbers
from torchlens_viz.models.kernels import image_form
from torchlens_viz.models.layers import Selector, require_module
from torchlens_viz.models.preparing import check_prepared_alone, preprocess_of
from torchlens_viz.models.state import device_of
from torchlens_viz.objectives import ObjectiveName, objective_of
from torchlens_viz.progress import Bar, is_shown


def maximize(
    model: nn.Module,
    layer: Selector,
    channels: int | Sequence[int] | None = None,
    *,
    size: int | Sequence[int] | None = None,
    objective: ObjectiveName | Objective | Callable[[Scene], torch.Tensor] = "mean",
    image: torch.Tensor | Image.Image | None = None,
    preprocess: Callable[[Any], torch.Tensor] | None = None,
    inputs: ModelInputs = None,
    transforms: TransformsName | Transforms | None = None,
    parametrization: ParametrizationName | Parametrization = "pixels",
    steps: int = 64,
    lr: float | None = None,
    threshold: float | None = None,
    batch_size: int | Literal["auto"] = "auto",
    seed: int = 0,
    precision: Precision = "auto",
    method: MethodName | Method = "normalized",
    channel_dim: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> Maximization:
    """Find, for each channel of a layer, the image that drives it hardest, by gradient ascent.

    The forward pass ends at the layer, and gradients go to the images alone. Every image climbs by itself:
    which others share its batch changes nothing but rounding, and its random numbers depend on `seed` and its
    channel only. The model is copied (its weights are not) and run in eval mode; nothing about it changes.

    Under torchrun, with `torch.distributed` initialised, the channels are shared among the processes, and
    each gets the whole result. Ctrl-C returns the images that are finished, if there are any.

    Networks of 1-D and 3-D convolutions, over signals (N, C, L) and volumes or clips (N, C, D, H, W), are
    climbed alike: "image" stands for what they take.

    Args:
        model: The network.
        layer: The layer, by a selector that finds exactly one. A convolution's own name means before its
            ReLU, the ReLU's name after it.
        channels: Which channels; a channel named several times gets several images. None is all of them, or
            a single image where the objective looks at no channel.
        size: Height and width of the images, or one number for both; `(length,)` of signals and `(depth,
            height, width)` of volumes. An `image` brings its own. None is 224 x 224 pixels, or where the
            first convolution is one over signals or volumes, 4096 or 16 x 112 x 112.
        objective: `"mean"`, `"max"` or `"center"` of the channel's map, a term of
            `torchlens_viz.objectives`, or a function `Scene -> (N,)`.
        image: (C, ...), (1, C, ...) or a picture, to begin from. None begins from noise, with as many
            channels as the first convolution takes.
        preprocess: Makes of images (N, C, ...) what the model takes, differentiably, for example
            `torchvision.transforms.Normalize`. Of one that takes pictures only, as for `overlay_grid`, what
            it does to colours stands for it, and what it does to sizes is left out.
        inputs: What the model takes beside the image, or how it takes it: see "Models that take more than an
            image" in the documentation. A tuple (by position) or a mapping (by name) with None in the place
            of the image batch, as in `(None, vector)`; or a function of the image batch that returns either,
            or the only argument: `list` for a list of images. None calls the model with the batch alone.
        transforms: `"robust"`, `"gentle"`, `"none"` or `Transforms(...)`: what the images must survive.
            Signals are not turned, and volumes in the plane of height and width.
        parametrization: What is optimised: `"pixels"`, `"fourier"` coefficients or, with the magnitudes
            of natural images, their phases (`"maco"`); or `Pixels`, `Fourier` or `FixedSpectrum` with
            options.
        steps: Steps per image.
        lr: The learning rate; None is that of the parametrisation, 0.05 of the range of pixels per step.
        threshold: Stop an image once its objective exceeds this.
        batch_size: How many images climb at a time; `"auto"` takes what memory has room for. Where memory
            runs out all the same, it is halved.
        seed: What all random numbers follow from.
        precision: What the network computes gradients in: `"auto"` is bfloat16 where the hardware has it,
            else float32. Images, optimiser and scores are float32 in any case.
        method: `"normalized"` scales the gradient of each image to unit root mean square, so that one
            learning rate serves all layers; `Normalized(...)` has its options. `"classic"` is the plain
            recipe of Keras, see `Classic`.
        channel_dim: The dimension that counts channels in what the layers of the objective put out: 1 in
            (N, C, H, W), -1 in tokens (N, L, C). None finds it for each by itself, as in
            `torchlens_viz.capture`.
        checkpoint: A folder for what is finished. A run that was broken off goes on from there, to the same
            result.
        progress: Show a bar with the channels done, the time left and the median score; None shows it where
            tqdm is installed and somebody can see it.

    Returns:
        K images and what became of each.

    Raises:
        LayerNotFoundError: There is no such layer.
        CaptureError: The layer does not run, the model cannot be hooked, or cannot be compiled.
        CaptureMemoryError: There is no room for a single image.
        InvalidArgumentError: An argument has a value that cannot be used, a channel is out of range, the
            network cannot take such images, or the objective has no gradient path to them.
        ArchiveError: `checkpoint` was begun with other settings.

    Source:
        Erhan et al., "Visualizing Higher-Layer Features of a Deep Network", 2009; Olah, Mordvintsev &
        Schubert, "Feature Visualization", Distill 2017.

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 5), nn.ReLU(), nn.Conv2d(4, 8, 3))
        >>> result = maximize(net, "2", [0, 5], size=16, steps=8)
        >>> result.images.shape, result.ranks.shape
        (torch.Size([2, 3, 16, 16]), torch.Size([2]))
    """
    require_module(model)
    refuse_torchscript(model)
    model = called_with(model, inputs)
    steps = integer(steps, "steps", least=1, most=MOST_STEPS)
    seed = integer(seed, "seed", least=-(2**63), most=2**63 - 1)
    if not (isinstance(batch_size, str) and batch_size == "auto"):
        batch_size = integer(batch_size, "batch_size", least=1)
    check_independence(model, batch_size)
    taken, axes = image_form(model)
    sides = size_of(size, axes)
    axes = axes if sides is None else len(sides)
    how, must_survive = method_of(method), transforms_of(transforms, axes)
    by = how.parametrization(parametrization_of(parametrization), must_survive, seed)
    rate = how.learning_rate(by) if lr is None else number(lr, "lr", above=0)
    goal = objective_of(objective)
    function(preprocess, "preprocess")
    folder = None if checkpoint is None else as_path(checkpoint, "checkpoint")
    start = None if image is None else start_of(image, by, how, taken, axes)
    shape = shape_of(sides, start, taken, axes)
    require_room(shape, device := device_of(model))
    with same_random_numbers(), isolated(device):  # preprocessing and networks may draw some

        def scorer_of(size: Sequence[int], wanted: Precision = precision) -> Scorer:
            example = torch.full((1, shape[0], *size), by.middle, device=device)
            prepare = preprocess_of(preprocess, example)
            if prepare is not None and batch_size != 1 and tuple(size) == shape[1:]:
                check_prepared_alone(prepare, example)
            scorer = Scorer(
                model,
                layer,
                goal,
                example,
                preprocess=prepare,
                dtype=resolve_precision(wanted, device),
                channel_dim=channel_dim,
                is_compiled=how.compile,
            )
            try:
                scorer.require_type(example)
            except InvalidArgumentError:
                if wanted != "auto":
                    raise
                return scorer_of(size, "float32")
            return scorer

        scorer = scorer_of(shape[1:])
        chosen = chosen_channels(channels, goal, scorer.channels)
        real = None if how.references is None else references_of(how.references, shape, by, device)
        plan = Plan(
            parametrization=by,
            transforms=must_survive,
            size=shape[1:],
            image_channels=shape[0],
            start=start,
            references=None if real is None else real.cpu(),
            reference_means=None if real is None else channel_means(scorer, real),
            steps=steps,
            rate=rate,
            threshold=None if threshold is None else number(threshold, "threshold"),
            seed=seed,
            method=how,
        )
        store = None
        if folder is not None:
            settings = settings_of(plan, scorer, model, preprocess, chosen)
            store = Resumption(folder, settings)
        requests = requests_for(chosen)
        small = small_scorer(plan, scorer_of) if how.copies > 1 else None
        climbs = gathered(
            lambda: _share(requests, plan, scorer, small, store, batch_size=batch_size, progress=progress)
        )
    return _result(climbs, plan, scorer, is_complete=len(climbs) == len(chosen))


def _share(
    requests: list[Request],
    plan: Plan,
    scorer: Scorer,
    small: Scorer | None,
    store: Resumption | None,
    *,
    batch_size: int | Literal["auto"],
    progress: bool | None,
) -> list[Climb]:
    """Make this process's share of the images."""
    rank, count = world()
    groups = sorted({request.channel for request in requests})
    mine = [
        request
        for request in requests
        if (groups.index(request.channel) if scorer.objective.couples else request.place) % count == rank
    ]
    climbs = []
    if store is not None:
        shape = (plan.image_channels, *plan.size)
        climbs = [
            one
            for one in store.finished(mine, shape, M=scorer.channels, T=plan.steps)
            if (one.frames is None) == (plan.method.frames is None)
        ]
    done = {one.request.place for one in climbs}
    missing = [request for request in mine if request.place not in done]
    if scorer.objective.couples:  # images that are compared with one another are made together
        incomplete = {request.channel for request in missing}
        missing = [request for request in mine if request.channel in incomplete]
        climbs = [one for one in climbs if one.request.channel not in incomplete]
    with Bar(shown=rank == 0 and is_shown(progress), total=len(mine), unit="channels") as bar:
        if not missing:
            return climbs

        def show(on_the_way: float) -> None:
            figures = {"score": f"{median(each.score for each in climbs):.4g}"} if climbs else {}
            bar.reach(len(climbs) + on_the_way, **figures)

        size = fitting_batch(scorer, plan, len(missing)) if batch_size == "auto" else batch_size
        rise = climb if small is None else partial(climb_in_phases, small=small)
        with closing(rise(missing, plan, scorer, batch_size=size, show=show)) as found:
            try:
                for one in found:
                    if store is not None:
                        store.keep(one)
                    climbs.append(one)
                show(0)
            except KeyboardInterrupt:
                if not climbs or count > 1:
                    raise
    return climbs


def _result(climbs: Sequence[Climb], plan: Plan, scorer: Scorer, *, is_complete: bool) -> Maximization:
    climbs = sorted(climbs, key=lambda one: one.request.place)
    images = torch.stack([one.image for one in climbs])
    return Maximization(
        layer=scorer.layer,
        objective=repr(scorer.objective),
        channels=torch.tensor([one.request.channel for one in climbs], device="cpu"),
        images=images,
        scores=torch.tensor([one.score for one in climbs], dtype=torch.float32, device="cpu"),
        history=torch.stack([one.history for one in climbs]),
        means=torch.stack([one.means for one in climbs]),
        status=tuple(one.status for one in climbs),
        evidence=tuple(one.evidence for one in climbs),
        limits=plan.method.limits(plan.parametrization) or range_of(images),
        is_complete=is_complete,
        names_channels=scorer.objective.uses_target,
        reference_means=plan.reference_means,
        frames=None if plan.method.frames is None else tuple(_filmed(one) for one in climbs),
    )


def _filmed(one: Climb) -> torch.Tensor:
    assert one.frames is not None
    return one.frames
