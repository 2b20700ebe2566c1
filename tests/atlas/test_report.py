"""`report`: what stands in the page, read without a browser."""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import re
import sys
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import torchlens_viz as tv
from tests.atlas import pages
from tests.atlas.conftest import photograph, tv_input
from tests.atlas.pages import IMAGE, Text, entry_of
from torchlens_viz.atlas import book
from torchlens_viz.atlas.book import _entries, _projected, _small
from torchlens_viz.atlas.chapters import Place
from torchlens_viz.atlas.evidence import name_of
from torchlens_viz.errors import (
    InvalidArgumentError,
    InvalidTypeError,
    LayerNotFoundError,
    MissingDependencyError,
    PictureError,
)
from torchlens_viz.models.demo_net import DEMO_CLASSES, load_demo_net, preprocess


def test_the_page_names_model_versions_weights_and_more(written):
    text = Text(written(pages.classifier(), IMAGE, about={"command": "torchlens-viz report x"})).text
    for words in (
        "torch.nn.modules.container.Sequential", "checksum of the weights", f"torchlens_viz {tv.__version__}",
        f"torch {torch.__version__}", "3 × 24 × 32", "none: pixels in [0, 1]", "torchlens-viz report x",
    ):  # fmt: skip
        assert words in text, words


class Doubled:
    def __call__(self, images):
        return 2 * images


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (Doubled(), "tests.atlas.test_report.Doubled"),
        (photograph, "tests.atlas.conftest.photograph"),
        (partial(preprocess, 1), "torchlens_viz.models.demo_net.preprocess"),
        (None, "none: pixels in [0, 1]"),
    ],
)
def test_preprocessing_has_a_name_without_an_address(function, name):
    assert name_of(function) == name


def test_the_checksum_follows_the_weights(written):
    def checksum(net):
        return re.search(r"checksum of the weights</dt><dd>(\w{8})<", written(net, IMAGE))[1]

    net = pages.classifier()
    before = checksum(net)
    assert checksum(pages.classifier()) == before
    net[0].bias.data[0] += 1
    assert checksum(net) != before


def test_answers_are_those_of_the_network(written):
    net = pages.classifier()
    with torch.no_grad():
        shares = net(IMAGE[None]).softmax(1)[0]
    rows = re.findall(
        r'<th scope="row">(ant|bee|cow)</th>.*?> ([\d.]+) %<',
        written(net, IMAGE, names=["ant", "bee", "cow"]),
    )
    best = shares.argsort(descending=True).tolist()
    assert [name for name, _ in rows] == [("ant", "bee", "cow")[place] for place in best]
    assert [float(share) for _, share in rows] == pytest.approx(
        [100 * shares[i].item() for i in best], abs=0.51
    )


def test_what_is_no_classifier_is_told_by_its_shape(written):
    text = Text(written(nn.Sequential(nn.Conv2d(3, 2, 3)).eval(), IMAGE)).text
    assert "The network puts out a tensor of shape (1, 2, 22, 30)." in text
    assert "No explanation: " in text


def block_of(page, number):
    """Width, height and top of a block of tiles, and the palette entries of its sprite."""
    rule = re.search(rf"\.b{number}\{{--w:(\d+);--h:(\d+);--y:(\d+);", page)
    address = re.search(
        rf"\n(?:\.b\d+,)*\.b{number}(?:,\.b\d+)*\{{background-image:url\(data:image/png;base64,([^)]*)\)",
        page,
    )
    return [int(each) for each in rule.groups()], np.asarray(
        Image.open(io.BytesIO(base64.b64decode(address[1])))
    )


def tiles_of(page, title):
    """The palette entries of each tile of a sheet, by channel, read from the page's own style."""
    sheet = re.search(rf"<h3>{re.escape(title)}</h3>(.*?)</div>\n</div>", page, re.DOTALL)[1]
    found = {}
    for block, column, row, channel in re.findall(r'class="t b(\d+) c(\d+) r(\d+)"></i>(\d+)<', sheet):
        (w, h, y), sprite = block_of(page, block)
        top, left = y + int(row) * (h + 1), int(column) * (w + 1)
        found[int(channel)] = sprite[top : top + h, left : left + w]
    return found


def test_tiles_are_the_maps_of_their_channels(written):
    net = pages.classifier()
    page = written(net, IMAGE, layers="0")
    with torch.no_grad():
        maps = net[0](IMAGE[None])[0].double().numpy()
    most = np.sort(np.abs(maps).ravel())[round(0.995 * maps.size) - 1]
    expected = np.floor((maps.clip(-most, most) + most) / (2 * most) * 250 + 0.5)
    tiles = tiles_of(page, "Maps of image 0")
    assert set(tiles) == set(range(6))
    for channel, tile in tiles.items():
        assert np.abs(tile.astype(int) - expected[channel]).max() <= 1, channel
        assert (tile == expected[channel]).mean() > 0.99


def test_tiles_of_kernels_in_colour_are_the_kernels(written):
    net = pages.classifier()
    tiles = tiles_of(written(net, IMAGE, layers="0"), "Kernels")
    weight = net[0].weight.detach().double().numpy()
    most = np.sort(np.abs(weight).ravel())[round(0.995 * weight.size) - 1]
    expected = ((weight.clip(-most, most) + most) / (2 * most) * 255).transpose(0, 2, 3, 1)
    for channel, tile in tiles.items():
        assert np.abs(tile.astype(float) - expected[channel]).max() <= 0.51


def test_kernels_of_other_layers_are_the_largest_of_each_filter(written):
    net = nn.Sequential(nn.Conv2d(40, 2, 3)).eval()
    weight = torch.zeros(2, 40, 3, 3)
    for place in range(40):
        weight[0, place] = place / 100
        weight[1, place] = -place / 100
    net[0].weight.data = weight
    page = written(net, torch.rand(40, 8, 8), explain=False)
    tile = tiles_of(page, "Kernels")[0]
    assert tile.shape == (23, 23)  # six by six kernels of three, and what is between them
    corners = tile[::4, ::4].astype(int).ravel()
    assert corners.tolist() == sorted(corners.tolist(), reverse=True)
    assert corners[-1] > 125  # the four smallest are left out
    assert "the 36 largest of 40 kernels of 3 × 3, the largest first" in page


def test_channels_are_ranked_by_their_highest_value(written):
    net = pages.classifier()
    with torch.no_grad():
        order = net[0](IMAGE[None])[0].flatten(1).amax(1).argsort(descending=True, stable=True).tolist()
    assert re.findall(r'id="0:(\d+)"', written(net, IMAGE)) == [str(channel) for channel in order]
    few = written(net, IMAGE, max_channels=2)
    assert re.findall(r'<article class="channel" id="0:(\d+)"', few) == [str(each) for each in order[:2]]
    assert re.findall(r'<tr id="0:(\d+)"', few) == [str(each) for each in order[2:]]
    assert "6 channels, 2 of them with an entry" in few


def test_what_does_not_stand_open_is_one_click_away(written):
    page = written(pages.hostile(), IMAGE, layers="page:health")
    assert "64 of 70 shown, ranked by their highest value" in page
    assert "<summary>The other 6</summary>" in page


def test_every_channel_is_in_the_page_though_few_have_an_entry(wide_page):
    text = wide_page.read_text("utf-8")
    ids, net = Text(text).ids, pages.wide()
    assert len(ids) == len(set(ids))
    assert {f"{layer}:{channel}" for layer in "02" for channel in range(160)} <= set(ids)
    assert text.count('<article class="channel"') == 128
    assert text.count("64 of 160 shown, ranked by their highest value; ") == 4  # kernels and maps of both
    with torch.no_grad():
        order = net[0](tv_input(photograph()))[0].flatten(1).amax(1).argsort(descending=True, stable=True)
    rest = re.search(r'id="0:rest">(.*?)</details>', text, re.DOTALL)[1]
    strips = re.findall(r"</i>([\d\t]+)</p>", rest)
    assert [int(channel) for strip in strips for channel in strip.split("\t")] == order[64:].tolist()
    assert re.findall(r"<tr id=\"0:\d+\".*?><td>(\d+)<", rest) == [str(each) for each in order[64:].tolist()]


def test_figures_of_the_rest_are_those_of_the_layer(written):
    net = pages.classifier()
    page = written(net, IMAGE, layers="0", max_channels=2)
    maps = net[0](IMAGE[None])[0].detach().double().flatten(1)
    rows = re.findall(r'<tr id="0:(\d)"[^>]*><td>\d((?:<td>[^<]*)*)', page.replace("\n", ""))
    assert len(rows) == 4
    for channel, cells in rows:
        own = maps[int(channel)]
        expected = [own.max(), own.mean(), own.std(correction=0), own.min(), own.max()]
        found = [float(cell.replace("−", "-")) for cell in cells.split("<td>")[1:6]]
        assert found == pytest.approx([each.item() for each in expected], rel=6e-3)


def test_strips_hold_the_maps_of_the_rest(written):
    net = nn.Sequential(nn.Conv2d(3, 21, 1)).eval()
    page = written(net, torch.rand(3, 4, 6, generator=torch.Generator().manual_seed(1)), max_channels=3)
    with torch.no_grad():
        maps = net(torch.rand(3, 4, 6, generator=torch.Generator().manual_seed(1))[None])[0].numpy()
    (numbers, classes) = zip(
        *[
            (label.split("\t"), place)
            for place, label in re.findall(r'<p><i class="t (\S+ \S+ \S+)"></i>(.*?)</p>', page)
        ],
        strict=True,
    )
    assert [len(each) for each in numbers] == [8, 8, 2]
    block, sprite = block_of(page, re.match(r"b(\d+)", classes[0])[1])
    w, h, y = block
    assert (w, h) == (8 * 7, 5)
    limits = re.search(r"Colours and histogram end at (\S+) and (\S+);", page).groups()
    low, high = (float(each.replace("−", "-")) for each in limits)
    for strip, place in zip(numbers, classes, strict=True):
        column, row = map(int, re.findall(r"[cr](\d+)", place))
        tile = sprite[y + row * (h + 1) : y + row * (h + 1) + h, column * (w + 1) : column * (w + 1) + w]
        for part, channel in enumerate(strip):
            codes = tile[:4, 7 * part : 7 * part + 6].astype(int)
            expected = (maps[int(channel)].clip(low, high) - low) / (high - low) * 250
            assert np.abs(codes - expected).max() <= 1.5


def test_channels_have_entries_as_far_as_there_is_room():
    assert _entries([64, 192, 384, 256, 256], images=8) == 384  # alexnet
    assert _entries([64] * 53 + [512] * 45, images=1) == 64
    assert _entries([64] * 53 + [512] * 45, images=8) == 12
    assert _entries([1000] * 400, images=64) == 8


def test_projections_are_spread_over_a_deep_network():
    few, many = [f"layer{place}" for place in range(16)], [f"layer{place}" for place in range(53)]
    assert _projected(few, None) == dict.fromkeys(few, 8)
    chosen = _projected(many, None)
    places = [many.index(name) for name in chosen]
    assert (len(places), places[0], places[-1]) == (16, 0, 52)
    assert {after - before for before, after in itertools.pairwise(places)} == {3, 4}
    assert _projected(many, 2) == dict.fromkeys(many, 2)
    assert _projected(["one"], None) == {"one": 8}


def test_a_deep_network_has_projections(written):
    net = nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(20))).eval()
    page = written(net, torch.rand(3, 6, 6), explain=False)
    with_them = {layer for layer in range(20) if "projection of channel 0 at" in entry_of(page, f"{layer}:0")}
    assert len(with_them) == 16
    assert {0, 19} <= with_them
    assert page.count("Projections are made for 16 layers from first to last, without this.") == 4


def test_what_is_shown_small_has_bounds():
    def places(count):
        return {"layer": Place("layer", {}, dict.fromkeys(range(count), "rest"), "rest")}

    assert _small(places(100), 3) == (12, 3)
    assert _small(places(10_000), 3) == (8, 3)
    assert _small(places(20_000), 8) == (8, 1)
    assert _small(places(400_000), 8) == (4, 1)


def test_figures_are_left_out_where_there_are_too_many(monkeypatch, written):
    monkeypatch.setattr(book, "_MOST_ROWS", 3)
    page = written(pages.classifier(), IMAGE, layers="0", max_channels=2)
    assert "<summary>The other 4 of 6 channels, smaller</summary>" in page
    assert '<tr id="0:' not in page
    assert '<a href="#0:rest">5</a>' in page  # the dead one


def test_findings_come_worst_first_and_say_what_to_do(written):
    text = Text(written(pages.classifier(), IMAGE)).text
    assert text.index("Dead channels in") < text.index("Near-duplicate channels in 1 layer")
    assert "1 of 6 channels are never above zero , over 1 input." in text
    assert "This rests on 1 input:" in text
    assert "learning rate that was too high" in text


def test_nan_is_the_worst(written):
    net = pages.classifier()
    net[3].weight.data[1, 0, 0, 0] = torch.nan
    page = written(net, IMAGE)
    text = Text(page).text
    assert text.index("NaN or Inf in 1 layer") < text.index("Dead channels in")
    assert "with NaN or Inf in it" in text
    first = re.search(r'<tbody>\n<tr><th scope="row"><a href="#3">', page)
    assert first is not None


def test_a_network_without_findings_says_so(written):
    net = nn.Sequential(nn.Conv2d(3, 2, 3)).eval()
    net[0].weight.data = torch.stack([torch.ones(3, 3, 3), torch.eye(3).expand(3, 3, 3)])
    assert (
        "No NaN or Inf, no dead or saturated channels, no near-duplicates." in Text(written(net, IMAGE)).text
    )


def test_figures_rest_on_the_survey_where_it_saw_the_layer(written):
    net = pages.classifier()
    found = tv.survey(net, torch.rand(7, 3, 24, 32).split(3), "0", progress=False)
    page = written(net, IMAGE, survey=found)
    inputs = dict(re.findall(r'<tr><th scope="row"><a href="#(\d)">.*?<td class="n">(\d+)</td></tr>', page))
    assert inputs == {"0": "7", "3": "1"}
    assert f"mean <b>{found.stats['0'].mean[1].item():.3g}".replace("-", "−") in page


def test_a_survey_with_its_inputs_shows_what_drives_each_channel(written):
    net, images = pages.classifier(), torch.rand(5, 3, 24, 32, generator=torch.Generator().manual_seed(3))
    found = tv.survey(net, images.split(2), "0", top_k=3, progress=False)
    page = written(net, IMAGE, survey=found, source=images)
    top = found.top["0"]
    own = re.search(r'id="0:1".*?</article>', page, re.DOTALL)[0]
    captions = re.findall(r"<figcaption>(\S+), input (\d)</figcaption>", own)
    assert [int(sample) for _, sample in captions] == top.samples[1].tolist()
    assert [float(value.replace("−", "-")) for value, _ in captions] == pytest.approx(
        top.values[1].tolist(), rel=1e-2
    )


def test_an_ascent_is_shown_with_score_verdict_and_curve(written):
    net = pages.classifier()
    driven = tv.maximize(net, "0", [3, 5], size=16, steps=5)
    page = written(net, IMAGE, maximized=[driven])
    own = re.search(r'id="0:3".*?</article>', page, re.DOTALL)[0]
    assert f"score {driven.scores[0].item():.3g}" in own
    assert "all steps were made" in own
    assert 'class="curve"' in own
    assert "dead: no gradient from any start" in re.search(r'id="0:5".*?</article>', page, re.DOTALL)[0]
    assert "Ascent" not in re.search(r'id="0:1".*?</article>', page, re.DOTALL)[0]


def test_an_ascent_may_be_shown_under_another_layer(written):
    net = pages.classifier()
    driven = tv.maximize(net, "1", [3], size=16, steps=2)
    page = written(net, IMAGE, maximized={"0": driven})
    assert (
        f"Ascent at 1 ({driven.objective}): score" in re.search(r'id="0:3".*?</article>', page, re.DOTALL)[0]
    )


def test_the_most_alike_channel_is_the_first_neighbour(written):
    page = written(pages.classifier(), IMAGE)
    own = re.search(r'id="0:2".*?</article>', page, re.DOTALL)[0]
    assert 'Maps most alike: <a href="#0:4">4</a> (1.00)' in own


def test_targets_file_each_channel_under_the_class_that_drives_it(written):
    net, images = pages.classifier(), torch.rand(4, 3, 24, 32, generator=torch.Generator().manual_seed(5))
    found = tv.survey(net, images.split(4), "0", top_k=1, progress=False)
    page = written(net, IMAGE, layers="0", survey=found, targets=[0, 1, 2, 1], names=["ant", "bee", "cow"])
    for channel, sample in enumerate(found.top["0"].samples[:, 0].tolist()):
        keys = re.search(rf'id="0:{channel}" tabindex="-1" data-k="([^"]*)"', page)[1].split()
        assert f"class-{[0, 1, 2, 1][sample]}" in keys


def test_the_policy_names_the_hashes_of_style_and_script(written):
    page = written(pages.classifier(), IMAGE)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1].replace("&#39;", "'")
    for tag in ("style", "script"):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'; img-src data:; ")
    assert "unsafe" not in policy


def test_a_page_holds_no_address_but_its_own(usual_page):
    page = Text(usual_page.read_text("utf-8"))
    for tag, attributes in page.tags:
        for name in ("src", "href", "action", "data", "srcset"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/")), (tag, attributes)
        assert not [name for name in attributes if name.startswith("on") or name == "style"], attributes
    assert not re.search(r"url\((?!data:image/)", usual_page.read_text("utf-8"))
    assert {tag for tag, _ in page.tags} & {"link", "iframe", "object", "embed", "base", "form"} == set()


def test_ids_are_unique_whatever_layers_are_called(hostile_page):
    ids = Text(hostile_page.read_text("utf-8")).ids
    assert len(ids) == len(set(ids))
    assert {pages.SCRIPT, f"{pages.SCRIPT}:3", "page:health", "page:health~2"} <= set(ids)


def test_every_picture_has_words(usual_page):
    tags = Text(usual_page.read_text("utf-8")).tags
    pictures = [attributes for tag, attributes in tags if tag == "img" or attributes.get("role") == "img"]
    assert len(pictures) > 50
    assert all((each.get("alt") or each.get("aria-label") or "").strip() for each in pictures)


class Detector(nn.Module):
    """Puts out a dict, and sorts its image, so that no receptive field can be followed."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2)

    def forward(self, images):
        return {"boxes": self.conv(images.sort(dim=3).values)}


def test_a_network_that_puts_out_a_dict_is_shown_without_answers(written):
    page = written(Detector().eval(), IMAGE)
    text = Text(page).text
    assert "The network puts out something else than one tensor." in text
    assert "No explanation: " in text
    height, width = 168 * 24 / 32, 168
    block = re.search(r"map of channel 0 over image 0.*?b(\d+) ", page)[1]
    placed = re.search(rf"\.p0>\.b{block}\{{top:(.*?)px;left:(.*?)px;--fy:(.*?);--fx:(.*?);", page)
    assert [float(each) for each in placed.groups()] == pytest.approx(
        [0, 0, height / 11, width / 15], abs=1e-3
    )


def test_maps_stand_over_the_image_where_their_receptive_fields_do(written):
    net = nn.Sequential(nn.Conv2d(3, 2, 5, stride=4, padding=1)).eval()
    page = written(net, torch.rand(3, 32, 40))
    scale = 168 / 40  # pixels of the page for each of the image
    block = re.search(r"map of channel 0 over image 0.*?b(\d+) ", page)[1]
    placed = re.search(rf"\.p0>\.b{block}\{{top:(.*?)px;left:(.*?)px;--fy:(.*?);--fx:(.*?);", page)
    # The first position has its middle at pixel 1, and each stands for four pixels: from -0.5 on.
    first = (1 + 0.5 - 2) * scale
    assert [float(each) for each in placed.groups()] == pytest.approx(
        [first, first, 4 * scale, 4 * scale], abs=1e-3
    )


def test_images_are_called_as_the_mapping_says(written):
    text = Text(written(pages.classifier(), {"left & right": IMAGE, "other": photograph()})).text
    assert "left & right, 32 × 24" in text
    assert "Maps of other" in text


def test_a_batch_and_pictures_of_other_sizes_are_taken(written):
    net = pages.classifier()
    assert "2 images" in written(net, torch.stack([IMAGE, IMAGE]))
    assert "6 × various" in written(net, [IMAGE, photograph(size=(64, 64))])


def test_tokens_and_layers_that_do_not_run_are_told(written):
    net = pages.classifier()
    net.add_module("unused", nn.Identity())
    net.unused.conv = nn.Conv2d(1, 1, 1)
    text = Text(written(net, IMAGE)).text
    assert "did not run, or puts out no maps: unused.conv" in text


def test_a_layer_that_runs_twice_is_shown_by_its_first_call(written):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared = nn.Conv2d(3, 3, 3)

        def forward(self, images):
            return self.shared(self.shared(images)).mean((2, 3))

    text = Text(written(Twice().eval(), IMAGE)).text
    assert "It ran 2 times for an image; the first is shown." in text


def test_the_model_and_random_numbers_stay_as_they_are(written):
    net = pages.classifier().train()
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    torch.manual_seed(7)
    before = torch.get_rng_state()
    written(net, IMAGE)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training for module in net.modules())
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())
    assert not any(module._forward_hooks for module in net.modules())


def test_the_same_page_comes_out_twice(written):
    assert written(pages.classifier(), IMAGE) == written(pages.classifier(), IMAGE)


def test_the_demo_network_makes_a_small_page(tmp_path):
    image = photograph(size=(256, 192))
    page = tv.report(load_demo_net(), image, tmp_path / "p.html", preprocess=preprocess, names=DEMO_CLASSES)
    assert page.stat().st_size < 3_000_000


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"layers": "nothing"}, LayerNotFoundError, "no layer is named `nothing`"),
        ({"survey": 3}, InvalidTypeError, "`survey` must be a Survey or None, got 3"),
        ({"comparison": 3}, InvalidTypeError, "`comparison` must be a Comparison or None, got 3"),
        ({"source": [IMAGE]}, InvalidArgumentError, "`source` has no effect without a `survey`"),
        ({"maximized": 3}, InvalidTypeError, "`maximized` must be a Maximization, a list .*, got 3"),
        ({"maximized": [3]}, InvalidTypeError, "`maximized` must be a Maximization, a list .*, got 3"),
        ({"max_channels": 0}, InvalidArgumentError, "`max_channels` must be at least 1, got 0"),
        ({"projections": -1}, InvalidArgumentError, "`projections` must be at least 0, got -1"),
        ({"explain": 1}, InvalidTypeError, "`explain` must be True or False, got 1"),
        ({"preprocess": 1}, InvalidTypeError, "`preprocess` must be a function or None, got 1"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit_are_refused(tmp_path, options, error, words):
    if error is None:
        assert (
            "3 channels"
            in Text(tv.report(pages.classifier(), IMAGE, tmp_path / "p.html", **options).read_text()).text
        )
        return
    with pytest.raises(error, match=words):
        tv.report(pages.classifier(), IMAGE, tmp_path / "page.html", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("images", "error", "words"),
    [
        ([], InvalidArgumentError, "`images` must hold at least one image, got none"),
        (torch.rand(65, 3, 8, 8), InvalidArgumentError, "`images` must be at most 64 images, got 65"),
        ([3], InvalidTypeError, r"`images` must be pictures, paths or tensors \(C, H, W\), got 3"),
        ("missing.png", PictureError, "must name an existing picture file"),
        (torch.rand(4, 24, 24), InvalidArgumentError, "`images` must be what the model takes"),
    ],
)
def test_images_that_do_not_fit_are_refused(tmp_path, images, error, words):
    with pytest.raises(error, match=words):
        tv.report(pages.classifier(), images, tmp_path / "page.html")


def test_a_network_without_maps_is_refused(tmp_path):
    net = nn.Sequential(nn.Flatten(0), nn.Linear(12, 2))
    with pytest.raises(InvalidArgumentError, match="`layers` must select layers that put out maps"):
        tv.report(net, torch.rand(3, 2, 2), tmp_path / "page.html", layers="1")


def test_missing_jinja2_names_the_install_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingDependencyError, match=r'python -m pip install "torchlens_viz\[report\]"'):
        tv.report(pages.classifier(), IMAGE, tmp_path / "page.html")


def test_the_survey_s_inputs_are_checked(written):
    net, images = pages.classifier(), torch.rand(3, 3, 24, 32)
    found = tv.survey(net, images.split(3), "0", top_k=2, progress=False)
    text = Text(written(net, IMAGE, survey=found, source=images[:1])).text
    assert "No patches of the data set: `source` must hold the inputs that were surveyed" in text


def test_pictures_of_the_page_are_what_the_model_takes():
    assert torch.equal(tv_input(Image.new("RGB", (2, 2), "white")), torch.ones(1, 3, 2, 2))


def test_what_mattered_stands_beside_what_drives(written):
    net = pages.classifier().eval()
    images = torch.rand(6, 3, 24, 32, generator=torch.Generator().manual_seed(0))
    options = {"top_k": 2, "progress": False}
    plain = tv.survey(net, images.split(3), "0", **options)
    found = tv.survey(net, images.split(3), "0", target=lambda output, batch: output[:, 1], **options)
    words = "Where it mattered most in the data set"
    assert words not in written(net, IMAGE, survey=plain, source=images)
    page = written(net, IMAGE, survey=found, source=images)
    assert page.count(f"<h5>{words}</h5>") == page.count("<h5>What drives it hardest in the data set</h5>")
    for sample in found.top_by_relevance["0"].samples[:, 0].tolist():
        assert f"sees of input {sample}: " in page
