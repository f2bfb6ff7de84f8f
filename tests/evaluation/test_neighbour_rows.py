"""The neighbours of the report that can be sorted: which stand beside which, and in what order a browser puts them."""

import base64
import io
import re

import browser
import numpy as np
import pytest
import torch
from PIL import Image

from sslcells.evaluation.gallery import Picture
from sslcells.evaluation.neighbour_rows import neighbour_rows
from sslcells.evaluation.report import document, section_of

CLASSES = ("round", "<b>odd</b>")
N = 12


def sheet(labels):
    """Images on a half circle, in the order of their numbers; two of a source, and their brightness is the number."""
    angle = torch.arange(N) * 0.1
    z = torch.stack([angle.cos(), angle.sin()], 1)
    files = [f"a/{i}.png" for i in range(N)]
    return neighbour_rows(
        lambda i: np.full((6, 6, 3), 20 * i, np.uint8), z, torch.tensor(labels), CLASSES, torch.arange(N) // 2, files
    )


LABELS = [0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, -1]


def test_neighbours_are_the_nearest_of_other_sources():
    rows = re.findall(r'<li data-class="(\d)" data-agree="([\d.]+)">.*?: (\d) of (\d) agree(.*?)</li>', sheet(LABELS))
    assert len(rows) == 11  # the one without a label does not ask
    for label, share, agree, judged, cells in rows:
        query, *near = [int(file) for file in re.findall(r'title="(\d+).png"', cells)]
        others = sorted((i for i in range(N) if i // 2 != query // 2), key=lambda i: abs(i - query))
        assert {abs(i - query) for i in near} == {abs(i - query) for i in others[:5]}
        known = [i for i in near if LABELS[i] >= 0]
        same = sum(LABELS[i] == LABELS[query] for i in known)
        assert (int(label), int(agree), int(judged)) == (LABELS[query], same, len(known))
        assert float(share) == pytest.approx(same / len(known), abs=1e-4)
        assert (cells.count("✓"), cells.count("✗")) == (same, len(known) - same)


def test_each_file_has_its_own_picture():
    text = sheet(LABELS)
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(re.findall(r"base64,([^)]*)\)", text)[0]))))
    steps = pixels.shape[1] // 96 - 1, pixels.shape[0] // 96 - 1
    cells = re.findall(r'position:([\d.]+)% ([\d.]+)%"[^>]*title="(\d+).png"', text)
    assert len(cells) == 11 * 6
    for x, y, number in cells:
        left, top = (round(float(part) / 100 * step) for part, step in zip((x, y), steps, strict=True))
        assert abs(int(pixels[96 * top + 48, 96 * left + 48, 0]) - 20 * int(number)) < 4
    assert "<b>odd" not in text


def test_without_labels_the_picture_stays():
    assert sheet([-1] * N) == ""


USED = """
<iframe id="f" src="report.html" width="400" height="900" style="border:0"></iframe><script>
onload = () => {
  const d = f.contentDocument, select = d.querySelector(".neighbours select"), out = {};
  const rows = () => [...d.querySelectorAll(".neighbours li")].map(row => row.dataset.class + row.dataset.agree).join();
  out.first = rows();
  for (const order of ["fewest", "most", "class"]) {
    select.value = order; select.dispatchEvent(new Event("change")); out[order] = rows();
  }
  out.wide = d.documentElement.scrollWidth <= d.documentElement.clientWidth;
  out.still = getComputedStyle(d.querySelector("figure > img")).display;
  document.body.dataset.found = JSON.stringify(out);
};</script>
"""


@pytest.mark.slow
def test_a_browser_sorts_them(tmp_path):
    still, live = tmp_path / "sheet.png", sheet(LABELS)
    Image.new("RGB", (900, 600)).save(still)
    body = section_of("Pictures", (), [Picture("Nearest neighbours", still, "Rows.", live)])
    (tmp_path / "report.html").write_text(document("neighbours", "", body), encoding="utf-8")
    found = browser.told(tmp_path, USED)
    rows = re.findall(r'data-class="(\d)" data-agree="([\d.]+)"', live)
    by_class, by_agree = sorted(rows), sorted(rows, key=lambda row: (row[1], row[0]))
    most = sorted(rows, key=lambda row: (-float(row[1]), row[0]))
    assert len(set(rows)) > 4
    expected = {"first": by_class, "fewest": by_agree, "most": most, "class": by_class}
    said = {order: ",".join(map("".join, of)) for order, of in expected.items()}
    assert found == {**said, "wide": True, "still": "none"}
