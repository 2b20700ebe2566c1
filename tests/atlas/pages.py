"""Networks whose pages are known beforehand, and what they are shown."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import torch
from torch import nn

SCRIPT = "<script>alert(1)</script>"
FILE = '"><img src=x onerror=alert(1)>.png'
CLASS = "</style><svg onload=alert(2)>"
TITLE = "a & b <b>bold</b> {{ 7 * 7 }}"
ABOUT = {"note <i>": "--><script>alert(3)</script>\n'\""}


IMAGE = torch.rand(3, 24, 32, generator=torch.Generator().manual_seed(0))


class Hostile(nn.Module):
    """A network with layers that are called like code."""

    def __init__(self):
        super().__init__()
        self.add_module(SCRIPT, nn.Conv2d(3, 4, 3, padding=1))
        self.add_module("page:health", nn.Conv2d(4, 70, 3, padding=1))
        self.add_module("a b\"c'&#39;%3C", nn.Conv2d(70, 3, 1))

    def forward(self, images):
        for module in self._modules.values():
            images = module(images).relu()
        return images.mean((2, 3))


def hostile():
    torch.manual_seed(0)
    return Hostile().eval()


def signed():
    """A layer of which channel 0 is zero everywhere, 1 is what is red in an image, and 2 is the opposite."""
    net = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False))
    net[0].weight.data = torch.tensor([[0.0, 0, 0], [1, 0, 0], [-1, 0, 0]])[:, :, None, None]
    return net.eval()


def classifier():
    """A small network with a dead channel, two that are the same, and three classes."""
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 3),
    )  # fmt: skip
    first = net[0]
    first.weight.data[4] = first.weight.data[2]
    first.bias.data[4] = first.bias.data[2]
    first.weight.data[5] = 0.0
    first.bias.data[5] = -1.0
    return net.eval()


def wide():
    """Two layers of 160 channels; the last ten of the first are dead."""
    torch.manual_seed(2)
    net = nn.Sequential(nn.Conv2d(3, 160, 3), nn.ReLU(), nn.Conv2d(160, 160, 1), nn.AdaptiveAvgPool2d(1))
    net[0].weight.data[150:] = 0.0
    net[0].bias.data[150:] = -1.0
    return net.eval()


class Text(HTMLParser):
    """The words of a page, by the id of what they stand in."""

    def __init__(self, page):
        super().__init__()
        self.words, self.tags, self.ids, self._open = [], [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.ids += [value for name, value in attributes if name == "id"]
        self._open.append(tag)

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data):
        if not {"style", "script"} & set(self._open):
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def entry_of(page, anchor):
    return re.search(rf'id="{anchor}" tabindex.*?</article>', page, re.DOTALL)[0]
