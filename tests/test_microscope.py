"""From fields and masks to embeddings, by the lines of docs/fields.md: 200 drawn fields of two magnifications."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from drawn_fields import SCALES, WIDTH, draw_fields

from sslcells.data import open_split, table

PAGE = (Path(__file__).parent.parent / "docs" / "fields.md").read_text(encoding="utf-8")
LINES = re.findall(r"```bash\n(sslcells cells .*?)```", PAGE, re.S)[0].strip().splitlines()
SHORTER = [
    "model.backbone=small_cnn",
    "model.args={width: 16}",
    "train.global_batch=64",
    "train.total_epochs=6",
    "train.workers=0",
]
"""what the test trains, in place of minutes on a GPU"""


def run(line: str, folder: Path) -> str:
    """Run a line of the page, and return what it printed."""
    program, command, *words = shlex.split(line)
    assert program == "sslcells"
    more = SHORTER if command == "train" else []
    call = [sys.executable, "-m", program, command, *words, *more]
    done = subprocess.run(call, cwd=folder, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_page_has_five_lines():
    assert [line.split()[1] for line in LINES] == ["cells", "split", "train", "evaluate", "embed"]


@pytest.mark.slow
def test_from_the_microscope_to_embeddings(tmp_path):
    fields = draw_fields(tmp_path)
    for line in LINES:
        run(line, tmp_path)

    cells = pq.read_table(tmp_path / "cells/cells.parquet")
    rows = cells.to_pylist()
    of_field = {}
    for row in rows:
        of_field.setdefault(row["field"], []).append(row)
    assert {*of_field} == {field.path for field in fields}
    for field in fields:
        found = of_field[field.path]
        assert {(r["donor"], r["site"], r["label"], r["um_per_pixel"]) for r in found} == {
            (field.donor, field.site, field.label, field.um)
        }
        assert len(found) == len(field.cells)
        for row, cell in zip(found, field.cells, strict=True):
            drawn = np.array([cell.x, cell.y])
            assert np.abs(np.array([row["centroid_x"], row["centroid_y"]]) * field.um - drawn).max() < field.um / 2
            assert row["area_um2"] == pytest.approx(np.pi * cell.radius**2, rel=0.1)

    split = pq.read_table(tmp_path / "cells/cells_split.parquet").to_pydict()
    of_donor = {}
    for donor, part in zip(split["donor"], split["split"], strict=True):
        of_donor.setdefault(donor, set()).add(part)
    assert sorted(map(sorted, of_donor.values())) == [["test"], ["train"], ["val"]]

    out = next((tmp_path / "runs").iterdir())
    how = json.loads((out / "encoder.json").read_text())["reading"]
    assert (how["um_per_pixel"], how["size"]) == (0.5, [32, 32])
    figures = json.loads((out / "evaluation.json").read_text())["figures"]
    neighbours = next(f for f in figures if (f["task"], f["name"], f["unit"]) == ("kNN", "k = 5", "image"))
    assert neighbours["images"] == sum(part == "test" for part in split["split"])
    assert neighbours["scores"]["accuracy"]["value"] > 0.9  # of a donor that no encoder has seen

    embedded = pa.concat_tables(pq.read_table(file) for file in sorted((out / "embeddings").glob("*/*.parquet")))
    known = {row["cell_id"]: (row["path"], row["donor"], row["site"]) for row in rows}
    columns = (embedded[name].to_pylist() for name in ("cell_id", "path", "donor", "site"))
    assert {cell: (path.partition("#")[0], *of) for cell, path, *of in zip(*columns, strict=True)} == known
    assert embedded.num_rows == len(rows)


def test_both_magnifications_show_the_same(tmp_path):
    """A drawn cell has the same size in the images that are trained on, whichever objective it was drawn for."""
    fields = draw_fields(tmp_path, 8)
    run(LINES[0], tmp_path)
    config = table.Config(table=str(tmp_path / "cells/cells.parquet"), channels=1, um_per_pixel=0.5, size=32)
    images = open_split(config, "train")
    radii = {row["cell_id"]: row for row in pq.read_table(tmp_path / "cells/cells.parquet").to_pylist()}
    drawn = {f.path: f for f in fields}
    gaps = {um: [] for um in SCALES}
    for i in range(len(images)):
        row = radii[images.name(i).partition("#")[2]]
        field = drawn[row["field"]]
        centre = row["centroid_y"] * field.um, row["centroid_x"] * field.um
        cell = min(field.cells, key=lambda c, at=centre: np.hypot(c.y - at[0], c.x - at[1]))
        y, x = (np.mgrid[:32, :32] + 0.5 - 16) * 0.5
        near = images.pixels(i)[0].numpy().astype(float) * (np.hypot(y, x) < 6.5)
        radius = np.sqrt((near > 60).sum() / np.pi) * 0.5
        gaps[field.um].append(radius - cell.radius)
    means = [np.mean(gap) for gap in gaps.values()]
    assert all(len(gap) > 8 for gap in gaps.values())
    assert abs(means[0] - means[1]) < 0.25  # half a pixel
    assert WIDTH / SCALES[0] == 112
