"""A notebook as a page of the site: its text and its code, without outputs."""

import json
from pathlib import Path


def page(file: Path) -> str:
    """Markdown of a notebook, with a link to the file."""
    cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
    title, *rest = (_shown(cell) for cell in cells)
    link = f"*A notebook: [{file.name}]({file.name}) is the file to run; its pictures appear when it is run.*"
    head, _, text = title.partition("\n")
    return "\n\n".join([head, link, text.strip(), *rest]) + "\n"


def _shown(cell: dict[str, list[str] | str]) -> str:
    text = "".join(cell["source"])
    return text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```"
