"""Every method with its paper, settings, recipes and figures: from the code, the recipes and the results."""

import importlib
from pathlib import Path
from typing import NamedTuple

import yaml
from markdown.extensions.toc import slugify
from settings import described, linked, table

from sslcells import shipped
from sslcells.config import PLUGINS

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "RESULTS.md"
MEASURED = {"kNN", "accuracy"}
"""Tables with one of these columns tell how good an encoder is."""
HEAD = ("command", "hardware", "time", "figure")


class Measured(NamedTuple):
    """Rows of one table of the results that are about one method."""

    section: str
    """its heading, which names the commit"""
    columns: list[str]
    rows: list[list[str]]


def methods() -> str:
    """A section a method."""
    used = _recipes()
    parts = []
    for name in PLUGINS["method"].names():
        module = importlib.import_module(f"sslcells.methods.{name}")
        parts += [f"## {name}", linked(described(module)), f"`method.name={name}`"]
        parts.append(table(module.Config, "method.", ["name"]) or "It has no settings.")
        if used.get(name):
            parts.append("Recipes: " + ", ".join(f"[`{r}`](recipes.md#{r})" for r in used[name]) + ".")
        found = measured(name)
        parts += [_shown(one) for one in found] or ["Not yet measured."]
    return "\n\n".join(parts)


def recipes() -> str:
    """A section a recipe: what it is, and its command, hardware, time and figure."""
    parts = []
    for name, file in shipped.recipes().items():
        head, about = headed(file)
        parts += [f"## {name}", linked(about)]
        parts.append("\n".join(["| | |", "|---|---|", *(f"| {k} | {_value(k, v)} |" for k, v in head.items())]))
    return "\n\n".join(parts)


def headed(file: Path) -> tuple[dict[str, str], str]:
    """What the comment at the head of a recipe says: the facts of HEAD, and the text after them."""
    facts, about, key = dict[str, str](), list[str](), ""
    for line in file.read_text(encoding="utf-8").split("\n\n")[0].splitlines():
        text = line.removeprefix("#")
        word = text.strip().partition(":")[0]
        if word in HEAD and word not in facts:
            key = word
            facts[key] = text.partition(":")[2].strip()
        elif text.startswith("   ") and key and not about:
            facts[key] += " " + text.strip()
        else:
            about.append(text.strip())
    return facts, " ".join(about)


def measured(method: str) -> list[Measured]:
    """The rows of benchmarks/RESULTS.md whose name is the method's, or starts with it and `_`."""
    found, section, columns = list[Measured](), "", list[str]()
    for line in RESULTS.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            section = line.removeprefix("## ")
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if not cells:
            columns = []
        elif not columns:
            columns = cells
        elif MEASURED & {*columns} and any(c == method or c.startswith(f"{method}_") for c in cells[:2]):
            if not found or (found[-1].section, found[-1].columns) != (section, columns):
                found.append(Measured(section, columns, []))
            found[-1].rows.append(cells)
    return found


def _shown(of: Measured) -> str:
    lines = [of.columns, ["---"] * len(of.columns), *of.rows]
    link = f"[{of.section}](results.md#{slugify(of.section, '-')})"
    return f"{link}:\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _recipes() -> dict[str, list[str]]:
    """Method → the recipes that use it."""
    used = dict[str, list[str]]()
    for name, file in shipped.recipes().items():
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
        method = (config.get("method") or {}).get("name", PLUGINS["method"].default)
        used.setdefault(method, []).append(name)
    return used


def _value(key: str, text: str) -> str:
    text = text.replace("|", "\\|")
    return f"`{text}`" if key == "command" else linked(text)
