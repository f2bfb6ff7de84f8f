"""docs/laboratories.md: its commands are understood as they stand, and run in a row; its settings exist."""

import json
import re
import shlex
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState
from drawn_laboratories import draw_laboratories
from pages import DOCS, blocks

from sslcells.arguments import arguments
from sslcells.augment import cells_across
from sslcells.cli import main
from sslcells.config import Standardise, load

FILE = DOCS / "laboratories.md"
PAGE = FILE.read_text(encoding="utf-8")
COMMANDS = [words for block in blocks(FILE) if block.language == "bash" for words in block.commands]
TINY = [
    *("model.backbone=small_cnn", "model.args={width: 8}", "augment.size=24", "augment.min_scale=0.5"),
    *("train.global_batch=8", "train.total_steps=2", "train.workers=0", "train.precision=no", "augment.bank=8"),
    *("optim.warmup_epochs=0", "evaluate.bootstrap=100", "evaluate.k=5"),
]
CHEAPER = {
    "train": TINY,
    "evaluate": ["evaluate.bootstrap=100", "train.workers=0"],
    "embed": ["--workers", "0"],
    "search": [],
    "export": ["--no-onnx"],
}
"""What makes each command short, behind what the page says; `compare` is run by tests/test_compare_frozen.py."""
ONE_LAB = "clinic=path/to/clinic"
"""Last word of an `evaluate` that is left out: another one asks about this laboratory too."""


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_the_commands_of_the_page_are_understood(words):
    """Options by the parser, and a recipe's settings by its sections."""
    args = arguments(None, asked(words))
    if args.command in ("train", "compare"):
        load(args.config, args.overrides)


def asked(words):
    """A command's words without what launches it."""
    launched = words[:3] == ["accelerate", "launch", "-m"]
    assert launched or words[0] == "sslcells"
    return [words[3].removeprefix("sslcells."), *words[4:]] if launched else words[1:]


@pytest.mark.slow
def test_the_commands_of_the_page_run_in_a_row(tmp_path, monkeypatch, capsys):
    draw_laboratories(tmp_path)
    monkeypatch.chdir(tmp_path)
    run_here = [words for words in COMMANDS if asked(words)[0] != "compare" and words[-1] != ONE_LAB]
    for words in run_here:
        command, *rest = asked(words)
        assert main(None, [command, *rest, *CHEAPER[command]]) == 0, shlex.join(words)
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        if "--check" in words:
            assert "north" in capsys.readouterr().out
            assert not Path("runs").exists()
    assert {asked(words)[0] for words in run_here} == {*CHEAPER}
    run = Path("runs/across")
    for file in ("encoder.json", "plots/cells.png", "export/load.py", "export/standard.py"):
        assert (run / file).is_file(), file
    labs = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))["labs"]
    assert [lab["lab"] for lab in labs["labs"]] == ["north", "south", "clinic", "other"]
    assert "Across laboratories" in (run / "report.html").read_text(encoding="utf-8")
    assert list(Path("vectors").glob("*.parquet"))
    blood = json.loads(Path("runs/across_blood/evaluation.json").read_text(encoding="utf-8"))
    assert blood["asked"] == "test"
    assert {(row["images"], row["sources"]) for row in blood["figures"] if row["unit"] == "source vote"} == {(48, 16)}


def test_the_settings_of_the_page_exist():
    named = re.findall(r"`(standardise|augment)\.(\w+)", PAGE)
    fields = {"standardise": {*Standardise.model_fields, "labs"}, "augment": {*cells_across.Config.model_fields}}
    assert len(named) > 20
    assert not [f"{section}.{key}" for section, key in named if key not in fields[section]]
