"""`sslcells evaluate` from end to end: what it prints and leaves, on any number of ranks, and what it refuses."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from gloo import on_ranks
from safetensors.torch import load_file, save_file
from test_launch import LAUNCH, finish, start
from test_train import tiny

from sslcells.cli import main
from sslcells.config import load
from sslcells.delivery.card import _figures
from sslcells.evaluate import measured
from sslcells.evaluation import answer_table
from sslcells.names import EVALUATION
from sslcells.run.metrics import pictures_of, read_metrics
from sslcells.train import train

QUICK = ["evaluate.bootstrap=100", "evaluate.batch=16", "train.workers=0"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return train(tiny(tmp_path_factory.mktemp("evaluated"), "train.total_steps=4", "data.val=30", "data.test=40"))


@pytest.fixture
def run(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "quickstart"))


def result_of(folder):
    return json.loads((folder / EVALUATION).read_text())


def row(result, task, name=""):
    return next(r for r in result["figures"] if r["task"] == task and r["name"].startswith(name))


def test_what_it_prints_and_leaves(run, capsys):
    assert main(None, ["evaluate", str(run), *QUICK]) == 0
    out = capsys.readouterr().out
    assert out.index("Leaks") < out.index("Classes of the test split")
    assert "images of train" not in out[: out.index("Leaks")], "no bars outside a terminal"
    result = result_of(run)
    assert {r["task"] for r in result["figures"]} == {"kNN", "linear probe", "few-shot", "retrieval", "clustering"}
    assert [r["name"] for r in result["figures"] if r["task"] == "kNN"] == [
        "k = 1",
        "k = 5",
        "k = 5, weighted",
        "k = 20",
        "k = 20, weighted",
    ]
    for r in result["figures"]:
        for score in r["scores"].values():
            assert score["low"] <= score["high"]
    assert result["asked"] == "test"
    assert result["labs"] is None  # the data names no laboratories
    assert {"effective rank", "row std", "uniformity", "alignment"} == set(result["health"]["train"])
    assert any("chosen on the validation split" in note for note in result["notes"])
    assert not list(run.glob("*.partial"))
    assert (run / "report.html").read_text().count("<figcaption>") == 9  # with the curves and views of the training
    assert [of["verdict"] for of in result["answers"]].count("not asked") == 2  # published weights, another laboratory
    beside = {row["name"] for row in result["baselines"]["figures"]}
    assert beside == {"this run", "colour histograms", "untrained network"}
    assert all(of["question"] in out for of in result["answers"])
    answers = answer_table.read(run)
    assert len(answers.images) == 40
    for method, said in answers.methods.items():
        right = [one == true for one, true in zip(said, answers.classes, strict=True)]
        task, _, name = method.partition(", ")
        assert np.mean(right) == pytest.approx(row(result, task, name)["scores"]["accuracy"]["value"])
    assert [*answers.methods] == ["kNN, k = 20, weighted", "linear probe"]
    assert result["made"]["overrides"] == QUICK
    assert result["made"]["run"] == "."
    last = read_metrics(run)[-1]
    assert last["step"] == 5  # one after the training's last, for trackers
    nearest = row(result, "kNN", "k = 1")["scores"]["accuracy"]["value"]
    assert last["evaluation/test/kNN/k = 1/image/accuracy"] == nearest
    assert {path.name for path in pictures_of(run, 5, newest=False)} >= {"similarities.png", "tsne_class.png"}


def test_a_bar_for_each_pass_over_images_in_a_terminal(run, capsys, monkeypatch):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    measured(load(f"{run}/config.yaml", [*QUICK, "evaluate.max_images=20"]), run, torch.device("cpu"))
    out = capsys.readouterr().out
    end = out.index("\n", out.rindex("test by random weights"))
    last = out[out.rindex("images of train", 0, end) : end]  # the bars as they were drawn last
    for name in (
        "images of val",
        "images of test",
        "images to copy",
        "their copies",
        "view 1 of 2",
        "view 2 of 2",
        "train by random weights",
    ):
        assert name in last
    assert last.count("20/20") == 9


def test_the_knn_is_that_of_the_run(run):
    """The same neighbours as in metrics.jsonl's last line: k, weights and split."""
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert main(None, ["evaluate", str(run), *QUICK, "evaluate.k=5", "evaluate.split=val"]) == 0
    scores = row(result_of(run), "kNN", "k = 5, weighted")["scores"]
    assert scores["accuracy"]["value"] == pytest.approx(last["knn/top1"], abs=1e-6)
    assert scores["balanced accuracy"]["value"] == pytest.approx(last["knn/balanced"], abs=1e-6)


def on_one_rank(folder):
    result, _ = measured(load(f"{folder}/config.yaml", QUICK), Path(folder), torch.device("cpu"))
    return json.dumps(result)


@pytest.mark.slow
def test_the_same_to_the_last_digit_on_one_two_and_four_ranks(run):
    whole = on_one_rank(run)
    for world in (2, 4):
        first, *others = on_ranks(world, on_one_rank, str(run))
        assert first == whole
        assert set(others) == {"{}"}


@pytest.mark.slow
def test_launched_on_two_ranks(run):
    assert "Leaks" in finish(start(*LAUNCH, "-m", "sslcells.evaluate", str(run), *QUICK))
    made = result_of(run)
    assert made.pop("made")["ranks"] == 2
    assert json.dumps(made) == on_one_rank(run)


def folder_of(tmp_path, run, counts, sources=False):
    """A folder of images drawn at random: {split: {class: images}}; class "" is none."""
    import numpy as np
    from PIL import Image

    rng, table = np.random.default_rng(0), ["path,source"]
    for split, classes in counts.items():
        for name, count in classes.items():
            for i in range(count):
                file = tmp_path / "cells" / split / name / f"{i}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(file)
                table.append(f"{file.relative_to(tmp_path / 'cells')},{split}{name}{i // 2}")
    (tmp_path / "cells" / "sources.csv").write_text("\n".join(table))
    given = ", sources: sources.csv" if sources else ""
    data = f"data={{kind: folder, path: {tmp_path / 'cells'}{given}}}"
    assert main(None, ["evaluate", str(run), *QUICK, data]) == 0
    return result_of(run)


def test_a_folder_without_labels(tmp_path, run, capsys):
    (run / answer_table.FILE).write_text("of an evaluation before")
    result = folder_of(tmp_path, run, {"": {"": 12}})
    assert result["figures"] == []
    assert result["asked"] is None
    assert not (run / answer_table.FILE).exists()
    assert set(result["health"]["train"]) == {"effective rank", "row std", "uniformity", "alignment"}
    assert "no labels: only figures that need none" in capsys.readouterr().out


@pytest.mark.slow
def test_a_class_missing_in_the_split_that_is_asked(tmp_path, run):
    counts = {"train": {"a": 8, "b": 8, "c": 8}, "test": {"a": 6, "c": 6}}
    result = folder_of(tmp_path, run, counts)
    assert any("test shows no b: means over classes leave them out" in note for note in result["notes"])
    assert row(result, "linear probe")["scores"]["AUROC"]["value"] is not None
    assert {r["class"] for r in result["by class"]} == {"a", "c"}


@pytest.mark.slow
def test_a_class_that_train_lacks(tmp_path, run):
    result = folder_of(tmp_path, run, {"train": {"a": 8, "b": 8}, "test": {"a": 6, "c": 6}})
    assert any("train shows no c: no classifier can name them" in note for note in result["notes"])


def test_one_image_a_class(tmp_path, run):
    result = folder_of(tmp_path, run, {"train": {"a": 1, "b": 1, "c": 1}, "test": {"a": 1, "b": 1, "c": 1}})
    assert {r["task"] for r in result["figures"]} == {"kNN", "linear probe", "few-shot", "clustering"}
    assert any("3 of 3 images have no other image of their class: not queried" in note for note in result["notes"])


@pytest.mark.slow
def test_train_alone_is_asked_without_its_own_sources(tmp_path, run):
    result = folder_of(tmp_path, run, {"": {"a": 12, "b": 12}}, sources=True)
    assert result["asked"] == "train"
    assert {r["unit"] for r in result["figures"]} == {"image", "source", "source vote"}
    assert row(result, "kNN")["scores"]["accuracy"]["value"] < 0.9, "noise has no class"


def test_all_equal_embeddings(run):
    weights = load_file(run / "encoder.safetensors")
    save_file(
        {k: torch.zeros_like(v) if v.is_floating_point() else v for k, v in weights.items()},
        run / "encoder.safetensors",
    )
    assert main(None, ["evaluate", str(run), *QUICK]) == 0
    result = result_of(run)
    assert row(result, "kNN", "k = 20")["scores"]["balanced accuracy"]["value"] == pytest.approx(0.2)
    assert row(result, "linear probe")["scores"]["balanced accuracy"]["value"] == pytest.approx(0.2)
    assert row(result, "clustering")["scores"]["NMI"]["value"] == pytest.approx(0)
    assert any("only 1 of 5 clusters" in note for note in result["notes"])


def test_features_that_are_no_numbers_are_told(run, capsys):
    """Of weights that are finite, and overflow: others are refused when they are read."""
    weights = load_file(run / "encoder.safetensors")
    huge = {k: torch.full_like(v, 3e38) if v.is_floating_point() else v for k, v in weights.items()}
    save_file(huge, run / "encoder.safetensors")
    assert main(None, ["evaluate", str(run), *QUICK]) == 1
    assert "no finite features for 80 of 80 images of train" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["model.backbone=resnet18"], "the encoder is already trained"),
        (["evaluate.splt=val"], "did you mean evaluate.split"),
        (["data={kind: folder, path: nowhere}"], "has no folder 'nowhere'"),
        (["data.classes=1"], "data.classes=1"),
    ],
)
def test_a_mistake_is_named(run, capsys, change, message):
    assert main(None, ["evaluate", str(run), *change]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_that_is_no_run(tmp_path, run, capsys):
    assert main(None, ["evaluate", str(tmp_path)]) == 2
    assert "holds no config.yaml: is it a run's folder?" in capsys.readouterr().err
    assert main(None, ["evaluate", f"{run}x"]) == 2
    assert f"{run}x: no such run's folder (did you mean {run.name}?)" in capsys.readouterr().err
    (run / "encoder.json").unlink()
    assert main(None, ["evaluate", str(run)]) == 2
    assert "is it the folder of a finished run?" in capsys.readouterr().err


def test_what_is_left_out_is_said(run, capsys):
    """Of 40 test images 15 are measured; leaks that need no neighbours are still searched for among all."""
    assert main(None, ["evaluate", str(run), *QUICK, "evaluate.queries=15"]) == 0
    result, said = result_of(run), "15 of the 40 images of test, drawn by class, are measured"
    assert [sentence[: len(said)] for sentence in result["left out"]] == [said]
    assert result["notes"][0] == result["left out"][0]
    assert said in capsys.readouterr().out.replace("\n", " ")
    assert said in (run / "report.html").read_text()
    assert {r["images"] for r in result["figures"] if r["task"] in ("kNN", "linear probe", "clustering")} == {15}
    assert result["leaks"]["images"]["test"]["images"] == 40
    near = next(
        f["text"] for f in result["leaks"]["findings"] if "lie nearer" in f["text"] and " of test " in f["text"]
    )
    assert "of 15 images of test (drawn from its 40: evaluate.queries)" in near
    assert f"Left out: {said}" in _figures(run, load(f"{run}/config.yaml"))


@pytest.mark.slow
def test_train_alone_is_asked_in_part(run, capsys):
    few = [*QUICK, "evaluate.queries=15", "data.test=0", "data.val=0", "evaluate.holdout=0"]
    (run / "held_out.json").unlink(missing_ok=True)
    result, _ = measured(load(f"{run}/config.yaml", few), run, torch.device("cpu"))
    assert result["asked"] == "train"
    assert {r["images"] for r in result["figures"] if r["task"] in ("kNN", "linear probe", "clustering")} == {15}
    assert any("linear probe: trained on 15 of" in note for note in result["notes"])
    everything = [*few, "evaluate.queries=none"]
    result, _ = measured(load(f"{run}/config.yaml", everything), run, torch.device("cpu"))
    assert result["left out"] == []
    assert "are measured" not in " ".join(result["notes"])
