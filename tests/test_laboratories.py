"""docs/laboratories.md: its commands are understood as they stand, and its settings exist."""

import re

import pytest
from pages import DOCS, blocks

from sslcells.arguments import arguments
from sslcells.augment import cells_across
from sslcells.config import Standardise, load

FILE = DOCS / "laboratories.md"
PAGE = FILE.read_text(encoding="utf-8")
COMMANDS = [words for block in blocks(FILE) if block.language == "bash" for words in block.commands]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_the_commands_of_the_page_are_understood(words):
    """Options by the parser, and a recipe's settings by its sections."""
    launched = words[:3] == ["accelerate", "launch", "-m"]
    assert launched or words[0] == "sslcells"
    args = arguments(None, [words[3].removeprefix("sslcells."), *words[4:]] if launched else words[1:])
    if args.command in ("train", "compare"):
        load(args.config, args.overrides)


def test_the_settings_of_the_page_exist():
    named = re.findall(r"`(standardise|augment)\.(\w+)", PAGE)
    fields = {"standardise": {*Standardise.model_fields, "labs"}, "augment": {*cells_across.Config.model_fields}}
    assert len(named) > 20
    assert not [f"{section}.{key}" for section, key in named if key not in fields[section]]
