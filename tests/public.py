"""Every public function on a small network, and what it gives in a form that can be compared."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

import torchlens_viz as tv
from torchlens_viz import testing
from torchlens_viz.models.demo_net import load_demo_net

IMAGES = torch.rand(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class Writer:
    """Keeps what a monitor logs."""

    def __init__(self):
        self.seen = {}

    def add_image(self, tag, pixels, step):
        self.seen[tag] = np.asarray(pixels)

    def add_scalar(self, tag, value, step):
        self.seen[tag] = np.asarray(float(value))

    def add_histogram(self, tag, values, step):
        self.seen[tag] = np.asarray(values)


def make_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3)).eval()


def captured(net, images, **options):
    with torch.no_grad(), tv.capture(net, "*", **options) as acts:
        net(images)
    return acts


def monitored(net, images):
    writer = Writer()
    with tv.Monitor(net, writer, layers="*", probe=images, every=1, norms=True, alarm=None) as monitor:
        monitor.step(0)
        monitor.step(1)
    return writer.seen


def surveyed(net, images, **options):
    found = tv.survey(net, images.split(2), "*", top_k=2, correlations=True, progress=False, **options)
    sheet = np.array(found.grid("0", images.cpu()))
    return [found.to_dict(), sheet, found.findings(), repr(found)]


def weighed(net, images, **options):
    def score(output, batch):
        return output[:, 1].mean((1, 2))

    found = tv.survey(net, images.split(2), "*", top_k=2, progress=False, target=score, **options)
    parts = ("values", "samples", "positions")
    tops = [getattr(top, part) for top in found.top_by_relevance.values() for part in parts]
    return [*tops, np.array(found.grid("0", images.cpu(), by="relevance"))]


def maximised(net, images, **options):
    result = tv.maximize(net, "3", [0, 2], size=10, steps=6, precision="float32", **options)
    return [result.images, result.scores, result.means, result.history, result.grid()]


def explained(net, images, method, **options):
    found = tv.explain(net, images, lambda output: output[:, 1].mean((1, 2)), method=method, **options)
    trust = found.trust
    figures = [trust.kept, trust.lost, trust.rank_correlation]
    return [found.heatmaps, found.scores, *(each.nan_to_num() for each in figures), found.grid()]


def compared(net, images, **options):
    other = nn.Sequential(net[0], net[1], nn.LeakyReLU(0.3), net[3]).eval()
    found = tv.compare(net, other, images, **options)
    figures = [[each.by_channel, each.max_abs, each.relative, each.cosine] for each in found.layers]
    return [found.first, [each.layer for each in found.beyond], *figures]


def with_head(net):
    return nn.Sequential(*net, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()


def labelled(images):
    return [(part, torch.tensor([0, 1], device=images.device)) for part in images.split(2)]


def ablated(net, images, **options):
    found = tv.ablate(with_head(net), labelled(images), "3", loss="cross_entropy", **options)
    return [found.loss_change, found.accuracy_change, found.accuracy]


def weighed_by_loss(net, images, **options):
    found = tv.survey(with_head(net), labelled(images), "*", top_k=2, progress=False, **options)
    return [found.to_dict(), found.findings()]


def doubled(net, images):
    found = tv.survey(net, images.split(2), "*", top_k=2, correlations=True, bins="log", progress=False)
    return [found.duplicates("0", threshold=0.1, model=net), found.dead("0"), found.to_dict()]


def gone_on(net, images):
    with tempfile.TemporaryDirectory() as folder:
        begun = surveyed(net, images, checkpoint=Path(folder) / "survey")
        return [begun, surveyed(net, images, checkpoint=Path(folder) / "survey")]


def reported(net, images):
    with tempfile.TemporaryDirectory() as folder:
        page = tv.report(net, images[:2], Path(folder) / "page.html", projections=1)
        return page.read_text("utf-8")


PUBLIC = {
    "capture": lambda net, images: list(captured(net, images).values()),
    "reduce": lambda net, images: list(captured(net, images, reduce=lambda t: t.mean((2, 3))).values()),
    "offload": lambda net, images: list(captured(net, images, device="cpu").values()),
    "channels": lambda net, images: list(captured(net, images, channels=[2, 0]).values()),
    "statistics": lambda net, images: [
        each.to_dict() for each in captured(net, images, reduce=tv.RunningStats(bins="log")).values()
    ],
    "stop": lambda net, images: list(captured(net, images, stop=True).values()),
    "make_grid": lambda net, images: tv.make_grid(images, normalize=True, scale_each=True),
    "kernel_grid": lambda net, images: tv.kernel_grid(net, labels=True, legend=True, title="x"),
    "kernel_grid, matrix": lambda net, images: tv.kernel_grid(images[:1].reshape(12, 36, 1, 1)),
    "feature_grid": lambda net, images: tv.feature_grid(
        captured(net, images)["0"], sort_by="std", interpolation="bicubic"
    ),
    "overlay_grid": lambda net, images: tv.overlay_grid(net, "3", images[0], legend=True),
    "pair_grid": lambda net, images: tv.pair_grid(net, "0", images[0]),
    "receptive_field": lambda net, images: repr(tv.receptive_field(net, "3", (1, 3, 12, 12))),
    "project": lambda net, images: [
        getattr(tv.project(net, "3", images[0], [4, 1, 0]), name)
        for name in ("images", "positions", "scores", "pixels")
    ],
    "project, drawn": lambda net, images: tv.project(net, "3", images[0], rule="guided").grid(),
    "layers": lambda net, images: tv.layers(net, input_shape=(1, 3, 12, 12)).to_dict(),
    "survey": surveyed,
    "survey, relevance": weighed,
    "top_projections": lambda net, images: tv.top_projections(
        tv.survey(net, images.split(2), "3", top_k=4, progress=False), "3", [0, 2], images.cpu()
    ),
    "maximize": maximised,
    "maximize, transformed": lambda net, images: maximised(
        net, images, parametrization="fourier", transforms="robust"
    ),
    "maximize, classic": lambda net, images: maximised(net, images, method="classic"),
    **{
        f"explain, {method}": partial(explained, method=method)
        for method in ("layercam", "eigencam", "ablationcam", "guided")
    },
    **{
        f"explain, {method}": partial(explained, method=method, samples=6)
        for method in ("smoothgrad", "integrated_gradients")
    },
    "compare": compared,
    "compare, correlations": partial(compared, correlations=True),
    "compare, isolated": partial(compared, isolate=True),
    "ablate": ablated,
    "ablate, mean": partial(ablated, by="mean"),
    "survey, loss": partial(weighed_by_loss, loss="cross_entropy"),
    "survey, by class": partial(weighed_by_loss, by_class=True),
    "survey, duplicates": doubled,
    "survey, checkpoint": gone_on,
    "report": reported,
    "monitor": monitored,
    "assertions": lambda net, images: [
        testing.assert_finite(captured(net, images)),
        testing.assert_mean(captured(net, images), -9, 9),
        testing.assert_activations_close(captured(net, images), captured(net, images)),
    ],
    "demo_net": lambda net, images: load_demo_net()(torch.zeros(1, 3, 32, 32, device="cpu")),
}


def plain(value):
    """What can be compared."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().numpy()
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, np.ndarray):
        return value
    return value.tobytes() if hasattr(value, "tobytes") else value
