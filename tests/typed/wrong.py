"""What a type checker must refuse: one wrong use in each line that ends in `# wrong`. It is never run."""

from __future__ import annotations

from pathlib import Path
from typing import assert_type

import torch
from torch import nn

import torchlens_viz as tv

net = nn.Conv2d(3, 4, 3)
images = torch.rand(2, 3, 8, 8)

tv.capture(net, 1.5)  # wrong
tv.capture(net, nn.Conv2d, io="inputs")  # wrong
tv.kernel_grid("net")  # wrong
tv.kernel_grid(net, interpolation="cubic")  # wrong
tv.save_kernel_grid(net, "kernels.png", scale=True)  # wrong
tv.save_feature_grid(images, Path("maps.png"), nrow="8")  # wrong
tv.feature_grid(images, value_range="strong")  # wrong
tv.overlay_grid(net, "0", images, backdrop="colour")  # wrong
tv.layers(net, input_shape=32)  # wrong
tv.maximize(net, "", steps="64")  # wrong
tv.maximize(net, "", objective="sum")  # wrong
tv.maximize(net, "", method="keras")  # wrong
tv.explain(net, images, method="gradcamplus")  # wrong
tv.project(net, "", images, position="best")  # wrong
tv.survey(net, [images], "", bins="linear")  # wrong
tv.ablate(net, [images], "")  # wrong
tv.compare(net, "other", images)  # wrong
tv.Monitor(net, "runs", alarm=True)  # wrong
tv.testing.assert_finite("features.0")  # wrong
tv.testing.assert_finite(net)  # wrong
tv.testing.assert_mean(images, 0, 1, per="sample")  # wrong
tv.RunningStats().compute().mean.lower()  # wrong
assert_type(tv.explain(net, images).targets, torch.Tensor)  # wrong
first: tv.LayerRow = tv.layers(net).marked("first convolution")  # wrong
tv.kernel_grids(net)  # wrong
