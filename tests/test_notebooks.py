"""The notebooks of docs/notebooks: clean in git and short; each runs whole and shows the pictures that it promises."""

import copy
import json
import os
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))
PICTURE = "picture"
"""Tag of a cell that must show one."""
NEEDS = {"anndata_umap": ("anndata", "umap")}
"""Extras without which a notebook says what to install."""


def opened(file):
    return json.loads(file.read_text(encoding="utf-8"))


def faults(notebook):
    """What should not be in a committed notebook."""
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    found = [f"cell {cell['id']} was saved as it ran" for cell in code if cell["outputs"] or cell["execution_count"]]
    found += [f"cell {cell['id']} has more than 20 lines" for cell in code if len(cell["source"]) > 20]
    if not any(PICTURE in cell["metadata"].get("tags", ()) for cell in code):
        found.append("no cell promises a picture")
    if {*notebook["metadata"]} != {"kernelspec", "language_info"} or len(notebook["metadata"]["language_info"]) > 1:
        found.append("its metadata says who ran it")
    return found


def shown(notebook):
    """Of a notebook that was run, what its cells should not have shown, or lack."""
    found = []
    for cell in notebook["cells"]:
        outputs = cell.get("outputs", ())
        found += [f"{cell['id']}: {o['text']}" for o in outputs if o.get("name") == "stderr"]
        pictures = [o for o in outputs if "image/png" in o.get("data", ())]
        if PICTURE in cell["metadata"].get("tags", ()) and not pictures:
            found.append(f"{cell['id']}: no picture")
    return found


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_the_notebook_is_clean(file):
    notebook = opened(file)
    assert notebook["nbformat"] == 4
    assert not faults(notebook)
    assert notebook["cells"][0]["source"][0].startswith("# ")
    page = (DOCS / "notebooks.md").read_text(encoding="utf-8")
    assert f"(notebooks/{file.name})" in page
    assert f"notebooks/{file.stem}.md" in (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8")


def test_a_notebook_that_was_saved_with_its_outputs_is_seen():
    notebook = opened(NOTEBOOKS[0])
    ran = copy.deepcopy(notebook)
    cell = next(cell for cell in ran["cells"] if PICTURE in cell["metadata"].get("tags", ()))
    cell["outputs"] = [{"output_type": "stream", "name": "stderr", "text": "a warning"}]
    assert len(faults(ran)) == 1
    said = shown(ran)
    assert f"{cell['id']}: a warning" in said
    assert f"{cell['id']}: no picture" in said
    cell["outputs"] = [{"output_type": "display_data", "data": {"image/png": ""}, "metadata": {}}]
    assert not [line for line in shown(ran) if line.startswith(cell["id"])]


@pytest.mark.slow
@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_the_notebook_runs_whole(file, tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    for package in NEEDS.get(file.stem, ()):
        pytest.importorskip(package)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(DOCS.parent), *sys.path]))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    work = tmp_path / "work"
    work.mkdir()
    notebook = nbformat.read(file, as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(work)}}
    ).execute()
    assert not shown(notebook)
