"""The documentation: every block of every page runs on drawn data, and every setting is on its page."""

import re
import sys

import pytest
from drawn_lab import draw_what_pages_name
from pages import DOCS, LANGUAGES, blocks, check_printed, pages, run_bash, run_page
from pydantic import BaseModel

from sslcells.config import PLUGINS, Run

sys.path.insert(0, str(DOCS / "generate"))
import settings

ELSEWHERE = {"laboratories.md": "tests/test_laboratories.py"}
"""Pages whose commands another test runs, with laboratories of its own."""
WALK = ["train --check", "train --debug", "train", "runs", "evaluate", "embed", "search", "export"]
"""The commands of the first hour, in their order."""
LEFT = [
    *("config.yaml", "metrics.jsonl", "encoder.safetensors", "encoder.json", "checkpoints"),
    *("evaluation.json", "report.html", "embeddings/cells/search/neighbours.png", "export/README.md"),
]
"""What it leaves in the run's folder."""
ROOT = DOCS.parent


def test_every_page_is_in_the_navigation():
    names = re.findall(r"[\w.]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2])
    assert {page.name for page in pages()} <= {*names}


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_every_block_says_what_it_is(page):
    for block in blocks(page):
        assert block.language in LANGUAGES, f"{block}: ```{block.language}"
        if block.language == "bash" and not block.not_run:
            assert block.commands, block
    text = page.read_text(encoding="utf-8")
    assert text.count("```") == 2 * len(blocks(page))
    assert not re.search(r"^    (sslcells|accelerate|bash|python|pip) ", text, re.M), "an indented block is not run"


def test_a_command_that_fails_is_seen(tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    page.write_text("<!-- not run: no -->\n```bash\nsslcells no\n```\n\n```bash\nsslcells recipes nothing\n```\n")
    first, second = blocks(page)
    assert (first.not_run, second.not_run) == ("no", "")
    with pytest.raises(AssertionError, match=r"page.md:6: recipes nothing ended with 2|ended with 2"):
        run_bash(second)


def test_a_line_that_is_not_printed_is_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```text\n3 images…\n…\ntotal 1.5 s\n```\n")
    (block,) = blocks(page)
    check_printed(block, "4 images of 2\nmore\ntotal  12 s\n")
    with pytest.raises(AssertionError, match="not printed: total"):
        check_printed(block, "4 images of 2\n")
    with pytest.raises(AssertionError, match="not printed: 3 images…"):
        check_printed(block, "4 cells\ntotal 1 s\n")


@pytest.mark.parametrize("section", PLUGINS)
def test_every_setting_of_a_choice_is_on_its_page(section):
    text = settings.plugin(section)
    for choice in PLUGINS[section].names():
        part = text.split(f"`{section}.{PLUGINS[section].key}={choice}`")[1].split("\n## ")[0]
        for name, field in PLUGINS[section].config(choice).model_fields.items():
            inner = isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
            if name != PLUGINS[section].key:
                assert f"| `{section}.{name}{'.' if inner else '` |'}" in part, (choice, name)


def test_every_setting_is_on_the_page_with_its_default():
    text = settings.general()
    for name, field in Run.model_fields.items():
        if name in PLUGINS:
            continue
        kind = field.annotation
        section = kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None
        keys = [f"{name}.{key}" for key in section.model_fields] if section else [name]
        for key in keys:
            assert text.count(f"| `{key}` | ") == 1, key
    assert "| `optim.lr` | `0.002` | number > 0 | Peak learning rate." in text
    assert "| `model.weights` | `none` | text, `none` | Start from published weights" in text


def test_every_setting_has_a_meaning():
    shown = settings.general() + "".join(settings.plugin(section) for section in PLUGINS)
    assert not re.findall(r"^\| `[^`]+` \|.*\|  \|$", shown, re.M)


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_every_setting_that_a_page_names_is_there(page):
    known = {name: _keys(name) for name in Run.model_fields}
    named = re.findall(rf"(?<![\w./])({'|'.join(known)})\.(\w+)", page.read_text(encoding="utf-8"))
    assert not [f"{section}.{key}" for section, key in named if key not in known[section] | ALSO]


ALSO = {"safetensors", "sh", "lrr", "temprature", "labs"}
"""two files, two mistakes that a page shows, and what encoder.json calls standardise.labs"""


def _keys(section):
    """The keys of a section, of every choice of it."""
    if section in PLUGINS:
        return {key for name in PLUGINS[section].names() for key in PLUGINS[section].config(name).model_fields}
    return {*getattr(Run.model_fields[section].annotation, "model_fields", {})}


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """A new folder in which the first hour has been run, and what ran."""
    folder = tmp_path_factory.mktemp("lab")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        ran = run_page(DOCS / "first_hour.md")
        yield folder, ran


@pytest.fixture(scope="module")
def lab(walked):
    """The folder of the first hour: drawn images, a trained run, and what the other pages name."""
    draw_what_pages_name(walked[0])
    return walked[0]


@pytest.mark.slow
def test_a_strangers_walk_through_the_first_hour(walked):
    """From a folder to an export, in this order; `run_page` looks for what the page says each command prints."""
    folder, ran = walked
    commands = [one for one in ran if one.block.language == "bash"]
    for block, printed, seconds in ran:
        print(f"{seconds:6.1f} s  {block}  {block.code.splitlines()[0]}")
        assert printed or block.language == "python", block
    assert [kind(one.block.commands) for one in commands] == WALK
    assert not [name for name in LEFT if not (folder / "runs/my_cells" / name).exists()]
    shown = [block.line for block in blocks(DOCS / "first_hour.md") if block.language == "text"]
    assert len(shown) == len(WALK)


def kind(commands):
    """The only command of a block: what it does, and whether it only looks."""
    (words,) = commands
    looks = [word for word in words if word in ("--check", "--debug")]
    return " ".join([words[1] if words[0] == "sslcells" else words[3].removeprefix("sslcells."), *looks])


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in pages() if p.name != "first_hour.md"], ids=lambda page: page.name)
def test_the_blocks_of_the_page_run(lab, page):
    if page.name in ELSEWHERE:
        pytest.skip(f"{ELSEWHERE[page.name]} runs the commands of {page.name}")
    run_page(page)
