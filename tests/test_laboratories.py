"""docs/laboratories.md: its commands are understood as they stand, and its settings exist."""

import re
import shlex
from pathlib import Path

import pytest

from sslcells.arguments import arguments
from sslcells.augment import cells_across
from sslcells.config import Standardise, load

PAGE = (Path(__file__).parent.parent / "docs" / "laboratories.md").read_text(encoding="utf-8")
LINES = "\n".join(re.findall(r"```bash\n(.*?)```", PAGE, re.S)).splitlines()
COMMANDS = [line.strip() for line in LINES if line.strip()]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_of_the_page_are_understood(command):
    """Options by the parser, and a recipe's settings by its sections."""
    words = shlex.split(command)
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
