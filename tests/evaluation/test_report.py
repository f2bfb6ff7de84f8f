"""The report: one file, complete, and readable in a browser where there is one."""

import re

import browser
import numpy as np
import pytest
import torch
from PIL import Image

from sslcells.evaluation.figures import ClassScores
from sslcells.evaluation.gallery import Picture, draw
from sslcells.evaluation.leaks import SplitFeatures
from sslcells.evaluation.report import page, tables
from sslcells.storage import write_text

CLASSES = ("round", "square <b>")
SCORE = {"value": 0.82, "low": 0.8, "high": 0.84}
RESULT = {
    "run": "a & b",
    "sslcells": "0",
    "encoder": {"model": "resnet18", "sha256": "0" * 64},
    "asked": "test",
    "resamples": 1000,
    "leaks": {"findings": [{"text": "1 image of test is in train too", "warning": True}]},
    "figures": [
        {"task": "retrieval", "name": "", "unit": "image", "images": 9, "scores": {"mAP@R": SCORE}},
        {"task": "fine-tuning", "name": "10 %", "unit": "image", "images": 9, "scores": {"accuracy": SCORE}},
        {
            "task": "kNN",
            "name": "k = 1",
            "unit": "image",
            "images": 9,
            "sources": None,
            "scores": {"accuracy": SCORE, "AUROC": None},
        },
    ],
    "by class": [],
    "answers": [
        {"question": "Is it better?", "verdict": "yes", "text": f"{'Long & dull. ' * 20}", "warning": False},
        {"question": "Which are confused?", "verdict": "some", "text": "<b> is taken for round", "warning": True},
    ],
    "health": {"test": {"effective rank": 12.3, "uniformity": None}},
    "notes": ["test shows no <i>"],
}


def pictures(folder, labelled=True, known=True):
    n = 60
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % 2 if labelled else torch.full((n,), -1)
    z = torch.randn(n, 8, generator=generator)
    sources = torch.arange(n) // 3 if known else torch.arange(n)
    names = [f"folder/{i}.png" for i in range(n)]
    features = SplitFeatures(torch.zeros(n, 2), torch.zeros(n, 48), z, labels, sources, names)
    answers = [ClassScores("kNN, k = 20", z[:, :2], labels.roll(1))] if labelled else []
    pixels = np.random.default_rng(0).integers(0, 255, (n, 12, 12, 3), dtype=np.uint8)
    return draw(features, "test", CLASSES if labelled else (), answers, lambda i: pixels[i], (z, z), folder, 0)


@pytest.mark.parametrize(("labelled", "known", "count"), [(True, True, 6), (True, False, 5), (False, False, 3)])
@pytest.mark.slow
def test_everything_that_can_be_drawn_is(tmp_path, labelled, known, count):
    drawn = pictures(tmp_path, labelled, known)
    assert len(drawn) == count
    for picture in drawn:
        assert picture.caption.endswith((".", "another."))
        with Image.open(picture.path) as image:
            assert min(image.size) > 200


def test_tables_leave_room_for_fine_tuning():
    first, *_ = tables(RESULT)
    assert [row[0] for row in first.rows] == ["kNN", "fine-tuning"]
    assert first.rows[0][-2:] == ["82.0 [80.0, 84.0]", "–"]


def test_the_page_needs_no_other_file(tmp_path):
    html = page(RESULT, pictures(tmp_path))
    assert set(re.findall(r'(?:src|href)="([^",]{0,22})', html)) == {"data:image/png;base64"}
    assert "<i>" not in html
    assert "a &amp; b" in html
    assert html.count("<img") == html.count("<figcaption") == 6
    assert html.index("In short") < html.index("Leaks") < html.index("Figures") < html.index("Pictures")


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 400])
def test_it_reads_well_in_a_browser(tmp_path, width):
    """The page is no wider than the window: tables scroll inside it, pictures shrink. A frame has the exact width."""
    (tmp_path / "report.html").write_text(page(RESULT, pictures(tmp_path)), encoding="utf-8")
    (tmp_path / "frame.html").write_text(
        f'<iframe id="f" src="report.html" width="{width}" height="900" style="border:0"></iframe><script>'
        'onload = () => { const d = f.contentDocument; document.title = "x"; document.body.dataset.found = '
        "[d.documentElement.scrollWidth, d.documentElement.clientWidth, "
        "[...d.images].every(i => i.complete && i.naturalWidth > 0)].join() }</script>",
        encoding="utf-8",
    )
    dom = browser.seen((tmp_path / "frame.html").as_uri(), tmp_path / "profile")
    (found,) = re.findall(r'data-found="(\d+),(\d+),(\w+)"', dom)
    assert found[2] == "true"
    assert int(found[0]) <= int(found[1]) <= width


def test_answers_come_first_with_their_picture(tmp_path):
    file = tmp_path / "in_short.png"
    Image.new("RGB", (8, 8)).save(file)
    html = page(RESULT, [Picture("In short", file, "Dots.")])
    first = html[html.index("<h2>In short") : html.index("<h2>Leaks")]
    assert first.count("<img") == html.count("<img") == 1  # and not again among the pictures
    assert '<dt>Is it better? <span class="verdict good">yes</span></dt>' in first
    assert '<span class="verdict bad">some</span></dt>\n<dd>&lt;b&gt; is taken for round</dd>' in first
    assert "of 9 images. Sources are not known" in first
    assert "In short" not in page({**RESULT, "answers": []}, [])


def test_names_of_files_that_are_no_utf8_are_written_as_they_are(tmp_path):
    write_text(tmp_path / "a.html", "a caf\udce9.png")
    assert (tmp_path / "a.html").read_bytes() == b"a caf\xe9.png"
