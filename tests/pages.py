"""The blocks of the documentation's pages, and how the tests run them.

A comment before a block says what the tests do with it:

    <!-- not run: why -->        nothing
    <!-- run with: words -->     these words are added to its commands that take settings; training is then really run

Without a comment every command runs as it stands; only `train` without --check or --debug is run with --check.
"""

import contextlib
import io
import re
import shlex
import time
from pathlib import Path
from typing import Any, NamedTuple

from accelerate.state import AcceleratorState, GradientState

from sslcells import cli

DOCS = Path(__file__).parent.parent / "docs"
LANGUAGES = {"bash", "python", "text", "console", "yaml"}
"""`text` after a bash block is a part of what that block prints; `console` and `yaml` are shown only"""
FENCE = re.compile(
    r"(?:^[ ]*<!--[ ](?P<kind>not[ ]run|run[ ]with):[ ](?P<words>[^\n]*?)[ ]-->\n)?"
    r"^(?P<indent>[ ]*)```(?P<language>[^\n]*)\n(?P<code>.*?)^[ ]*```[ ]*$",
    re.M | re.S | re.X,
)


class Block(NamedTuple):
    """A block of code of a page."""

    page: str
    line: int
    language: str
    code: str
    not_run: str
    """why it is not run; empty if it is"""
    run_with: str
    """what its commands that take settings get in addition"""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def commands(self) -> list[list[str]]:
        """The words of each command of a bash block."""
        lines = self.code.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]


class Ran(NamedTuple):
    """A block that was run."""

    block: Block
    printed: str
    seconds: float


def pages() -> list[Path]:
    """Every page that is written by hand."""
    return sorted(DOCS.glob("*.md"))


def blocks(page: Path) -> list[Block]:
    """The blocks of a page, in their order."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        said = {match["kind"]: match["words"]}
        code = "".join(line.removeprefix(match["indent"]) for line in match["code"].splitlines(keepends=True))
        line = text.count("\n", 0, match.start("language")) + 1
        found.append(Block(page.name, line, match["language"], code, said.get("not run", ""), said.get("run with", "")))
    return found


def run_page(page: Path) -> list[Ran]:
    """Run the blocks of a page in the current folder; returns those that ran. A block that fails raises."""
    space, printed, ran = dict[str, Any](), "", []
    for block in blocks(page):
        if block.language == "text" and printed:
            check_printed(block, printed)
        if block.not_run or block.language not in ("bash", "python"):
            continue
        began = time.perf_counter()
        printed = run_bash(block) if block.language == "bash" else run_python(block, space)
        ran.append(Ran(block, printed, time.perf_counter() - began))
    return ran


def run_python(block: Block, space: dict[str, Any]) -> str:
    """Run the code in the page's own namespace; returns what it printed."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(block.code, str(block), "exec"), space)
    return out.getvalue()


def run_bash(block: Block) -> str:
    """Run every command in this process, which saves the seconds of importing torch; returns what they printed."""
    out = io.StringIO()
    for words in block.commands:
        argv = arguments(words, block.run_with.split())
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            status = cli.main(None, argv)
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        assert status == 0, f"{block}: {shlex.join(words)} ended with {status}:\n{out.getvalue()[-3000:]}"
    return out.getvalue()


def arguments(words: list[str], run_with: list[str]) -> list[str]:
    """What a command line of a page gives to `sslcells`, and what the tests add.

    Raises:
        ValueError: for another program; a page says why the tests do not run it.
    """
    if words[0] == "sslcells":
        argv = words[1:]
    elif words[:2] == ["accelerate", "launch"] or words[0] == "python":
        _, *argv = words[words.index("-m") :]
        argv = argv[1:] if argv[0] == "sslcells" else [argv[0].removeprefix("sslcells."), *argv[1:]]
    else:
        raise ValueError(f"{shlex.join(words)}: no command of sslcells; a comment must say why it is not run")
    if argv[0] == "train" and not run_with and not {"--check", "--debug"} & {*argv}:
        return [*argv, "--check"]
    return [*argv, *run_with] if argv[0] in ("train", "evaluate", "compare") else argv


def check_printed(block: Block, printed: str) -> None:
    """Each line of the block was printed, whatever its numbers; `…` stands for lines, or for the rest of one."""
    known = [_masked(line) for line in printed.splitlines()]
    for line in block.code.splitlines():
        shown = _masked(line.removesuffix("…"))
        if shown:
            assert any(shown in of for of in known), f"{block}: not printed: {line}\nbut:\n{printed[-3000:]}"


def _masked(line: str) -> str:
    return " ".join(re.sub(r"\d+(?:[.,:]\d+)*", "#", line).split())
