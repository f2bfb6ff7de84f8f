"""The comparison of three models: what it trains, what it prints and leaves, that it goes on, and what it refuses."""

import json
import re
from html.parser import HTMLParser

import pytest
import torch
from safetensors.torch import load_file
from trained import SMALL

from sslcells import compare as module
from sslcells.cli import main
from sslcells.compare import compare, plan
from sslcells.config import ConfigError, load
from sslcells.evaluation.classifier import read_predictions
from sslcells.models import files
from sslcells.plan import open_run

TINY = [
    *SMALL,
    "method.hidden=16",
    "train.global_batch=16",
    "train.total_steps=4",
    "train.workers=0",
    "evaluate.k=5",
    "evaluate.pictures=false",
    "compare.fractions=[0.5,1]",
    "compare.seeds=2",
    "compare.min_steps=2",
    "compare.total_epochs=1",
    "compare.global_batch=16",
]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    run = load(None, [*TINY, f"out={tmp_path_factory.mktemp('compare')}"])
    return run, compare(run)


def test_every_model_fraction_and_seed_is_one_run_of_its_own(compared):
    run, result = compared
    folders = sorted(path.name for path in (run.folder / "compare").iterdir())
    assert len(folders) == 3 * 2 * 2
    assert [(row["fraction"], row["model"]) for row in result["models"]] == [
        (fraction, model) for fraction in (0.5, 1.0) for model in ("supervised", "probe", "fine-tuned")
    ]
    for row in result["models"]:
        folders = [run.folder / "compare" / f"{row['model']}_{row['fraction']:g}_{s}" for s in (0, 1)]
        said = [read_predictions(folder, "test") for folder in folders]
        assert all(name.startswith("synthetic/test/") for words in said for name in words.names)
        right = [(w.probabilities.argmax(1) == w.labels).double().mean().item() for w in said]
        assert row["scores"]["accuracy"]["mean"] == pytest.approx(sum(right) / 2)


def test_it_leaves_a_page_with_table_and_pictures(compared):
    run, _ = compared
    page = (run.folder / "comparison.html").read_text(encoding="utf-8")
    HTMLParser().feed(page)
    assert page.count("data:image/png;base64,") == 3
    assert "fine-tuned" in page
    assert page.index("<h2>In short") < page.index("data:image/png") < page.index("<h2>The models")
    assert json.loads((run.folder / "comparison.json").read_text(encoding="utf-8"))["seeds"] == 2


def test_what_is_done_is_not_done_again(compared, monkeypatch):
    run, result = compared
    monkeypatch.setattr(module, "train", lambda run: pytest.fail(f"{run.name} was trained again"))
    assert compare(run)["models"] == result["models"]


def test_evaluate_shows_the_fine_tuned(compared, capsys):
    run, _ = compared
    assert main(None, ["evaluate", "--fine-tune", str(run.folder), "evaluate.bootstrap=100"]) == 0
    rows = json.loads((run.folder / "evaluation.json").read_text(encoding="utf-8"))["figures"]
    tuned = [row["name"] for row in rows if row["task"] == "fine-tuning"]
    assert tuned == ["50 % of the labels, 2 seeds", "100 % of the labels, 2 seeds"]
    out = capsys.readouterr().out
    assert "between" in out
    assert "global batch" not in out  # nothing was trained again


@pytest.mark.slow
@pytest.mark.parametrize("adapted", [{"lora_rank": 2}, {"freeze": 2}], ids=["lora", "freeze"])
def test_the_fine_tuned_may_be_adapted_in_part(adapted, tmp_path):
    vit = ["model.backbone=test_vit", "model.args={img_size: 24, patch_size: 8}", "compare.seeds=1"]
    part = f"compare.fine_tuned={json.dumps({'model': adapted})}"
    run = load(None, [*TINY, "augment.size=24", *vit, part, "compare.fractions=[1]", f"out={tmp_path}"])
    models = {row["model"]: row for row in compare(run)["models"]}
    assert models["fine-tuned"]["scores"]["accuracy"]["mean"] is not None
    start, tuned = (load_file(folder / files.WEIGHTS) for folder in (run.folder, run.folder / "compare/fine-tuned_1_0"))
    moved = {name for name in start if not torch.equal(start[name], tuned[name])}
    assert start.keys() == tuned.keys()
    if "lora_rank" in adapted:
        assert moved == {name for name in start if re.search(r"blocks\..*(qkv|proj|fc1|fc2)\.weight", name)}
    else:
        assert moved
        assert not any(name.startswith(("patch_embed", "pos_embed", "blocks.0.")) for name in moved)


def test_sections_reach_the_models_they_are_for(tmp_path):
    changes = ["compare.classifier.method.loss=focal", "compare.supervised.optim.lr=0.5", "compare.seeds=1"]
    run = load(None, [*TINY, *changes, f"out={tmp_path}"])
    parts = {part.model: part.run for part in plan(run, open_run(run), module.MODELS)}
    assert {r.method.loss for r in parts.values()} == {"focal"}
    assert parts["supervised"].optim.lr == 0.5 != parts["probe"].optim.lr
    assert [r.model.freeze for r in parts.values()] == [False, True, False]
    assert [r.model.encoder for r in parts.values()] == [None, str(run.folder), str(run.folder)]
    assert parts["fine-tuned"].optim.encoder_scale == 0.3
    assert [r.method.standardise for r in parts.values()] == [False, True, False]
    assert [r.augment.recipe for r in parts.values()] == ["cells", "none", "cells"]
    assert {r.augment.size for r in parts.values()} == {32}
    assert len({r.train.total_steps for r in parts.values()}) == 1


def test_it_says_what_the_supervised_model_starts_from(tmp_path):
    """It was called from scratch where it starts from published weights, as the run itself does."""
    run = load(None, [*TINY, "model.pretrained=true", "compare.seeds=1", f"out={tmp_path}"])
    of_weights = list(plan(run, open_run(run), module.MODELS))
    assert module.starts(of_weights) == module.MODELS | {"supervised": f"from {run.model.backbone}"}
    scratch = load(None, [*TINY, "compare.seeds=1", f"out={tmp_path}"])
    assert module.starts(list(plan(scratch, open_run(scratch), module.MODELS))) == module.MODELS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["compare.classifier.method.los=focal"], r"the supervised model: .*method\.los='focal'.*method\.loss"),
        (["data.test=0", "evaluate.split=test"], r"evaluate\.split=test: the data has only train, val"),
    ],
)
def test_mistakes_are_named_before_anything_is_trained(tmp_path, changes, message, monkeypatch):
    monkeypatch.setattr(module, "train", lambda run: pytest.fail("nothing should be trained"))
    run = load(None, [*TINY, *changes, f"out={tmp_path}"])
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        compare(run)


def test_where_the_split_has_one_class_there_is_no_ranking(compared, monkeypatch, capsys):
    """The AUROC does not exist then; the file says so in JSON's words."""
    run, _ = compared
    real = module.predict

    def of_one_class(*arguments):
        said = real(*arguments)
        return said._replace(labels=said.labels * 0)

    monkeypatch.setattr(module, "predict", of_one_class)
    scores = compare(run)["models"][0]["scores"]
    assert scores["AUROC"] == {"mean": None, "sd": None}
    assert scores["accuracy"]["mean"] is not None
    assert "–" in capsys.readouterr().out
    assert "NaN" not in (run.folder / "comparison.json").read_text(encoding="utf-8")


def test_fine_tuning_needs_a_finished_run(tmp_path, capsys):
    assert main(None, ["evaluate", "--fine-tune", str(tmp_path)]) == 2
    assert "is not the folder of a finished run" in capsys.readouterr().err


def test_the_batch_is_no_larger_than_the_part_of_the_labels(tmp_path):
    """Of 60 images in 5 classes 0.21 is 3 of each class, 15, and not 13."""
    run = load(None, [*TINY, "compare.fractions=[0.21]", f"out={tmp_path}"])
    assert {part.run.train.global_batch for part in plan(run, open_run(run), ["supervised"])} == {15}


def test_a_model_may_have_another_precision(tmp_path, capsys):
    few = ["compare.supervised.train.precision=bf16", "compare.fractions=[1]", "compare.seeds=1"]
    compare(load(None, [*TINY, *few, f"out={tmp_path}"]))
    lines = [line for line in capsys.readouterr().out.splitlines() if "precision" in line]
    assert [("bf16" in line) for line in lines] == [False, True, False, False]  # the run, then the three models
