"""How well each method of `explain` finds what counts: the tables of docs/explain.md.

    python benchmarks/explain_quality.py

Planted truths: networks of which it is known where the evidence lies (`tests/attribution/planted.py`); beside
it the grad-cam package, where that is installed. The demo network: patches of the photographs that it was not
trained on, each multiplied by its heatmap divided by its maximum; the drop of the probability of the class
that was explained, on average, and how often it rises instead (Chattopadhay et al. 2018).
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import sys
from pathlib import Path
from typing import get_args

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

from train_demo_net import TURNS, cut_patches, load_photographs, split  # noqa: E402

from tests.attribution.planted import PLANTED, share_inside  # noqa: E402
from torchlens_viz import explain  # noqa: E402
from torchlens_viz.attribution.way import AT_PIXELS, Method  # noqa: E402
from torchlens_viz.models.demo_net import DEMO_PHOTOGRAPHS, load_demo_net, normalize  # noqa: E402

PEERS = {
    "gradcam": "GradCAM", "gradcam++": "GradCAMPlusPlus", "hirescam": "HiResCAM", "layercam": "LayerCAM",
    "eigencam": "EigenCAM", "ablationcam": "AblationCAM",
}  # fmt: skip
METHODS = get_args(Method)
PER_CLASS = 4


def peer_share(method: str, truth: str) -> str:
    if method not in PEERS or importlib.util.find_spec("pytorch_grad_cam") is None:
        return ""
    import pytorch_grad_cam
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    planted = PLANTED[truth]()
    with contextlib.redirect_stderr(io.StringIO()):
        with getattr(pytorch_grad_cam, PEERS[method])(planted.net, [planted.net.maps]) as cam:
            image = planted.image.clone().requires_grad_()
            heatmap = torch.from_numpy(cam(image, [ClassifierOutputTarget(planted.target)]))[0]
    return f" ({share_inside(heatmap, planted.region):.2f})"


def planted_table() -> None:
    print("| method |", " | ".join(PLANTED), "|")
    print("|---|" + "---|" * len(PLANTED))
    for method in METHODS:
        cells = []
        for truth, make in PLANTED.items():
            planted = make()
            layer = None if method in AT_PIXELS else "maps"
            found = explain(planted.net, planted.image, planted.target, method=method, layer=layer)
            cells.append(f"{share_inside(found.heatmaps[0], planted.region):.2f}{peer_share(method, truth)}")
        print(f"| `{method}` |", " | ".join(cells), "|")


def demo_table() -> None:
    net = load_demo_net()
    generator = torch.Generator().manual_seed(7)
    labels = torch.arange(len(DEMO_PHOTOGRAPHS) * TURNS).repeat_interleave(PER_CLASS)
    images = normalize(cut_patches(split(load_photographs())[1], labels, generator))
    with torch.no_grad():
        probabilities = net(images).softmax(1)
    classes = probabilities.argmax(1, keepdim=True)
    before = probabilities.gather(1, classes)
    print("| method | average drop | increase | kept | lost | rank correlation |")
    print("|---|---|---|---|---|---|")
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
        print(
            f"| `{method}` | {drop:.0%} | {increase:.0%} |",
            " | ".join(f"{each:.2f}" for each in figures),
            "|",
        )


if __name__ == "__main__":
    torch.manual_seed(0)
    planted_table()
    print()
    demo_table()
