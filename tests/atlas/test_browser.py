"""Pages in a real browser: from a file, without a network, under their own policy."""

from __future__ import annotations

import importlib.resources
import io
import re
import shutil
from itertools import product
from urllib.parse import quote

import numpy as np
import pytest
import torch
from PIL import Image

from tests.atlas import pages
from tests.atlas.conftest import missing, photograph, tv_input

PAGES = ["hostile_page", "signed_page", "usual_page", "split_page", "wide_page", "worth_page"]

LOADED = """
async () => {
  const addresses = new Set([...document.images].map((each) => each.src));
  const look = (element, pseudo) => {
    const found = getComputedStyle(element, pseudo).backgroundImage.match(/^url\\("(.*)"\\)$/);
    if (found) addresses.add(found[1]);
  };
  for (const each of document.querySelectorAll(".t")) look(each, null);
  for (const each of document.querySelectorAll(".o")) look(each, "::before");
  const widths = [];
  for (const address of addresses) {
    const image = new Image();
    image.src = address;
    await image.decode();
    widths.push(image.naturalWidth);
  }
  return widths;
}
"""
VISIBLE = "element => element.checkVisibility() && element.getBoundingClientRect().top"


@pytest.fixture
def page_of(request):
    return request.getfixturevalue


def pixels_of(locator):
    locator.scroll_into_view_if_needed()
    return np.asarray(Image.open(io.BytesIO(locator.screenshot())).convert("RGB"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_a_page_says_nothing_and_asks_for_nothing(page_of, opened, name, scheme):
    path = page_of(name)
    with opened(path, color_scheme=scheme) as page:
        page.tab.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true })")
        page.tab.wait_for_timeout(200)
        assert page.said == []
        itself, *pictures = page.asked_for
        assert itself == path.as_uri()
        beside = {each.as_uri() for each in path.parent.glob("*/*")}
        assert set(pictures) <= beside
        assert (name == "split_page") == bool(beside)


def test_the_guard_on_requests_and_messages_can_fail(tmp_path, opened):
    page = tmp_path / "page.html"
    page.write_text('<img src="http://example.com/x.png"><script>console.log("said")</script>')
    with opened(page) as found:
        found.tab.wait_for_timeout(200)
        assert "said" in found.said
        assert "http://example.com/x.png" in found.asked_for


@pytest.mark.parametrize("name", PAGES)
def test_every_picture_has_a_width(page_of, opened, name):
    path = page_of(name)
    with opened(path) as page:
        widths = page.tab.evaluate(LOADED)
        assert len(widths) >= 3
        assert min(widths) > 0
        if name == "split_page":
            assert len(widths) == len(list(path.parent.glob("*/*")))
            assert page.tab.evaluate("[...document.images].every(each => each.naturalWidth > 0)")
            assert page.said == []


def test_a_page_moves_with_its_pictures(split_page, tmp_path, opened):
    moved = shutil.copytree(split_page.parent, tmp_path / "else where")
    with opened(moved / "page.html") as page:
        assert min(page.tab.evaluate(LOADED)) > 0
        assert all(f"/{quote('else where')}/" in each for each in page.asked_for)


def test_the_width_of_a_missing_picture_is_seen(split_page, tmp_path, opened):
    moved = shutil.copytree(split_page.parent, tmp_path / "lost")
    next(moved.glob("*/*maps*")).unlink()
    with opened(moved / "page.html") as page, pytest.raises(Exception, match="cannot be decoded"):
        page.tab.evaluate(LOADED)


def test_every_tile_lies_within_its_sprite(usual_page, opened):
    inside = """
    async () => {
      const sizes = new Map();
      let outside = 0, count = 0;
      for (const each of document.querySelectorAll(".t")) {
        const style = getComputedStyle(each);
        const [x, y] = style.backgroundPosition.split(" ").map(parseFloat);
        const [width, height] = style.backgroundSize.split(" ").map(parseFloat);
        const [w, h] = [parseFloat(style.width), parseFloat(style.height)];
        count += 1;
        if (!(x <= 0 && y <= 0 && -x + w <= width + 0.1 && -y + h <= height + 0.1 && w > 0)) outside += 1;
      }
      return [count, outside];
    }
    """
    with opened(usual_page) as page:
        count, outside = page.tab.evaluate(inside)
        assert count > 100
        assert outside == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_zero_is_white_and_red_is_positive(signed_page, opened, scheme):
    with opened(signed_page, color_scheme=scheme) as page:
        sheet = page.tab.locator(".sheet", has=page.tab.locator("h3", has_text="Maps of red"))
        tiles = {
            each.inner_text(): pixels_of(each.locator("i"))[32, 32].tolist()
            for each in sheet.locator("a").all()
        }
        assert tiles == {"0": [255, 255, 255], "1": [103, 0, 31], "2": [5, 48, 97]}


def test_a_map_shows_the_values_of_its_channel(signed_page, opened):
    with opened(signed_page, "#0:1") as page:
        map_of = page.tab.locator('[id="0:1"] [aria-label="map of channel 1 on red"]')
        inside = pixels_of(map_of)[4:-4, 4:-4].reshape(-1, 3)  # the outermost may be half a pixel off
        assert np.unique(inside, axis=0).tolist() == [[103, 0, 31]]


def test_a_channel_without_an_entry_is_one_click_away(wide_page, opened):
    with opened(wide_page) as page:
        section = page.tab.locator('[id="2"]')
        rest = page.tab.locator('[id="2:rest"]')
        assert not rest.locator(".strips").is_visible()
        section.get_by_role("link", name="the other 96").first.click()
        strips = rest.locator(".strips p")
        assert strips.first.is_visible()
        assert strips.count() == 96 // 8
        number = strips.nth(3).inner_text().split("\t")[5]
        box = strips.nth(3).locator("i").bounding_box()
        strips.nth(3).click(position={"x": 5.5 / 8 * box["width"], "y": 4})
        assert page.tab.evaluate("decodeURIComponent(location.hash)") == f"#2:{number}"
        assert page.tab.locator("tr:target td").first.inner_text() == number


def test_numbers_stand_below_the_pictures_of_a_strip(wide_page, opened):
    places = """
    strip => {
      const text = strip.lastChild, at = [], range = document.createRange();
      for (const found of text.data.matchAll(/[^\\t]+/g)) {
        range.setStart(text, found.index);
        range.setEnd(text, found.index + found[0].length);
        const box = range.getBoundingClientRect();
        at.push([box.left - strip.getBoundingClientRect().left, box.width]);
      }
      return [strip.firstChild.offsetWidth / 8, at];
    }
    """
    with opened(wide_page, "#2:rest", width=375) as page:
        pitch, at = page.tab.locator('[id="2:rest"] .strips p').first.evaluate(places)
        assert [left for left, _ in at] == pytest.approx([pitch * place for place in range(8)], abs=0.6)
        assert all(width < pitch for _, width in at)


def test_search_and_filter_reach_channels_without_an_entry(wide_page, opened):
    with opened(wide_page, java_script_enabled=True) as page:
        page.tab.get_by_label("Search layers and channels").fill("0:155")
        page.tab.locator('[id="page:found"] a', has_text=re.compile("^0:155$")).click()
        page.tab.locator('[id="0:155"]').wait_for(state="visible")
        page.tab.get_by_label("Show channels").select_option("dead")
        with torch.no_grad():
            maps = pages.wide()[0](tv_input(photograph()))[0].flatten(1).amax(1)
        dead = {str(channel) for channel in range(160) if maps[channel] <= 0}
        shown = page.tab.locator('[id="0:rest"] tbody tr:visible td:first-child').all_inner_texts()
        assert {str(channel) for channel in range(150, 160)} <= set(shown) <= dead
        rest = page.tab.locator('[id="0:rest"]')
        assert 2 <= rest.locator(".strips p:visible").count() < rest.locator(".strips p").count()


def test_channels_are_put_in_the_order_of_their_effects(worth_page, opened):
    with opened(worth_page) as page:
        page.tab.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true })")
        layer = page.tab.locator('[id="3"]')
        tiles = layer.locator(".sheet").first.locator("a")
        entries, rows = layer.locator(".channel"), layer.locator(".rest tbody tr")
        texts = "all => all.map((each) => each.textContent)"
        before = [each.evaluate_all(texts) for each in (tiles, entries, rows)]
        page.tab.get_by_label("Order channels").select_option("effect")
        for each in (tiles, entries, rows):
            ranks = each.evaluate_all("all => all.map((each) => Number(each.dataset.effect))")
            assert len(ranks) >= 3
            assert ranks == sorted(ranks)
        page.tab.get_by_label("Order channels").select_option("")
        after = [each.evaluate_all(texts) for each in (tiles, entries, rows)]
        assert after == before
        page.tab.get_by_label("Show channels").select_option("effect-unsure")
        assert page.tab.locator('[id="page:count"]').inner_text().endswith(" channels")


def test_without_a_script_the_rest_unfolds(wide_page, opened):
    with opened(wide_page, java_script_enabled=False) as page:
        page.tab.locator('[id="0:rest"] summary').click()
        assert page.tab.locator('[id="0:rest"] .strips p').first.is_visible()
        assert page.tab.locator('[id="0:155"]').is_visible()


@pytest.mark.parametrize("java_script", [True, False])
def test_the_address_of_a_channel_opens_what_it_stands_in(usual_page, opened, java_script):
    with opened(usual_page, "#3:5", java_script_enabled=java_script) as page:
        article = page.tab.locator('[id="3:5"]')
        article.wait_for(state="visible")
        page.tab.wait_for_timeout(200)
        box = article.bounding_box()
        assert -1 <= box["y"] < 450, box
        assert article.locator("h4").inner_text().startswith("3:5")


def test_links_of_tiles_lead_to_their_channels(usual_page, opened):
    with opened(usual_page) as page:
        page.tab.locator(".layer .tiles a", has_text=re.compile("^4$")).first.click()
        page.tab.locator('[id="0:4"]').wait_for(state="visible")
        assert page.tab.evaluate("location.hash") == "#0:4"


def test_no_link_leads_nowhere(usual_page, hostile_page, wide_page, opened):
    lost = """
    () => [...document.querySelectorAll('a[href^="#"]')].map((each) => each.getAttribute("href").slice(1))
      .filter((id) => !document.getElementById(id) && !document.getElementById(decodeURIComponent(id)))
    """
    for path in (usual_page, hostile_page, wide_page):
        with opened(path) as page:
            assert page.tab.locator('a[href^="#"]').count() > 20
            assert page.tab.evaluate(lost) == []


def test_what_is_folded_opens(hostile_page, opened):
    with opened(hostile_page) as page:
        rest = page.tab.locator("details", has_text="The other 6").last
        assert not rest.locator(".tiles a").first.is_visible()
        rest.locator("summary").click()
        assert rest.locator(".tiles a").first.is_visible()
        assert rest.locator(".tiles a").count() == 6


def test_search_finds_layers_and_channels(usual_page, opened):
    with opened(usual_page) as page:
        box = page.tab.get_by_label("Search layers and channels")
        box.fill("3:6")
        found = page.tab.locator('[id="page:found"] a')
        assert found.all_inner_texts() == ["3:6"]
        box.press("Enter")
        page.tab.locator('[id="3:6"]').wait_for(state="visible")
        box.fill("nothing like it")
        assert page.tab.locator('[id="page:found"]').inner_text() == "nothing is called so"
        box.press("Escape")
        assert page.tab.locator('[id="page:found"] li').count() == 0


def test_the_filter_leaves_what_it_names(usual_page, opened):
    with opened(usual_page) as page:
        chosen = page.tab.get_by_label("Show channels")
        shown = page.tab.locator('[id="0"] .sheet').first.locator("a:visible")
        assert shown.count() == 6
        chosen.select_option("duplicate")
        assert sorted(shown.all_inner_texts()) == ["2", "4"]
        chosen.select_option("dead")
        assert shown.all_inner_texts() == ["5"]
        assert page.tab.locator('[id="page:count"]').inner_text().endswith(("channel", "channels"))
        chosen.select_option(label="of cow")
        of_cow = set(shown.all_inner_texts())
        chosen.select_option(label="of bee")
        assert of_cow | set(shown.all_inner_texts()) == set("012345")
        assert not of_cow & set(shown.all_inner_texts())
        chosen.select_option("")
        assert shown.count() == 6


def test_without_a_script_the_page_can_be_read(usual_page, opened):
    with opened(usual_page, java_script_enabled=False) as page:
        assert not page.tab.get_by_label("Search layers and channels").is_visible()
        assert page.tab.locator("h1").is_visible()
        assert page.tab.locator(".layer .sheet").first.is_visible()
        page.tab.locator(".channels summary").first.click()
        assert page.tab.locator("article.channel").first.is_visible()


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("width", [320, 375, 1280])
def test_nothing_is_wider_than_the_window(page_of, opened, name, width):
    with opened(page_of(name), width=width) as page:
        page.tab.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true })")
        assert page.tab.evaluate("document.documentElement.scrollWidth") <= width


def test_the_page_is_dark_where_that_is_preferred(usual_page, opened):
    colours = {}
    for scheme in ("light", "dark"):
        with opened(usual_page, color_scheme=scheme) as page:
            colours[scheme] = page.tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert colours == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 24, 29)"}


def test_the_keyboard_reaches_content_and_search(usual_page, opened):
    with opened(usual_page) as page:
        page.tab.keyboard.press("Tab")
        assert page.tab.evaluate("document.activeElement.className") == "skip"
        reached = []
        for _ in range(4):
            page.tab.keyboard.press("Tab")
            reached.append(page.tab.evaluate("document.activeElement.id"))
        assert {"page:search", "page:filter"} <= set(reached)


def test_names_of_layers_files_and_classes_are_text(hostile_page, opened):
    with opened(hostile_page) as page:
        page.tab.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true })")
        page.tab.wait_for_timeout(300)
        assert page.said == []
        assert page.tab.evaluate("document.scripts.length") == 1
        assert (
            page.tab.evaluate("document.querySelectorAll('[onerror],[onload],iframe,object,b b').length") == 0
        )
        assert page.tab.title() == pages.TITLE
        assert page.tab.locator("h1").inner_text() == pages.TITLE
        assert page.tab.locator(".layer h2 a").first.inner_text() == pages.SCRIPT
        assert pages.FILE in page.tab.locator(".image figcaption").first.inner_text()
        assert pages.CLASS in page.tab.locator(".says").first.inner_text()
        assert pages.CLASS in page.tab.locator("option").all_inner_texts()[-1]
        assert "--><script>alert(3)</script>" in page.tab.locator(".head").inner_text()


def test_a_layer_called_like_code_has_an_address(hostile_page, opened):
    with opened(hostile_page) as page:
        page.tab.locator("nav a", has_text=pages.SCRIPT).click()
        assert page.tab.locator(".layer").first.evaluate(VISIBLE) < 100
        page.tab.get_by_label("Search layers and channels").fill(f"{pages.SCRIPT}:2")
        page.tab.locator('[id="page:found"] a').click()
        page.tab.locator("article.channel", has_text=f"{pages.SCRIPT}:2").first.wait_for(state="visible")


def test_a_layer_does_not_take_the_place_of_a_chapter(hostile_page, opened):
    with opened(hostile_page, "#page:health") as page:
        assert page.tab.locator(":target h2").inner_text() == "Health, worst first"


def test_the_policy_lets_no_other_script_or_style_in(usual_page, tmp_path, opened):
    spoilt = tmp_path / "page.html"
    text = usual_page.read_text("utf-8")
    bad = '<p id="x" style="color:red" onclick="alert(1)">x</p><script>document.title="no"</script>'
    bad += '<img src="http://example.com/x.png">'
    spoilt.write_text(text.replace("<main", f"{bad}<main"), "utf-8")
    with opened(spoilt) as page:
        page.tab.locator('[id="x"]').click()
        page.tab.wait_for_timeout(200)
        assert page.tab.title() != "no"
        assert page.tab.evaluate("getComputedStyle(document.getElementById('x')).color") != "rgb(255, 0, 0)"
        refused = [each for each in page.said if "Content Security Policy" in each]
        for what in ("inline style", "inline event handler", "inline script", "loading the image"):
            assert any(what in each.lower() for each in refused), (what, page.said)


def test_a_printed_page_has_its_pictures(usual_page, opened):
    with opened(usual_page) as page:
        page.tab.emulate_media(media="print")
        assert not page.tab.locator("nav").is_visible()
        assert (
            page.tab.locator(".t").first.evaluate("each => getComputedStyle(each).printColorAdjust")
            == "exact"
        )
        assert len(page.tab.pdf()) > 20_000


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        *product(["usual_page", "hostile_page", "worth_page"], ["light", "dark"]),
        ("wide_page", "light"),  # which has the colours of the others
    ],
)
def test_axe_finds_nothing_serious(page_of, opened, name, scheme):
    try:
        axe = importlib.resources.files("axe_playwright_python").joinpath("axe.min.js").read_text("utf-8")
    except ImportError:
        missing("axe-playwright-python")
    with opened(page_of(name), color_scheme=scheme, bypass_csp=True) as page:
        page.tab.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true })")
        page.tab.evaluate(axe)
        found = page.tab.evaluate("axe.run()")
        serious = {
            each["id"]: [node["html"][:200] for node in each["nodes"][:3]]
            for each in found["violations"]
            if each["impact"] in ("serious", "critical")
        }
        assert len(found["passes"]) > 20
        assert serious == {}
