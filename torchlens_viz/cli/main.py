"""The command line: arguments in, files out, and one line on stderr for whatever the user can put right."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from torchlens_viz.cli.parser import PROGRAM, parser
from torchlens_viz.errors import (
    InvalidArgumentError,
    PictureError,
    TorchlensVizError,
    in_one_line,
    kind_of,
    message_of,
    one_line,
)
from torchlens_viz.files.paths import require_writable

if TYPE_CHECKING:
    from torchlens_viz.cli.commands import Outcome

_WRITING_ONE_FILE: Final = ("kernels", "compare", "report")  # the others write a folder
_MOST_SAID: Final = 4000  # characters of an error, which may name every layer
_DRAWING_OPTIONS = (
    "cmap", "nrow", "padding", "scale_each", "value_range", "filters", "channels", "upscale",
    "interpolation", "labels", "legend", "title", "sort_by", "max_tiles", "page", "channel_dim", "grid",
    "plane", "slices",
)  # fmt: skip
_CLIMBING_OPTIONS = (
    "channels", "size", "steps", "lr", "threshold", "objective", "transforms", "parametrization", "method",
    "seed", "precision", "batch_size", "channel_dim",
)  # fmt: skip
_PROJECTING_OPTIONS = ("channels", "rule", "position", "batch_size", "channel_dim")
_EXPLAINING_OPTIONS = ("method", "grid", "samples", "noise", "seed", "channel_dim")
_SLICING_OPTIONS = ("plane", "slices")
_COMPARING_OPTIONS = ("match", "rtol", "atol", "isolate", "channel_dim")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The arguments after the program's name; by default those of the process.

    Returns:
        The exit code: 0; 1 where `compare` finds a difference; 2 where the input is at fault (one line on
        stderr says what to change), 130 after Ctrl-C, 141 where nobody reads the output any more.
    """
    arguments = None
    try:
        arguments = parser().parse_args(argv)
        if getattr(arguments, "out", None) is not None:
            is_file = arguments.command in _WRITING_ONE_FILE
            require_writable(arguments.out, "--out", "file" if is_file else "folder", PictureError)
        code = _run(arguments, sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
    except TorchlensVizError as error:
        print(f"{PROGRAM}: error: {in_one_line(message_of(error), _MOST_SAID)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        _silence_stdout()
        return 141
    except BaseException as error:
        if arguments is None:  # --help
            raise
        if isinstance(error, Exception):
            method = _method_of_a_model(error)
            if method is None:  # a fault of ours
                raise
            told = f"`{method}` of the model fails ({one_line(error)}); mend that method, or leave it out"
        else:
            told = (
                f"code that belongs to the model ended the program ({one_line(error)}); let it raise an "
                "Exception, or return"
            )
        print(f"{PROGRAM}: error: {told}", file=sys.stderr)
        return 2
    return code


def _run(arguments: argparse.Namespace, words: Sequence[str]) -> int:
    # Imported only now: torch takes seconds, and neither --help nor a mistyped option should wait for it.
    if arguments.command == "demo":
        from torchlens_viz.cli.demo import run_demo

        run_demo(image=arguments.image, out=arguments.out)
        return 0

    if arguments.command == "survey":
        from torchlens_viz.cli.survey import survey_folder

        _report(
            survey_folder(
                arguments.model,
                arguments.folder,
                arguments.out,
                layers=arguments.layer,
                weights=arguments.weights,
                device=arguments.device,
                batch_size=arguments.batch_size,
                top_k=arguments.top_k,
                skip_bad=arguments.skip_bad,
                loss=arguments.loss,
                channels=arguments.channels,
                channel_dim=arguments.channel_dim,
            )
        )
        return 0

    if arguments.command == "compare":
        return _compare(arguments)

    if arguments.command == "project":
        from torchlens_viz.cli.project import project_units

        _report(
            project_units(
                arguments.model,
                arguments.image,
                arguments.out,
                layers=arguments.layer,
                weights=arguments.weights,
                device=arguments.device,
                options=_chosen(arguments, _PROJECTING_OPTIONS),
            )
        )
        return 0

    if arguments.command == "explain":
        from torchlens_viz.cli.explain import explain_pictures

        _report(
            explain_pictures(
                arguments.model,
                arguments.image,
                arguments.out,
                target=arguments.target,
                layers=arguments.layer,
                weights=arguments.weights,
                device=arguments.device,
                drawing=_chosen(arguments, ("cmap", *_SLICING_OPTIONS)),
                options=_chosen(arguments, _EXPLAINING_OPTIONS),
            )
        )
        return 0

    if arguments.command == "layers":
        from torchlens_viz.cli.layers import list_layers

        _report(
            list_layers(
                arguments.model,
                arguments.image,
                layers=arguments.layer,
                blocks=not arguments.no_blocks,
                as_json=arguments.json,
            )
        )
        return 0

    if arguments.command == "report":
        from torchlens_viz.cli.report import report_on

        _report(
            report_on(
                arguments.model,
                arguments.image,
                arguments.out,
                layers=arguments.layer,
                weights=arguments.weights,
                device=arguments.device,
                folder=arguments.survey,
                maximized=arguments.maximize,
                max_channels=arguments.max_channels,
                assets=arguments.assets,
                title=arguments.title,
                command=shlex.join([PROGRAM, *words]),
            )
        )
        return 0

    from torchlens_viz.cli import commands

    options = _chosen(arguments, _DRAWING_OPTIONS)
    is_full = getattr(arguments, "full_range", False)
    if is_full and "value_range" in options:
        raise InvalidArgumentError("`--full-range` and `--value-range` exclude each other; leave one out")
    if not is_full:
        options.setdefault("value_range", "robust")
    if arguments.command == "kernels":
        outcome = commands.draw_kernels(
            arguments.model, arguments.out, layer=arguments.layer, weights=arguments.weights, options=options
        )
    elif arguments.command == "maximize":
        climbing = _chosen(arguments, _CLIMBING_OPTIONS)
        outcome = commands.maximize_layers(
            arguments.model,
            arguments.out,
            layers=arguments.layer,
            weights=arguments.weights,
            device=arguments.device,
            options=climbing,
        )
    else:
        outcome = commands.draw_maps(
            arguments.model,
            arguments.image,
            arguments.out,
            layers=arguments.layer,
            weights=arguments.weights,
            options=options,
        )
    _report(outcome)
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from torchlens_viz.cli.compare import compare_models

    verdict = compare_models(
        arguments.a,
        arguments.b,
        arguments.images,
        arguments.out,
        layers=arguments.layer,
        weights=(arguments.weights_a, arguments.weights_b),
        device=arguments.device,
        options=_chosen(arguments, _COMPARING_OPTIONS),
    )
    print(verdict.table)
    _report(verdict.outcome)
    return 0 if verdict.is_same else 1


def _method_of_a_model(error: Exception) -> str | None:
    """Return through which method of a module of the user's an exception came, or None."""
    torch = sys.modules.get("torch")
    trace = error.__traceback__
    while torch is not None and trace is not None:
        code, own = trace.tb_frame.f_code, trace.tb_frame.f_locals
        place = str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
        holder = own.get(code.co_varnames[0]) if code.co_argcount else None
        if place not in ("torch", "torchlens_viz") and issubclass(type(holder), torch.nn.Module):
            return f"{kind_of(holder)}.{code.co_name}"
        trace = trace.tb_next
    return None


def _chosen(arguments: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """Return the options that were given; the others have the defaults of what is called."""
    found = {name: getattr(arguments, name, None) for name in names}
    return {name: value for name, value in found.items() if value is not None}


def _report(outcome: Outcome) -> None:
    if outcome.text:
        print(outcome.text)
    for path in outcome.paths:
        print(path.absolute())
    for note in outcome.notes:
        print(f"{PROGRAM}: {note}", file=sys.stderr)


def _silence_stdout() -> None:
    """Point stdout to nowhere, so that Python's own flush at exit does not fail a second time."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
