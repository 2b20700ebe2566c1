"""`layers`: which layers a network has, in execution order, and what each puts out."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, Final

from torch import nn

from torchlens_viz.arguments import made_of, shown
from torchlens_viz.errors import InvalidArgumentError, InvalidTypeError, TorchlensVizError, one_line
from torchlens_viz.hooks.layout import Layout
from torchlens_viz.models.copying import private_copy
from torchlens_viz.models.inputs import shown_to
from torchlens_viz.models.layers import Selector, named_layers, select, unwrap
from torchlens_viz.models.state import device_of
from torchlens_viz.nested import tensors
from torchlens_viz.overview.example import given_inputs, usual_inputs
from torchlens_viz.overview.rows import is_block, rows_of
from torchlens_viz.overview.table import LayerTable
from torchlens_viz.overview.trace import Inputs, Trace, time_shares, trace
from torchlens_viz.receptive.everywhere import receptive_fields

_MOST_AXES: Final = 16


def layers(
    model: nn.Module,
    x: Any = None,
    *,
    layers: Selector | None = None,
    blocks: bool = True,
    input_shape: Sequence[int] | None = None,
    channel_dim: int | None = None,
) -> LayerTable:
    """List the layers of a network in execution order, to find out which one to look at.

    Without `x`, a copy of the network runs on the meta device, where nothing is computed and no memory is
    taken, however large it is. With `x`, the network itself runs a few times, in eval mode, and time is
    measured. Either way the model, its flags, its buffers and the random numbers stay as they are.

    Args:
        model: The network.
        x: What it takes: a tensor (N, C, ...), a tuple of what it takes by position, a mapping of what it
            takes by name, a picture (in [0, 1]), or anything else, handed over as it is. None tries zeros of
            usual shapes.
        layers: Which layers to list, such as the glob `"features.*"`; see
            `torchlens_viz.models.layers.select`. None is all of them, without the network itself. Marks are
            about the whole network, whatever is listed.
        blocks: List also layers that hold others.
        input_shape: The shape (N, C, ...) of the zeros to take where `x` is None.
        channel_dim: The dimension that counts channels, in every layer; None finds it for each.

    Returns:
        The table: for each layer its name, kind, output shape and layout, receptive field and step in pixels,
        parameters, share of time, number of calls, whether it has maps, and what writes over its output.

    Raises:
        LayerNotFoundError: `layers` matches nothing.
        InvalidArgumentError: No input of a usual shape runs through the network, or `x` and `input_shape` are
            both given.
        InvalidTypeError: `model` is no module.
        CaptureError: The model is TorchScript or fully sharded.

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 7, 2, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2))
        >>> table = layers(net, input_shape=(1, 3, 32, 32))
        >>> [(row.name, row.maps, row.receptive_field) for row in table]
        [('0', (16, 16), (7, 7)), ('1', (16, 16), (7, 7)), ('2', (8, 8), (9, 9))]
        >>> table["0"].overwritten_by, table["2"].marks
        ('1', ('last at 8 x 8', 'last with maps'))
    """
    if not isinstance(model, nn.Module):
        raise InvalidTypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}")
    if x is not None and input_shape is not None:
        raise InvalidArgumentError("`input_shape` has no effect where `x` is given; leave one of them out")
    known = named_layers(model)
    wanted = [layer for layer in known if layer.name] if layers is None else select(model, layers)
    twin = _without_values(model)
    shares: Mapping[str, float] = {}
    if x is None:
        shapes = () if input_shape is None else [_checked(input_shape)]
        log, inputs = _run_of_zeros(model, twin, shapes, channel_dim)
    else:
        inputs = given_inputs(model, x)
        log = _log(model, channel_dim)
        with shown_to(model, inputs, "x", "pass a tuple or a mapping of all that it takes"):
            trace(model, known, inputs, log)
            if device_of(model).type != "meta":
                shares = time_shares(model, known, inputs)
    still = model if twin is None else twin
    fields = receptive_fields(still, named_layers(still), *inputs, log.channel_dims())
    rows = rows_of(known, log.calls, _image_shape(inputs), fields, shares)
    asked = {layer.name for layer in wanted}
    ran = {name for row in rows for name in row.names}
    return LayerTable(
        model=type(unwrap(model)).__name__,
        input_shapes=tuple(tuple(each.shape) for each in tensors(inputs)),
        rows=tuple(row for row in rows if asked & set(row.names) and (blocks or not row.is_block)),
        not_called=tuple(
            layer.name for layer in wanted if layer.name not in ran and not is_block(layer.module)
        ),
    )


def _checked(shape: Sequence[int]) -> tuple[int, ...]:
    rule = f"`input_shape` must be (N, C, ...) in ints, got {shown(shape)}"
    sizes = made_of(shape, lambda given: tuple(map(operator.index, islice(given, _MOST_AXES))), rule)
    if len(sizes) < 2 or min(sizes) < 1:
        raise InvalidArgumentError(
            f"`input_shape` must be (N, C, ...) with sizes above 0, got {shown(shape)}"
        )
    return sizes


def _without_values(model: nn.Module) -> nn.Module | None:
    """Return a copy on the meta device, or the model if it is there; None where it cannot be copied."""
    held = [*model.parameters(), *model.buffers()]
    if held and all(each.is_meta for each in held):
        return model
    try:
        return private_copy(unwrap(model), lambda tensor: tensor.detach().to("meta"), warn=False)
    except InvalidTypeError:
        return None


def _log(model: nn.Module, channel_dim: int | None) -> Trace:
    return Trace(Layout(named_layers(model), channel_dim))


def _run_of_zeros(
    model: nn.Module, twin: nn.Module | None, shapes: Sequence[Sequence[int]], channel_dim: int | None
) -> tuple[Trace, Inputs]:
    """Run a network on the first input that it takes: without values, or where it needs some, as it is."""
    tried: list[tuple[int, int]] = []  # how far each came, and which one it is, negated
    error: Exception | None = None
    for place, inputs in enumerate(usual_inputs(twin, shapes) if twin is not None else ()):
        assert twin is not None
        log = _log(twin, channel_dim)
        try:
            trace(twin, named_layers(twin), inputs, log)
            return log, inputs
        except TorchlensVizError:
            raise
        except Exception as failure:  # a shape that does not fit, or a network that looks at values
            error = failure
            tried.append((len(log.calls), -place))
    if twin is not model:
        best = -max(tried)[1] if tried else 0
        for inputs in islice(usual_inputs(model, shapes), best, best + 1):
            log = _log(model, channel_dim)
            try:
                trace(model, named_layers(model), inputs, log)
                return log, inputs
            except TorchlensVizError:
                raise
            except Exception as failure:
                error = failure
    why = f" ({one_line(error)})" if error is not None else ""
    what = "`input_shape` must be one that the network takes" if shapes else "`x` must be given"
    raise InvalidArgumentError(
        f"{what}: {type(unwrap(model)).__name__} does not run on zeros of "
        f"{'that shape' if shapes else 'any usual shape'}{why}; "
        + ("build it with values, or " if twin is model else "")
        + "pass an input that it takes as `x`"
    ) from error


def _image_shape(inputs: Inputs) -> tuple[int, ...]:
    """Return the sizes of the axes of the image, or of whatever the network takes first."""
    return next((tuple(each.shape) for each in tensors(inputs) if each.ndim > 2), ())
