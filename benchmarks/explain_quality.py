"""How well each method of `explain` finds what counts: the tables of docs/explain.md.

    python benchmarks/explain_quality.py [--write-docs]

Planted truths: networks of which it is known where the evidence lies (`tests/attribution/planted.py`); beside
it the grad-cam package and captum, where they are installed. The demo network: patches of the photographs
that it was not trained on, each multiplied by its heatmap divided by its maximum; the drop of the probability
of the class that was explained, on average, and how often it rises instead (Chattopadhay et al. 2018).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import get_args

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

from train_demo_net import TURNS, cut_patches, load_photographs, split  # noqa: E402

from tests.attribution.planted import PLANTED, Planted, share_inside  # noqa: E402
from torchlens_viz import explain  # noqa: E402
from torchlens_viz.attribution.way import AT_PIXELS, Method  # noqa: E402
from torchlens_viz.models.demo_net import DEMO_PHOTOGRAPHS, load_demo_net, normalize  # noqa: E402

PAGE = ROOT / "docs" / "explain.md"
PEERS = {
    "gradcam": "GradCAM", "gradcam++": "GradCAMPlusPlus", "hirescam": "HiResCAM", "layercam": "LayerCAM",
    "eigencam": "EigenCAM", "ablationcam": "AblationCAM",
}  # fmt: skip
METHODS = get_args(Method)
PER_CLASS = 4
SAMPLES, NOISE = 25, 0.15  # of smoothgrad, as `explain` has them


def of_grad_cam(method: str, planted: Planted) -> Iterator[torch.Tensor]:
    """Yield the heatmap of the grad-cam package, where it has the method."""
    if method not in PEERS or importlib.util.find_spec("pytorch_grad_cam") is None:
        return
    import pytorch_grad_cam
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    with contextlib.redirect_stderr(io.StringIO()):
        with getattr(pytorch_grad_cam, PEERS[method])(planted.net, [planted.net.maps]) as cam:
            image = planted.image.clone().requires_grad_()
            yield torch.from_numpy(cam(image, [ClassifierOutputTarget(planted.target)]))[0]


def of_captum(method: str, planted: Planted) -> Iterator[torch.Tensor]:
    """Yield captum's heatmap, where it has the method."""
    if importlib.util.find_spec("captum") is None:
        return
    from captum import attr

    net, image, target = planted.net, planted.image.clone(), planted.target
    torch.manual_seed(0)  # of its noise
    if method == "gradcam":
        maps = attr.LayerGradCam(net, net.maps).attribute(image, target=target, relu_attributions=True)
        found = attr.LayerAttribution.interpolate(maps, tuple(image.shape[2:]), "bilinear")
    elif method == "gradient":
        found = attr.Saliency(net).attribute(image, target=target)
    elif method == "smoothgrad":
        found = attr.NoiseTunnel(attr.Saliency(net)).attribute(
            image, nt_type="smoothgrad", nt_samples=SAMPLES, target=target, abs=False,
            stdevs=NOISE * float(image.max() - image.min()),
        ).abs()  # fmt: skip
    elif method == "integrated_gradients":
        found = attr.IntegratedGradients(net).attribute(image, target=target)
    elif method == "guided":
        found = attr.GuidedBackprop(net).attribute(image, target=target).abs()
    else:
        return
    yield found[0, 0].detach().float()


def planted_table() -> str:
    """Return the table of planted truths, as Markdown."""
    lines = [f"| method | {' | '.join(PLANTED)} |", "|---|" + "---|" * len(PLANTED)]
    for method in METHODS:
        cells = []
        for make in PLANTED.values():
            planted = make()
            layer = None if method in AT_PIXELS else "maps"
            found = explain(planted.net, planted.image, planted.target, method=method, layer=layer)
            share = share_inside(found.heatmaps[0], planted.region)
            with warnings.catch_warnings(action="ignore"):
                heatmaps = [*of_grad_cam(method, planted), *of_captum(method, planted)]
            theirs = ", ".join(f"{share_inside(each, planted.region):.2f}" for each in heatmaps)
            cells.append(f"{share:.2f}{f' ({theirs})' if theirs else ''}")
        lines.append(f"| `{method}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def demo_table() -> str:
    """Return the table of the demo network, as Markdown."""
    net = load_demo_net()
    generator = torch.Generator().manual_seed(7)
    labels = torch.arange(len(DEMO_PHOTOGRAPHS) * TURNS).repeat_interleave(PER_CLASS)
    images = normalize(cut_patches(split(load_photographs())[1], labels, generator))
    with torch.no_grad():
        probabilities = net(images).softmax(1)
    classes = probabilities.argmax(1, keepdim=True)
    before = probabilities.gather(1, classes)
    lines = [
        "| method | average drop | increase | kept | lost | rank correlation |",
        "|---|---|---|---|---|---|",
    ]
    for method in METHODS:
        layer = "features.7" if method in PEERS else None
        parts = [explain(net, part, method=method, layer=layer) for part in images.split(32)]
        heatmaps = torch.cat([part.heatmaps for part in parts]).clamp(min=0)
        heatmaps /= heatmaps.amax((1, 2), keepdim=True).clamp(min=1e-12)
        with torch.no_grad():
            after = net(images * heatmaps[:, None]).softmax(1).gather(1, classes)
        drop = ((before - after).clamp(min=0) / before).mean()
        increase = (after > before).float().mean()
        figures = [
            torch.cat([getattr(part.trust, name) for part in parts]).nanmedian()
            for name in ("kept", "lost", "rank_correlation")
        ]
        cells = [f"{drop:.0%}", f"{increase:.0%}", *(f"{each:.2f}" for each in figures)]
        lines.append(f"| `{method}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def with_table(text: str, name: str, table: str) -> str:
    """Return the text of a page with another table between the marks of that name."""
    begin, end = (f"<!-- {name}, by explain_quality.py: {mark} -->" for mark in ("begin", "end"))
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise SystemExit(f"the page has no place for it, {begin} ... {end}")
    return f"{before}{begin}\n\n{table}\n\n{end}{after}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Make both tables, print them and, if so asked, write them into the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write-docs", action="store_true", help="write the tables into docs/explain.md")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    for name, table in (("planted truths", planted_table()), ("demo network", demo_table())):
        print(table, end="\n\n")
        if options.write_docs:
            PAGE.write_text(with_table(PAGE.read_text("utf-8"), name, table), "utf-8")


if __name__ == "__main__":
    main()
