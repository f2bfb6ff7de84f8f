"""`sslcells compare-runs`: what it says of planted runs, what it refuses, and its page."""

import json
import re

import browser
import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score
from trained import make_run

from sslcells.cli import main
from sslcells.config import ConfigError
from sslcells.evaluation import answer_table
from sslcells.evaluation.answer_table import OWN, AnswerTable
from sslcells.evaluation.baselines import METHOD
from sslcells.evaluation.classifier import Predictions
from sslcells.evaluation.figures import ClassScores
from sslcells.evaluation.leaks import SplitFeatures
from sslcells.evaluation.paired import paired
from sslcells.evaluation.scores import METRIC, Units, of_classes
from sslcells.evaluation.two_runs import Evaluated, compared

CLASSES = ("round", "<b>", "rare, few")
M = 300
NAMES = [f"synthetic/test/{i}" for i in range(M)]


def answers(right, seed=0, sources=100, images=NAMES):
    """Answers of two methods to images of which a share is right, all images of a source alike."""
    rng = np.random.default_rng(seed)
    source = np.arange(M) % sources
    true = rng.integers(0, 3, sources)[source]
    methods = {}
    for method in (METHOD, "linear probe"):
        hit = rng.permutation(np.arange(sources) < right * sources)[source]
        methods[method] = [CLASSES[c] for c in np.where(hit, true, (true + 1) % 3)]
    return AnswerTable(images, torch.from_numpy(source), [CLASSES[c] for c in true], methods)


def better(table, seed=1):
    """The same answers, but half of the wrong sources are right in one class."""
    rng = np.random.default_rng(seed)
    lucky = rng.random(len(table.sources.unique())) < 0.5
    methods = {
        name: [
            true if lucky[source] and true == "<b>" else said
            for said, true, source in zip(of, table.classes, table.sources.tolist(), strict=True)
        ]
        for name, of in table.methods.items()
    }
    return table._replace(methods=methods)


def run_of(folder, table, *overrides, called="", labs=None, pairs=()):
    make_run(folder, "data.test=300", "data.val=20", "data.train=20", *overrides)
    answer_table.write(folder, table, labs or {})
    leaks = {"question": "What leaks from train?", "verdict": "none seen", "text": "No image.", "warning": False}
    result = {
        "run": called or folder.name,
        "sslcells": "0.1.0",
        "encoder": {"model": "small_cnn", "sha256": "0" * 64},
        "asked": "test",
        "resamples": 200,
        "figures": [],
        "labs": {"pairs": list(pairs)},
        "answers": [leaks],
        "made": {"date": "2026-11-30 10:00:00", "commit": "0123456789ab", "command": "sslcells evaluate a"},
    }
    (folder / "evaluation.json").write_text(json.dumps(result), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs; the second is better by a class."""
    folder, table = tmp_path_factory.mktemp("runs"), answers(0.5)
    before = run_of(folder / "before", table, called="a & b")
    return before, run_of(folder / "after", better(table), "method.name=moco", "optim.lr=0.01")


def result_of(one, other):
    tables, names = (one, other), ("before", "after")
    runs = [
        Evaluated(name, {"resamples": 200, "encoder": {"model": "x", "sha256": ""}}, table, {}, {"k": 1}, [], {}, None)
        for name, table in zip(names, tables, strict=True)
    ]
    return compared(paired(tables, names), runs, names)


def score(table, method):
    return balanced_accuracy_score(table.classes, table.methods[method])


def test_a_planted_difference_is_said_with_its_interval():
    table = answers(0.5)
    more = better(table)
    result = result_of(table, more)
    assert (result["images"], result["sources"]) == (M, 100)
    for row in result["scores"]:
        found = row["difference"][METRIC]
        assert 0 < found["low"] < found["value"] < found["high"]
        if row["unit"] == "image":
            method = row["method"]
            assert found["value"] == pytest.approx(score(more, method) - score(table, method))
            assert row["second"][METRIC]["value"] == pytest.approx(score(more, method))
    said, classes, *_ = result["answers"]
    assert (said["question"], said["verdict"]) == ("Is after better than before?", "yes")
    assert re.search(r"by kNN, k = 20 after is better than before by \d+\.\d points \[\+\d", said["text"])
    assert said["text"].endswith("Tested on the same 300 images of 100 sources.")
    assert classes["text"].startswith("In recall by kNN, k = 20 after is better on <b> (+")
    assert [r["class"] for r in result["by class"] if r["difference"]["value"]] == ["<b>"]
    back = result_of(more, table)["answers"][0]
    assert (back["verdict"], back["warning"]) == ("no", True)


def test_the_difference_is_paired():
    """Its interval is narrower than those of two unpaired scores together."""
    table = answers(0.5)
    row = result_of(table, better(table))["scores"][0]
    first, second, found = (row[key][METRIC] for key in ("first", "second", "difference"))
    width = sum((of["high"] - of["low"]) ** 2 for of in (first, second)) ** 0.5
    assert found["high"] - found["low"] < 0.75 * width
    units = Units(table.sources, 0, 200)
    labels, guess = (torch.tensor([CLASSES.index(c) for c in of]) for of in (table.classes, table.methods[METHOD]))
    assert first["low"] == pytest.approx(units.scored(of_classes(labels, guess, 3))[METRIC].low)


def test_equal_runs_have_no_difference():
    table = answers(0.7)
    result = result_of(table, table)
    assert all(set(row["difference"][METRIC].values()) == {0.0} for row in result["scores"])
    said, classes, *_ = result["answers"]
    assert said["verdict"] == "no difference seen"
    assert said["text"].count("no difference that can be told from chance, +0.0 points [+0.0, +0.0]") == 2
    assert classes["verdict"] == "none seen"


def test_few_sources_say_nothing():
    result = result_of(answers(0.5, sources=4), better(answers(0.5, sources=4)))
    assert result["answers"][0]["verdict"] == "not known"
    assert "fewer than 5 sources: too few to say" in result["answers"][0]["text"]


def test_order_and_numbers_of_sources_do_not_matter():
    table, order = answers(0.5), torch.randperm(M, generator=torch.Generator().manual_seed(0))
    rows = order.tolist()
    methods = {name: [of[i] for i in rows] for name, of in better(table).methods.items()}
    numbers = 7919 - table.sources[order]
    shuffled = AnswerTable([NAMES[i] for i in rows], numbers, [table.classes[i] for i in rows], methods)
    assert result_of(table, shuffled)["scores"] == result_of(table, better(table))["scores"]


def refused(one, other, **given):
    with pytest.raises(ConfigError) as error:
        paired((one, other), ("before", "after"), **given)
    return str(error.value)


def test_other_images_are_refused_by_count_and_name():
    table = answers(0.5)
    other = table._replace(images=["x/new.png", *NAMES[1:]])
    said = refused(table, other)
    assert "1 of 300 images of before are not in the other: synthetic/test/0; " in said
    assert "1 of 300 images of after are not in the other: x/new.png. " in said
    assert said.endswith("or compare the 299 that both have with --common")
    pair = paired((table, other), ("before", "after"), common=True)
    assert (pair.images, len(pair.labels)) == (NAMES[1:], M - 1)
    assert pair.notes[0].endswith("the 299 images that both were asked about; left out: 1 of before and 1 of after")
    none = table._replace(images=[f"other/{name}" for name in NAMES])
    assert "300 of 300" in refused(table, none, common=True)
    assert "--common" not in refused(table, none)


def test_other_classes_and_sources_are_refused():
    table = answers(0.5)
    wrong = [CLASSES[(CLASSES.index(table.classes[0]) + 1) % 3], *table.classes[1:]]
    said = refused(table, table._replace(classes=wrong), common=True)
    assert said.startswith("1 of the 300 images have another class in after than in before: synthetic/test/0;")
    sources = table.sources.clone()
    sources[5] = sources[6]
    said = refused(table, table._replace(sources=sources))
    assert "images share their sources with others in after than in before: synthetic/test/6, " in said
    twice = table._replace(images=[NAMES[0], *NAMES[:-1]])
    assert "before has several images called synthetic/test/0" in refused(twice, table)
    assert "no method has answered in both" in refused(table, table._replace(methods={"x": table.classes}))


def test_sources_that_one_evaluation_alone_knows():
    table = answers(0.5)
    pair = paired((table._replace(sources=torch.arange(M)), table), ("before", "after"))
    assert len(pair.sources.unique()) == 100
    assert pair.notes[0].startswith("before does not know the sources")


def test_unlabelled_images_are_left_out_and_the_runs_own_classifier_is_found_by_name():
    labels, names = torch.tensor([2, -1, 0, 1]), ["a", "b", "c", "d"]
    asked = SplitFeatures(torch.zeros(4, 2), torch.zeros(4, 3), torch.zeros(4, 2), labels, torch.arange(4) // 2, names)
    said = ClassScores("linear probe, C = 0.1", torch.zeros(3, 3), torch.tensor([2, 1, -1]))
    mixed = ["x", "d", "c", "a"]  # images in another order, and one more
    own = Predictions(mixed, CLASSES, torch.zeros(4, dtype=torch.int64), torch.arange(4), torch.eye(3)[[0, 1, 0, 2]])
    table = AnswerTable.of(asked, CLASSES, [said], own)
    assert (table.images, table.sources.tolist()) == (["a", "c", "d"], [0, 1, 1])
    assert table.classes == ["rare, few", "round", "<b>"]
    assert table.methods == {"linear probe": ["rare, few", "<b>", ""], OWN: table.classes}
    elsewhere = own._replace(names=["x", "y", "c", "a"])
    assert list(AnswerTable.of(asked, CLASSES, [said], elsewhere).methods) == ["linear probe"]
    assert AnswerTable.of(asked, CLASSES, [], None) is None


def test_the_table_reads_back_what_it_wrote(tmp_path):
    odd = ["a,b\n.png", '"', "\udcff.png", *NAMES[3:]]
    table = answers(0.5, images=odd)
    table.methods["none"] = ["", *table.classes[1:]]
    other = answers(0.2)
    del other.methods["linear probe"]
    answer_table.write(tmp_path, table, {"north, 2": table, "south": other})
    back = answer_table.read(tmp_path)
    labs = answer_table.read_labs(tmp_path)
    assert list(labs) == ["north, 2", "south"]
    assert {name: list(of) for name, of in labs["north, 2"].methods.items()} == table.methods
    assert {name: list(of) for name, of in labs["south"].methods.items()} == other.methods
    assert labs["south"].sources.equal(other.sources)
    assert (list(back.images), back.sources.tolist()) == (odd, table.sources.tolist())
    assert {name: list(of) for name, of in back.methods.items()} == table.methods
    (tmp_path / answer_table.FILE).write_text("image;source;class\n1;2;3\n")
    with pytest.raises(ConfigError, match="is not as `sslcells evaluate` writes it"):
        answer_table.read(tmp_path)
    (tmp_path / answer_table.LABS_FILE).write_text("laboratory,image,source,class,kNN\nnorth,a,1,x\n")
    with pytest.raises(ConfigError, match="is not as `sslcells evaluate` writes it"):
        answer_table.read_labs(tmp_path)
    answer_table.write(tmp_path, None, {})
    assert answer_table.read_labs(tmp_path) == {}
    with pytest.raises(ConfigError, match=r"has no answers.csv: `sslcells evaluate` writes it"):
        answer_table.read(tmp_path)


def test_the_page_has_all_of_it_and_needs_no_other_file(runs, capsys):
    assert main(None, ["compare-runs", *map(str, runs)]) == 0
    out = capsys.readouterr().out
    file = runs[1] / "compared_with_before.html"
    assert out.strip().endswith(str(file))
    assert "Is after better than a & b? Yes." in out
    html = file.read_text(encoding="utf-8")
    heads = re.findall("<h2>(.*?)</h2>", html)
    assert heads == [
        *("In short", "Scores", "Classes", "Where they disagree, by kNN, k = 20"),
        *("Training", "What was set differently", "How they were made"),
    ]
    assert set(re.findall(r'(?:src|href)="([^",]{0,22})', html)) == {"data:image/png;base64", "data:image/jpeg;base64"}
    assert "<script" not in html
    assert "<b>&lt;b&gt;</b>" in html
    assert "rare, few: <b>" not in html
    cells = re.findall(r"<li><img.*?</li>", html)
    wrong = int(re.search(r"after alone is right: (\d+) of 300", html)[1])
    assert len(cells) == min(12, wrong)
    assert "a &amp; b alone is right: 0 of 300" in html
    assert all("✗ a &amp; b" in cell and "✓ after: &lt;b&gt;" in cell for cell in cells)
    assert "<td>optim.lr</td><td>0.002</td><td>0.01</td>" in html
    assert "commit 0123456789ab" in html
    assert "sslcells evaluate a" in html


def test_laboratories_that_both_were_asked_about(tmp_path, capsys):
    """The second run is better in the north, and as good in the east; the south was asked of the first alone."""
    north, east = answers(0.4), answers(0.7, seed=3)
    other = [name.replace("synthetic", "other") for name in NAMES]
    told = {"labs": ["training data", "north"], "images of each": 120}
    low, high = ({"value": v, "low": v - 0.1, "high": v + 0.1} for v in (0.41, 0.72))
    labs = {"north": north, "east": east, "south": north, "west": north}
    first = run_of(tmp_path / "first", answers(0.5), labs=labs, pairs=[told | {"robustness index": low}])
    labs = {"north": better(north), "east": east, "west": north._replace(images=other)}
    second = run_of(tmp_path / "second", answers(0.5), labs=labs, pairs=[told | {"robustness index": high}])
    assert main(None, ["compare-runs", str(first), str(second)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Is second better in another laboratory? In part." in out
    assert "in north second is better than first by" in out
    assert "in east no difference that can be told from chance" in out
    assert "laboratory west is not compared: the runs were asked about other images" in out
    assert "first alone was asked about laboratories: south" in out
    assert "0.410 [0.310, 0.510]" in out
    html = (second / "compared_with_first.html").read_text(encoding="utf-8")
    assert "<h2>Laboratories</h2>" in html
    row = re.search(r"<td>north</td><td>kNN, k = 20, weighted</td>.*?</tr>", html)[0]
    _, _, images, *shown = re.findall("<td>(.*?)</td>", row)
    assert images == "300 of 100 sources"
    assert [float(cell.split()[0]) for cell in shown[:2]] == [
        round(100 * score(table, METHOD), 1) for table in (north, better(north))
    ]


def test_what_it_refuses_in_a_line(runs, tmp_path, capsys):
    assert main(None, ["compare-runs", str(runs[0]), str(runs[0])]) == 2
    assert "is both runs" in capsys.readouterr().err
    assert main(None, ["compare-runs", str(runs[0]), f"{runs[1]}x"]) == 2
    assert f"{runs[1]}x: no such run's folder (did you mean {runs[1].name}?)" in capsys.readouterr().err
    run_of(tmp_path / "other", answers(0.5, images=[f"x/{i}" for i in range(M)]))
    assert main(None, ["compare-runs", str(runs[0]), str(tmp_path / "other")]) == 2
    assert "the runs were asked about other images" in capsys.readouterr().err
    (tmp_path / "other" / "evaluation.json").write_text("{}")
    assert main(None, ["compare-runs", str(runs[0]), str(tmp_path / "other")]) == 2
    assert "the evaluation cannot be read" in capsys.readouterr().err


@pytest.mark.slow
def test_the_page_reads_well_in_a_browser(runs, tmp_path):
    """No wider than the window at 1280 and at 400 px, and all of its pictures are there."""
    assert main(None, ["compare-runs", *map(str, runs), "--out", str(tmp_path / "page.html")]) == 0
    found = browser.told(
        tmp_path,
        "".join(f'<iframe src="page.html" width="{width}" height="900"></iframe>' for width in (1280, 400))
        + "<script>onload = () => document.body.dataset.found = JSON.stringify([...document.querySelectorAll('iframe')]"
        ".map(({contentDocument: d, clientWidth: w}) => [d.documentElement.scrollWidth <= w,"
        " [...d.images].length, [...d.images].every(i => i.complete && i.naturalWidth > 0)]))</script>",
    )
    assert found == [[True, found[0][1], True]] * 2
    assert found[0][1] > 4
