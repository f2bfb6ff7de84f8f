"""The map of the report that shows cells: what is in the page, and what a browser makes of it."""

import base64
import io
import json
import re

import browser
import numpy as np
import pytest
import torch
from PIL import Image

from sslcells.evaluation.gallery import Picture
from sslcells.evaluation.hover_map import CELLS, hover_map
from sslcells.evaluation.pictures import Map
from sslcells.evaluation.report import document, section_of
from sslcells.evaluation.thumbnails import MOST_BYTES, thumbnails

CLASSES = ("round", "</script><b>", "rare")
N = 400


def grey(i):
    """An image whose brightness is its number."""
    return np.full((4, 8, 1), i % 256, np.uint8)


def a_map():
    groups = torch.arange(N) % 2
    groups[7], groups[-1] = 2, -1
    guess = torch.where(torch.arange(N) < N // 2, groups, 0)
    chosen = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    place = Map("t-SNE", chosen, np.random.default_rng(0).normal(size=(N, 2)), "", N)
    return hover_map(place, groups, CLASSES, [f"a/{i}.png" for i in range(N)], ("probe", guess), grey), groups


def told(text):
    return json.loads(re.findall(r'<script type="application/json">(.*?)</script>', text, re.S)[0])


def test_each_cell_stands_at_its_point():
    text, groups = a_map()
    found = told(text)
    assert len(found["points"]) == N
    assert len(found["cells"]) == CELLS < N
    assert text.count("</script>") == 2
    uri = re.findall(r"url\(data:image/jpeg;base64,([^)]*)\)", text)[0]
    sheet, columns = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri)))), found["columns"]
    names = [name.rpartition(" (")[0] for name, *_ in found["groups"]]
    for at, (group, guess, file) in enumerate(found["cells"]):
        row = int(file.removesuffix(".png"))
        brightness = sheet[96 * (at // columns) + 48, 96 * (at % columns) + 48, 0]
        assert abs(int(brightness) - row % 256) < 4
        assert group == ("unlabelled" if groups[row] < 0 else CLASSES[groups[row]])
        assert names[found["points"][at][2]] == group
        assert guess.startswith("probe: ✓ " if row < N // 2 or groups[row] == 0 else "probe: ")
    assert {cell[0] for cell in found["cells"]} >= set(CLASSES)


def test_a_map_of_one_place_is_left_out():
    place = Map("t-SNE", torch.arange(6), np.zeros((6, 2)), "collapsed", 6)
    assert hover_map(place, torch.zeros(6).long(), CLASSES, ["a.png"] * 6, None, grey) == ""


def test_the_page_stays_small():
    noise = np.random.default_rng(0).integers(0, 255, (96, 96, 4), np.uint8)
    assert len(thumbnails([noise] * CELLS, 96).uri) <= MOST_BYTES


USED = """
<iframe id="f" src="report.html" width="400" height="900" style="border:0"></iframe>
<iframe id="plain" sandbox="allow-same-origin" src="report.html" width="400" height="900"></iframe><script>
onload = () => {
  const d = f.contentDocument, map = d.querySelector(".map svg"), out = {}, box = map.getBoundingClientRect();
  const file = () => d.querySelector("[role=status]").lastChild.textContent;
  const to = (kind, x, y) => map.dispatchEvent(new f.contentWindow.PointerEvent(kind,
    {clientX: box.x + x * box.width, clientY: box.y + y * box.height}));
  const press = key => map.dispatchEvent(new f.contentWindow.KeyboardEvent("keydown", {key}));
  const seen = [file()], note = () => seen.push(file());
  to("pointermove", .9, .1); note(); to("pointerdown", .1, .9); note();
  press("ArrowRight"); note(); press("ArrowRight"); note(); press("ArrowUp"); note(); press("ArrowLeft"); note();
  out.seen = seen.join(" ");
  out.said = d.querySelector("[role=status]").firstChild.textContent;
  out.wide = d.documentElement.scrollWidth <= d.documentElement.clientWidth;
  out.still = getComputedStyle(d.querySelector("figure > img")).display;
  out.thumbnail = d.querySelector(".thumbnail").style.backgroundPosition;
  const p = plain.contentDocument;
  out.unscripted = [p.querySelector(".live").hidden, getComputedStyle(p.querySelector("figure > img")).display].join();
  document.body.dataset.found = JSON.stringify(out);
};</script>
"""


@pytest.mark.slow
def test_a_browser_shows_cells_to_pointer_and_keys(tmp_path):
    """Five points: four corners and the middle."""
    still = tmp_path / "map.png"
    Image.new("RGB", (900, 600)).save(still)
    corners = [(0, 0), (1, 0), (0, 1), (1, 1), (0.5, 0.1)]  # upwards, as in the picture
    live = hover_map(
        Map("t-SNE", torch.arange(5), np.array(corners, float), "", 5),
        torch.tensor([0, 1, 1, 0, 1]),
        CLASSES,
        [f"{i}.png" for i in range(5)],
        None,
        grey,
    )
    body = section_of("Pictures", (), [Picture("t-SNE map by class", still, "Points.", live)])
    (tmp_path / "report.html").write_text(document("a map", "", body), encoding="utf-8")
    assert browser.told(tmp_path, USED) == {
        "seen": "0.png 3.png 0.png 4.png 1.png 3.png 2.png",
        "said": "</script><b>",
        "wide": True,
        "still": "none",
        "thumbnail": "0% 50%",
        "unscripted": "true,inline",
    }
