"""Write what is made from the sources: `docs/reference.md`, `llms.txt` and `SKILL.md`.

`python docs/make_pages.py` writes them anew; `tests/test_pages.py` fails where they are out of date.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torchlens_viz

DOCS: Final = Path(__file__).parent
ROOT: Final = DOCS.parent
_SECTIONS: Final = ("Args", "Attributes", "Returns", "Raises", "Yields", "Example")
_WIDE: Final = 88  # a signature that is wider has a line per parameter

# What stands under which heading.
GROUPS: Final[dict[str, tuple[str, ...]]] = {
    "Recording": ("capture", "Activations", "Inputs", "InputOutput"),
    "Statistics": ("RunningStats", "ChannelStats"),
    "Pictures": (
        *("kernel_grid", "save_kernel_grid", "feature_grid", "save_feature_grid", "pair_grid"),
        *("save_pair_grid", "overlay_grid", "save_overlay_grid", "save_kernel_sheets", "save_feature_maps"),
        *("make_grid", "receptive_field"),
    ),
    "What drives a channel": (
        *("maximize", "Maximization", "Normalized", "Classic", "Transforms", "Pixels", "Fourier"),
        "FixedSpectrum",
    ),
    "What an image holds": ("project", "Projection", "explain", "Explanation"),
    "A whole data set": ("survey", "Survey", "top_projections", "ablate", "Ablation"),
    "Two networks": ("compare", "Comparison"),
    "A whole network": ("layers", "LayerTable", "LayerRow", "report"),
    "While it trains": ("Monitor", "Trouble", "FolderWriter"),
    "Errors": ("TorchlensVizError", "LayerNotFoundError"),
}
_MODULES: Final = ("testing", "objectives", "errors")  # public as a whole


def reference() -> str:
    """Return the page of every public name, with its signature and docstring."""
    parts = [
        "# Reference\n\nMade from the docstrings by `python docs/make_pages.py`. Public are the names on "
        "this page, and no others; all are attributes of `torchlens_viz`.\n"
    ]
    for heading, names in _groups().items():
        parts.append(f"## {heading}\n")
        parts += [_entry(name, getattr(torchlens_viz, name)) for name in names]
    for module in _MODULES:
        parts.append(
            f"## `torchlens_viz.{module}`\n\n{_first_line(importlib.import_module(_place(module)))}.\n"
        )
        parts += [_entry(f"{module}.{name}", member) for name, member in _members(module)]
    return "\n".join(parts)


def llms() -> str:
    """Return the page that tells a language model where to read what."""
    title, _, promise = (DOCS / "index.md").read_text("utf-8").partition("\n\n")
    lines = [
        "# torchlens_viz",
        "",
        f"> {promise.partition(chr(10))[0].replace('**', '')}",
        "",
        "Requires Python 3.11 and torch 2.8 or later. Axes are (N, C, H, W), kernels (O, I, kH, kW). Sheets "
        "are PIL images of mode RGB. Errors name the argument, what it must be, what it was, and what to do.",
        "",
        "## Pages",
        "",
    ]
    for page in _pages():
        heading, sentence = _opening((DOCS / page).read_text("utf-8"))
        lines.append(f"- [{heading}](docs/{page}): {sentence}")
    assert title
    lines += ["", "## Public names", ""]
    lines += [f"- `{name}`: {_first_line(member)}" for name, member in _public()]
    return "\n".join(lines) + "\n"


def skill() -> str:
    """Return the page that tells a coding agent how to use the library, from the how-to page."""
    how_to = (DOCS / "how-to.md").read_text("utf-8")
    _, *sections = re.split(r"^## ", how_to, flags=re.MULTILINE)
    table, *questions = sections
    head = (
        "---\nname: torchlens_viz\ndescription: See inside PyTorch CNNs and vision transformers. Record "
        "activations safely, draw kernels and maps, maximise channels, explain answers, survey a data set "
        "for dead channels, watch a training, and assert on activations in tests.\n---\n\n"
        "# torchlens_viz\n\n"
        "- Read `llms.txt` for every public name, `docs/reference.md` for signatures.\n"
        "- Layers are chosen by name, number, class, glob, pattern, predicate or a list of these; an unknown "
        "name raises with the nearest ones.\n"
        "- Run a model within `with capture(...)`; read `acts[name]` after it. No hooks by hand.\n"
        "- `grid()` and `*_grid` return PIL images; `save_*` write files. Notebooks show results.\n"
        '- Pass `value_range="robust"` where an outlier would make a sheet pale.\n'
        "- Nothing here changes the model, its flags, gradients or random state.\n"
        "- In the snippets `model`, `image` (1, 3, H, W), `photograph` (PIL) and `loader` are yours.\n\n"
    )
    imports = re.search(r"^```python\n.*?^```$", how_to, re.MULTILINE | re.DOTALL)
    assert imports
    return (
        head
        + "\n\n".join(
            [
                f"## {table.strip()}",
                f"## Imports\n\n{imports[0]}",
                *(f"## {each.strip()}" for each in questions),
            ]
        ).replace("](", "](docs/")
        + "\n"
    )


PAGES: Final = {DOCS / "reference.md": reference, ROOT / "llms.txt": llms, ROOT / "SKILL.md": skill}


def _groups() -> dict[str, tuple[str, ...]]:
    """Return the public names by heading; those that nobody has placed yet come last."""
    placed = {name for names in GROUPS.values() for name in names}
    rest = tuple(name for name in torchlens_viz.__all__ if name not in placed)
    return {**GROUPS, "More": rest} if rest else GROUPS


def _place(module: str) -> str:
    return f"torchlens_viz.{module}"


def _pages() -> list[str]:
    """Return the pages in the order of the navigation."""
    return re.findall(r"([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text("utf-8"), re.MULTILINE)


def _public() -> Iterator[tuple[str, Any]]:
    for names in _groups().values():
        yield from ((name, getattr(torchlens_viz, name)) for name in names)
    for module in _MODULES:
        yield from ((f"{module}.{name}", member) for name, member in _members(module))


def _members(module: str) -> list[tuple[str, Any]]:
    """Return the public functions and classes that a module has, in the order of its source or `__all__`."""
    home = importlib.import_module(_place(module))
    names = getattr(home, "__all__", None) or [
        name
        for name, member in vars(home).items()
        if not name.startswith("_")
        and (inspect.isfunction(member) or inspect.isclass(member))
        and str(member.__module__).startswith(_place(module))
    ]
    return [(name, getattr(home, name)) for name in names if name not in torchlens_viz.__all__]


def _opening(text: str) -> tuple[str, str]:
    """Return the heading of a page and its first sentence."""
    heading = re.search(r"^# (.*)$", text, re.MULTILINE)
    paragraphs = [part for part in re.split(r"\n\s*\n", text) if re.match(r"[A-Z*]|`\w", part)]
    assert heading
    sentence = re.split(r"(?<=[.:])\s", " ".join(paragraphs[0].split()))[0] if paragraphs else ""
    sentence = re.sub(r"\[(.*?)\]\(.*?\)", r"\1", sentence).replace("**", "")  # links would lead elsewhere
    return heading[1], sentence.rstrip(":.") + "."


def _first_line(member: Any) -> str:
    return (inspect.getdoc(member) or "").partition("\n")[0].rstrip(".")


def _entry(name: str, member: Any) -> str:
    parts = [f"### `{name}`\n", f"```\n{_signature(name.rpartition('.')[2], member)}\n```\n", _prose(member)]
    if inspect.isclass(member) and not issubclass(member, BaseException):
        for method, function in vars(member).items():
            if method.startswith("_") or not inspect.getdoc(getattr(member, method)):
                continue
            inner = function.__func__ if isinstance(function, classmethod | staticmethod) else function
            if inspect.isfunction(inner):
                parts.append(f"#### `{method}`\n\n```\n{_signature(method, inner)}\n```\n\n{_prose(inner)}")
            elif isinstance(function, property) or hasattr(function, "func"):
                parts.append(f"#### `{method}`\n\n{_prose(getattr(function, 'fget', None) or function.func)}")
    return "\n".join(parts)


def _signature(name: str, member: Any) -> str:
    """Return how a thing is called, without the types, which the docstring tells in words."""
    if inspect.isclass(member) and issubclass(member, BaseException | tuple):
        fields = getattr(member, "_fields", None)
        return f"class {name}" if fields is None else f"class {name}({', '.join(fields)})"
    prefix = "class " if inspect.isclass(member) else ""
    try:
        signature = inspect.signature(member)
    except (TypeError, ValueError):
        return f"{prefix}{name}"
    shown, starred = [], False
    for parameter in signature.parameters.values():
        if parameter.name in ("self", "cls") or parameter.name.startswith("_"):
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            shown.append("*")
            starred = True
        mark = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        starred = starred or mark == "*"
        default = "" if parameter.default is parameter.empty else f"={_default(parameter.default)}"
        shown.append(f"{mark}{parameter.name}{default}")
    line = f"{prefix}{name}({', '.join(shown)})"
    return line if len(line) <= _WIDE else f"{prefix}{name}(\n    " + ",\n    ".join(shown) + ",\n)"


def _default(value: Any) -> str:
    if inspect.isclass(value):
        return value.__name__
    return "..." if " at 0x" in repr(value) else repr(value)


def _prose(member: Any) -> str:
    """Return a docstring as Markdown: a list for each section, and examples as code."""
    out: list[str] = []
    section, in_code = "", False
    for line in (inspect.getdoc(member) or "").splitlines():
        found = re.fullmatch(rf"({'|'.join(_SECTIONS)}):", line)
        if found:
            section = found[1]
            out += ["", f"**{section}**", ""]
            if section == "Example":
                out.append("```python")
                in_code = True
            continue
        if section == "Example":
            out.append(line.removeprefix("    "))
        elif section in ("Args", "Attributes", "Raises") and (
            item := re.match(r"    (\*{0,2}\w+): (.*)", line)
        ):
            out.append(f"- `{item[1]}`: {item[2]}")
        elif section and (item := re.match(r" {8,12}(\w+) \((.*?)\): (.*)", line)):
            out.append(f"    - `{item[1]}` ({item[2]}): {item[3]}")
        elif section and not line.strip():
            out.append("")
        else:
            out.append(f"  {line.strip()}" if section in ("Args", "Attributes", "Raises") else line.strip())
    if in_code:
        while not out[-1].strip():
            out.pop()
        out.append("```")
    return "\n".join(out) + "\n"


def main() -> None:
    """Write every page."""
    for path, make in PAGES.items():
        path.write_text(make(), "utf-8")


if __name__ == "__main__":
    main()
