"""The report's first answers, on planted figures: each verdict both ways, undecided, and not asked."""

from pathlib import Path

import numpy as np
import pytest
import torch

from sslcells.evaluation import compared_in_short
from sslcells.evaluation.answers import Answer, pairs
from sslcells.evaluation.classifier import Predictions
from sslcells.evaluation.confused import confused
from sslcells.evaluation.in_short import answers, basis, overall
from sslcells.evaluation.in_short_picture import dots
from sslcells.evaluation.learning_curve import more_training, trend
from sslcells.evaluation.scores import Units

KNN = "kNN, k = 20, weighted"
METRIC = "balanced accuracy"


def score(value, half=0.02):
    low, high = (None, None) if half is None else (value - half, value + half)
    return {METRIC: {"value": value, "low": low, "high": high}}


def row(name, value, sources=40, **more):
    return {"name": name, "unit": "image", "images": 400, "sources": sources, "scores": score(value), **more}


def less(value, half=0.02, **more):
    return {"unit": "image", "scores": score(value, half), **more}


def result(colour=0.2, untrained=0.1, half=0.02, sources=40, **more):
    """An evaluation's results; the differences to both baselines, with half of their intervals."""
    figures = [row(n, v, sources) for n, v in {"this run": 0.8, "colour histograms": 0.6}.items()]
    differences = [less(colour, half, baseline="colour histograms")]
    if untrained is not None:
        figures.append(row("untrained network", 0.7, sources))
        differences.append(less(untrained, half, baseline="untrained network"))
    classes = {"round": {"images": 200}, "square": {"images": 200}}
    known = {
        "asked": "test",
        "resamples": 1000,
        "notes": [],
        "figures": [row("k = 20, weighted", 0.8, sources, task="kNN")],
        "baselines": {"method": KNN, "images of train": 900, "figures": figures, "differences": differences},
        "against": [],
        "labs": None,
        "confused": {"method": "linear probe, C = 1", "pairs": [], "few": []},
        "leaks": leaks(),
    }
    known["leaks"]["images"] = {split: {"classes": classes} for split in ("train", "val", "test")}
    return {**known, **more}


def leaks(copies=0, near=False, sources=0, known=True, found=0.9):
    both = "train and test"
    return {
        "sources known": known,
        "exact duplicates": {both: {"count": copies}},
        "near duplicates": {
            "copies found": found,
            "train and val": {"images": 0},
            both: {"images": 7, "of": 400, "more than by chance": near},
        },
        "sources": {both: {"count": sources, "images": {"train": 5, "test": 6}}} if known else {},
        "images": {},
    }


def said(found, words, metrics=()):
    (one,) = [of for of in answers(found, metrics, Path("runs/my cells")) if words in of["question"]]
    return one


@pytest.mark.parametrize("words", ["colour", "untrained"])
@pytest.mark.parametrize(
    ("difference", "half", "verdict", "text", "warning"),
    [
        (0.1, 0.02, "yes", "better, +10.0 points [+8.0, +12.0]", False),
        (0.019, 0.02, "no difference seen", "no difference seen, +1.9 points [-0.1, +3.9]", True),
        (-0.019, 0.02, "no difference seen", "no difference seen, -1.9 points", True),
        (-0.1, 0.02, "no", "worse, -10.0 points [-12.0, -8.0]", True),
        (0.1, None, "not known", "too few to say, +10.0 points.", False),
    ],
)
def test_better_is_said_only_where_the_interval_says_so(words, difference, half, verdict, text, warning):
    one = said(result(difference, difference, half), words)
    assert (one["verdict"], one["warning"]) == (verdict, warning)
    assert text in one["text"]
    assert "the encoder reaches 80.0 % [78.0, 82.0]" in one["text"]


def test_few_sources_give_no_verdict():
    assert said(result(sources=4), "colour")["verdict"] == "not known"
    assert said(result(sources=5), "colour")["verdict"] == "yes"
    assert said(result(sources=None), "colour")["verdict"] == "yes"  # 400 images, each its own
    assert "of 5 sources: these are few" in basis(result(sources=5))
    assert "of 400 images. Sources are not known" in basis(result(sources=None))
    assert basis(result()).endswith("of 40 sources.")


def test_what_was_not_asked_comes_with_its_command():
    found = result(untrained=None)
    for words, command in {
        "untrained": "evaluate.untrained=true",
        "published": "--against NAME",
        "laboratory": "--lab NAME=FOLDER",
    }.items():
        one = said(found, words)
        assert one["verdict"] == "not asked"
        assert f"sslcells evaluate 'runs/my cells' {command}" in one["text"]


def test_without_labels_no_question_of_them_is_answered():
    found = result(asked=None, baselines=None, figures=[], confused=None)
    verdicts = {of["question"]: of["verdict"] for of in answers(found, [], Path("run"))}
    assert set(verdicts.values()) == {"not known", "none seen"}
    assert verdicts["What leaks from train?"] == "none seen"
    assert basis(found) == ""
    assert dots(found) == []


def beside(name, knn, probe):
    differences = [less(knn, method=KNN), less(probe, method="linear probe")]
    return {"encoder": name, "differences": differences, "labs": None, "figures": []}


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([(0.1, 0.1)], "yes"),
        ([(-0.1, -0.1)], "no"),
        ([(0.01, -0.01)], "no difference seen"),
        ([(0.1, 0.0)], "in part"),
        ([(0.0, -0.1)], "no"),
        ([(0.1, 0.1), (-0.1, -0.1)], "in part"),
    ],
)
def test_published_weights(differences, verdict):
    found = result(against=[beside(f"net{i}", *both) for i, both in enumerate(differences)])
    one = said(found, "published")
    assert one["verdict"] == verdict
    assert "net0, frozen: " in one["text"]
    assert "points" in one["text"]
    assert one["text"].count("by linear probe") == len(differences)


def test_several_verdicts_make_one():
    assert overall([]) == overall(["not known"]) == "not known"
    assert overall(["yes", "not known"]) == "yes"


def lab(by_knn, by_probe=None, name="north", trained=False, classes=("round", "square"), images=200):
    """A laboratory by one or two methods: with the others' labels, with its own, the difference, half its interval."""
    figures, less = [], []
    for method, given in {"kNN, k = 20": by_knn, "linear probe": by_probe}.items():
        if given is None:
            continue
        others, own, difference, half = given
        for whose, value in {"the others": others, "its own": own}.items():
            more = {"method": method, "labels of": whose, "among": "all classes", "unit": "image", "images": images}
            figures.append({**more, "sources": 30, "scores": score(value)})
        less.append({"method": method, "scores": score(difference, half)})
    counted = list(classes)
    return {"lab": name, "classes counted": counted, "figures": figures, "others − own": less, "trained on": trained}


HOLDS, LOSES = (0.79, 0.8, -0.01, 0.02), (0.6, 0.8, -0.2, 0.02)


@pytest.mark.parametrize(
    ("of", "verdict", "words"),
    [
        (lab(HOLDS), "yes", "it loses less than 5 points, -1.0 points [-3.0, +1.0]"),
        (lab(LOSES), "no", "it loses, -20.0 points [-22.0, -18.0]"),
        (lab(HOLDS, LOSES), "no", "by linear probe 60.0 % [58.0, 62.0] with the labels of the others"),
        (lab((0.78, 0.8, -0.02, 0.06)), "no difference seen", "it may lose more than 5"),
        (lab(HOLDS, (0.78, 0.8, -0.02, 0.06)), "no difference seen", "it may lose more than 5"),
        (lab((0.51, 0.5, 0.01, 0.02)), "no", "not better than chance, 50 %"),
        (lab((0.51, 0.5, 0.01, 0.02), HOLDS), "yes", "by kNN 51.0 %"),
        (lab((0.9, 0.9, 0.0, None)), "not known", "too few to say"),
        (lab(HOLDS, classes=("round",)), "not known", "two are needed"),
    ],
)
def test_another_laboratory(of, verdict, words):
    one = said(result(labs={"labs": [of], "pairs": []}), "laboratory")
    assert one["verdict"] == verdict
    assert "north: " in one["text"]
    assert words in one["text"]


def test_laboratories_disagree_and_lie_apart():
    pair = {"labs": ["north", "south"], "robustness index": {"value": 0.4}}
    labs = [lab(HOLDS, trained=True), lab(LOSES, name="south")]
    found = result(labs={"labs": labs, "pairs": [pair]})
    one = said(found, "laboratory")
    assert (one["verdict"], one["warning"]) == ("in part", True)
    assert "north (its images were trained on, its labels are left out)" in one["text"]
    assert "follow the laboratory more than the class: north and south" in one["text"]
    assert [dot.name for dot in dots(found)] == [
        "test split, kNN, k = 20",
        "this run",
        "colour histograms",
        "untrained network",
        "laboratory north, kNN, k = 20",
        "by labels of the others",
        "by labels of its own",
        "laboratory south, kNN, k = 20",
        "by labels of the others",
        "by labels of its own",
    ]
    assert {dot.chance for dot in dots(found)} == {None, 0.5}


def answered(wrong, images=400, of_few=0):
    """`wrong` of so many images of the first class are taken for the second; the third has `of_few`, all wrong."""
    labels = torch.tensor([0] * images + [1] * images + [2] * of_few)
    predicted = labels.clone()
    predicted[:wrong] = 1
    predicted[2 * images :] = -1
    units = Units(torch.arange(len(labels)), 0, 200)
    return confused("linear probe, C = 1", labels, predicted, ("round", "square", "star"), units)


@pytest.mark.parametrize(
    ("wrong", "images", "verdict", "words"),
    [
        (80, 400, "some", "By linear probe: 20.0 % ["),
        (80, 400, "some", "of round are taken for square"),
        (2, 20, "not sure", "perhaps 10.0 % ["),
        (4, 400, "none seen", "the largest share is 1.0 % ["),
        (0, 400, "none seen", "no class has more than 5% taken for another."),
    ],
)
def test_confused_classes(wrong, images, verdict, words):
    one = said(result(confused=answered(wrong, images)), "confused")
    assert one["verdict"] == verdict
    assert words in one["text"]


def test_classes_of_few_images_are_named_and_not_counted():
    found = answered(0, of_few=9)
    assert found["pairs"] == []
    assert "Fewer than 10 images, not counted: star." in said(result(confused=found), "confused")["text"]


@pytest.mark.parametrize(
    ("planted", "verdict", "words"),
    [
        ({}, "none seen", "No image of val or test is in train too, and no more than by chance nearly; no source"),
        ({"known": False}, "sources not known", "but sources are not known"),
        ({"found": 0.4}, "copies not known", "nearly equal ones would not have been found; no source"),
        ({"copies": 3}, "some", "3 images of test are in train too, byte for byte: figures of test are too high."),
        (
            {"near": True},
            "some",
            "7 of 400 images of test lie as near to one of train as copies do: figures of test may be too high.",
        ),
        ({"sources": 2}, "some", "2 sources are in both, with 6 images of test"),
        ({"copies": 3, "known": False}, "some", "And sources are not known"),
    ],
)
def test_leaks(planted, verdict, words):
    found = result()
    found["leaks"] = {**leaks(**planted), "images": found["leaks"]["images"]}
    one = said(found, "leaks")
    assert (one["verdict"], one["warning"]) == (verdict, verdict == "some")
    assert words in one["text"]


def logged(values, key="knn/balanced"):
    return [{"step": 10 * i, "loss": 1.0, key: value} for i, value in enumerate(values)]


WIGGLE = [0.004, -0.004] * 10


@pytest.mark.parametrize(
    ("curve", "verdict", "words"),
    [
        ([0.4 + 0.02 * i + w for i, w in enumerate(WIGGLE)], "likely", "still rose"),
        ([0.8 - 0.02 * i + w for i, w in enumerate(WIGGLE)], "no", "it was best at step 0"),
        ([0.8 + w for w in WIGGLE], "no", "hardly rose"),
        ([0.8 + 20 * w for w in WIGGLE], "no rise seen", "it may still rise, or not"),
        ([0.8] * 20, "no", "+0.0 points [+0.0, +0.0]"),
        ([0.5, 0.6, 0.7, 0.8], "not known", "was looked at 4 times"),
        ([], "not known", "logged no figure on val"),
    ],
)
def test_more_training(curve, verdict, words):
    _, found, text, _ = more_training(logged(curve))
    assert found == verdict
    assert words in text


def test_a_trend_is_that_of_the_second_half_and_its_interval_holds_19_of_20_lines():
    steps = list(range(40))
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        values = np.where(np.arange(40) < 20, 5.0, 0.01 * np.arange(40)) + generator.normal(0, 0.02, 40)
        found = trend(steps, values.tolist())
        held += found.low <= 0.01 * 19 <= found.high
        assert found.looks == 20
    assert 180 <= held <= 198  # 190 expected
    assert trend(steps[:9], [0.5] * 9).looks == 5
    assert trend(steps[:8], [0.5] * 8) is None


def test_the_last_value_of_a_step_counts_and_nan_does_not():
    rows = [*logged([0.5 + 0.02 * i for i in range(20)]), {"step": 190, "knn/balanced": 0.1}]
    assert more_training(rows)[1] != "likely"
    assert more_training([{"step": 0, "knn/balanced": float("nan")}])[1] == "not known"


def of_model(model, right, seed=0, fraction=1.0, images=200):
    """A model's answers, of which this share is right, the same images for all."""
    labels = torch.arange(images) % 2
    guess = torch.where(torch.rand(images, generator=torch.Generator().manual_seed(seed)) < right, labels, 1 - labels)
    p = torch.nn.functional.one_hot(guess, 2).double()
    names = [str(i) for i in range(images)]
    return Answer(model, fraction, seed, Predictions(names, ["a", "b"], labels, torch.arange(images), p))


def compared(*models, **more):
    given = {"starts": {"supervised": "from scratch"}, "frozen": [], "differences": [], "labs": []}
    found = compared_in_short.answers({"pairs": pairs(models), **given, **more})
    return {of["question"]: of for of in found}


START = "Is the encoder a better start than none?"


@pytest.mark.parametrize(
    ("tuned", "scratch", "verdict"),
    [
        ([0.95, 0.95], [0.6, 0.6], "yes"),
        ([0.6, 0.6], [0.95, 0.95], "no"),
        ([0.8, 0.8], [0.8, 0.8], "no difference seen"),
        ([1.0, 0.6], [0.5, 0.65], "no difference seen"),  # better on the mean, but not for every seed
    ],
)
def test_models_are_compared_over_seeds(tuned, scratch, verdict):
    models = [of_model("fine-tuned", right, seed) for seed, right in enumerate(tuned)]
    models += [of_model("supervised", right, 10 + seed)._replace(seed=seed) for seed, right in enumerate(scratch)]
    assert compared(*models)[START]["verdict"] == verdict


def test_a_comparison_says_how_many_labels_and_what_was_not_asked():
    few, many = (
        [of_model("fine-tuned", right, 0, part), of_model("supervised", 0.7, 1, part)._replace(seed=0)]
        for part, right in ((0.01, 0.95), (1.0, 0.7))
    )
    found = compared(*few, *many)
    assert found[START]["verdict"] == "in part"
    assert "with 1 % of the labels better, +" in found[START]["text"]
    assert "with 100 % of the labels no difference seen" in found[START]["text"]
    assert [of["verdict"] for of in found.values()] == ["in part", "not known", "not known", "not asked", "not asked"]
    labs = [{"lab": "north", "pairs": pairs([*few, *many])}]
    less = {"model": "fine-tuned", "against": "frozen net", "scores": score(-0.1)}
    more = compared(*few, starts={"supervised": "from resnet18"}, labs=labs, frozen=["net"], differences=[less])
    assert "Is the encoder better than training from resnet18?" in more
    verdicts = [of["verdict"] for of in more.values()]
    assert verdicts == ["yes", "not known", "not known", "no", "no difference seen"]
