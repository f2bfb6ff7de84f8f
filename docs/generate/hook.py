"""MkDocs hook: fills in what is generated from the code, and adds the pages that lie elsewhere in the tree."""

import re
from pathlib import Path
from typing import Any

import commands
import diagrams
import methods
import notebooks
import settings
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
ELSEWHERE = {"results.md": "benchmarks/RESULTS.md", "contributing.md": "CONTRIBUTING.md", "changes.md": "CHANGELOG.md"}
"""Page of the site → file of the tree."""
GENERATED = {
    "settings": settings.general,
    "settings of data": lambda: settings.plugin("data"),
    "settings of augment": lambda: settings.plugin("augment"),
    "methods": methods.methods,
    "recipes": methods.recipes,
    "commands": commands.commands,
    "diagram of a step": diagrams.step,
    "diagram of ranks": diagrams.ranks,
    "diagram of micro-batches": diagrams.micro_batches,
    "diagram of files": diagrams.files,
    "diagram of floors": diagrams.floors,
}
"""Word of a marker `<!-- generated: … -->` → what takes its place."""
_FOR_TESTS = re.compile(r"^ *<!-- (?:not run|run with): .*? -->\n", re.M)
"""Says to the tests what to do with the block after it: tests/pages.py."""
_LOADED = re.compile(
    r"<(?:script|img|iframe)[^>]+src=\"(https?:[^\"]+)|<link[^>]+rel=\"stylesheet\"[^>]+href=\"(https?:[^\"]+)"
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie elsewhere in the tree."""
    for name, source in ELSEWHERE.items():
        files.append(File.generated(config, name, content=(ROOT / source).read_text(encoding="utf-8")))
    for file in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        files.append(File.generated(config, f"notebooks/{file.stem}.md", content=notebooks.page(file)))
    return files


def on_page_markdown(markdown: str, page: Page, **rest: Any) -> str:
    """Replace markers, and links to files of the tree by links to their pages."""
    for name, source in ELSEWHERE.items():
        markdown = re.sub(rf"\]\((\.\./)?{re.escape(source)}(?=[)#])", f"]({name}", markdown)
    return filled(indented(_FOR_TESTS.sub("", markdown)), page.file.src_uri)


def on_post_build(config: MkDocsConfig) -> None:
    """Refuse a page that would load anything from another host: the site works without a network."""
    for file in sorted(Path(config.site_dir).rglob("*.html")):
        if found := _LOADED.search(file.read_text(encoding="utf-8")):
            raise PluginError(f"{file.name} loads {found[1] or found[2]}, which needs a network")


def indented(markdown: str) -> str:
    """Text of numbered lists with four spaces before it, not three: Python-Markdown needs them."""
    fence, lines = False, []
    for line in markdown.split("\n"):
        fence ^= line.startswith("```")
        lines.append(f" {line}" if line.startswith("   ") and not fence else line)
    return "\n".join(lines)


def filled(markdown: str, where: str) -> str:
    """Markdown with what its markers stand for.

    Raises:
        PluginError: for a marker that is not known.
    """

    def text(marker: re.Match[str]) -> str:
        if marker[1] not in GENERATED:
            raise PluginError(f"{where}: <!-- generated: {marker[1]} --> is not known; known: {', '.join(GENERATED)}")
        return GENERATED[marker[1]]()

    return re.sub(r"<!-- generated: (.*?) -->", text, markdown)
