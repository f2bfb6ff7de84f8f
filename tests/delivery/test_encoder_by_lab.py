"""An encoder that standardises by laboratory gives each image its laboratory's row, whatever makes the features."""

import importlib.util
import json
import shutil
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
import torch
from cells_drawn import stained
from PIL import Image
from trained import make_run

import sslcells
from sslcells.cli import main
from sslcells.config import Standardise
from sslcells.delivery import standalone
from sslcells.delivery.card import card
from sslcells.delivery.export import _write_standard
from sslcells.standardise import Standard, fit

LABS = {"north": {"lamp": (0.95, 0.85, 0.8), "density": 0.7}, "south": {"lamp": (0.75, 0.85, 0.9), "density": 1.3}}
STANDARD = {"colour": "two_point", "scale": "nucleus", "centre": True}
PLAIN = {"colour": "background", "scale": "none", "centre": False}
"""Without a search for the cell, which torch.export takes long to follow."""


def cells(lab, count=5):
    drawn = [stained(size=48, x=20 + i % 4, y=25, nucleus=5 + i % 3, cell=10, **lab)[0] for i in range(count)]
    return (torch.stack(drawn) * 255).round().byte()


def write(root, labs, count=5):
    for name, lab in labs.items():
        for i, x in enumerate(cells(lab, count)):
            (root / name / "blast").mkdir(parents=True, exist_ok=True)
            Image.fromarray(x.permute(1, 2, 0).numpy()).save(root / name / "blast" / f"{i}.png")
    return root


def standardised(folder, **changes):
    """A run's folder whose encoder standardises; `north` alone is known to it."""
    data = ["data.kind=folder", "data.path=x", "data.lab_folder=above", "data.size=[48,48]"]
    words = [f"standardise.{key}={str(value).lower()}" for key, value in (STANDARD | changes).items()]
    run = make_run(folder, *words, *(data if changes.get("by") == "lab" else []))
    x = cells(LABS["north"]).float() / 255
    spec = json.loads((run / "encoder.json").read_text())
    spec["standardise"] = fit(Standardise(**STANDARD | changes), x, {"north": [x]})
    (run / "encoder.json").write_text(json.dumps(spec))
    return run


@pytest.fixture
def by_lab(tmp_path):
    return standardised(tmp_path / "runs" / "by_lab", by="lab")


def by_hand(run, x, row):
    encoder = sslcells.load_encoder(run)
    standard = Standard(encoder.standard.spec)
    plain = Standard(Standardise().model_dump())
    encoder.standard = plain
    with torch.no_grad():
        return encoder(standard(x.float() / 255, row.expand(len(x), -1)))


def test_the_encoder_asks_for_the_laboratory(by_lab):
    encoder, x = sslcells.load_encoder(by_lab), cells(LABS["south"])
    with torch.no_grad():
        known = encoder(x, lab="north")
        new = encoder(x, lab=encoder.laboratory(x))
        mixed = encoder(x, lab=torch.stack([encoder.standard.row("north")] * 2 + [encoder.laboratory(x)] * 3))
    torch.testing.assert_close(known, by_hand(by_lab, x, encoder.standard.row("north")))
    torch.testing.assert_close(mixed, torch.cat([known[:2], new[2:]]), rtol=1e-5, atol=1e-5)
    assert (known - new).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"that of these images is not said: give lab=NAME \(known: north\)"):
        encoder(x)
    with pytest.raises(ValueError, match="laboratory 'nroth' was not measured: known are north"):
        encoder(x, lab="nroth")
    with pytest.raises(ValueError, match="several of its images, about a hundred; here is 1"):
        encoder.laboratory(x[:1])
    torch.testing.assert_close(sslcells.embed(x, encoder), new, rtol=1e-5, atol=1e-5)  # taken for a new laboratory
    with pytest.raises(ValueError, match="several of its images"):
        sslcells.embed(x[0], encoder)


def test_an_encoder_that_takes_each_image_alone_refuses_a_laboratory(tmp_path):
    encoder = sslcells.load_encoder(make_run(tmp_path / "run"))
    with pytest.raises(ValueError, match="lab= is for encoders that standardise by laboratory"):
        encoder(cells(LABS["north"]), lab="north")
    with pytest.raises(ValueError, match="does not standardise by laboratory"):
        encoder.laboratory(cells(LABS["north"]))


def rows(folder):
    table = pq.read_table(sorted(folder.glob("part-*.parquet")))
    return dict(zip(table["path"].to_pylist(), torch.tensor(table["vector"].to_pylist()), strict=True))


def test_embedding_a_folder_of_laboratories(by_lab, tmp_path, capsys):
    images, out = write(tmp_path / "cells", LABS), tmp_path / "out"
    assert main(None, ["embed", str(by_lab), str(images), "--out", str(out), "--workers", "0", "--cpu"]) == 0
    said = capsys.readouterr().out
    assert "north: standardised as in training" in said
    assert "south: standardised by 5 of its own images, without labels" in said
    encoder, found = sslcells.load_encoder(by_lab), rows(out)
    for name in LABS:
        x = cells(LABS[name])
        row = encoder.standard.row("north") if name == "north" else encoder.laboratory(x)
        want = by_hand(by_lab, x, row)
        got = torch.stack([found[f"{name}/blast/{i}.png"] for i in range(5)])
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_query_needs_its_laboratory(by_lab, tmp_path, capsys):
    images, out = write(tmp_path / "cells", LABS), tmp_path / "out"
    assert main(None, ["embed", str(by_lab), str(images), "--out", str(out), "--workers", "0", "--cpu"]) == 0
    query = ["search", str(out), str(images / "south" / "blast" / "2.png"), "--k", "2", "--cpu"]
    assert main(None, query) == 0  # embedded: its vector is there
    other = write(tmp_path / "other", {"east": LABS["south"]}, 1) / "east" / "blast" / "0.png"
    assert main(None, ["search", str(out), str(other), "--k", "2", "--cpu"]) == 2
    assert "that of this image is not said; --lab one of north, south" in capsys.readouterr().err
    assert main(None, ["search", str(out), str(other), "--k", "1", "--cpu", "--lab", "south"]) == 0
    assert "0.0000  south/blast/0.png" in capsys.readouterr().out  # the same pixels by the same row


def test_a_folder_without_laboratories_is_one_new_one(by_lab, tmp_path, capsys):
    images = write(tmp_path / "cells", {"south": LABS["south"]}) / "south" / "blast"
    command = ["embed", str(by_lab), str(images), "--workers", "0", "--cpu", "--out"]
    assert main(None, [*command, str(tmp_path / "one")]) == 0
    assert "blast: standardised by 5 of its own images, without labels" in capsys.readouterr().out
    assert main(None, [*command, str(tmp_path / "two"), "--lab", "north"]) == 0
    assert "north: standardised as in training" in capsys.readouterr().out
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert all((one[name] - two[name]).abs().max() > 1e-3 for name in one)
    assert main(None, [*command, str(tmp_path / "two"), "--lab", "west"]) == 2
    assert "was begun with the laboratories north; choose another --out" in capsys.readouterr().err


def test_images_without_a_cell_are_listed(tmp_path, capsys):
    run = standardised(tmp_path / "runs" / "each")
    images = write(tmp_path / "cells", {"south": LABS["south"]})
    for name in ("empty", "blank"):
        Image.new("RGB", (48, 48), "white").save(images / f"{name}.png")
    for form in ("parquet", "npz"):
        out = tmp_path / form
        command = ["embed", str(run), str(images), "--out", str(out), "--workers", "0", "--cpu", "--format", form]
        assert main(None, [*command, "--shard", "4"]) == 0
        assert "no cell was found in 2 of them, their size, place and density" in capsys.readouterr().out
        assert (out / "no_cell.csv").read_text() == 'path\n"blank.png"\n"empty.png"\n'
        (out / f"part-000001.{form}").unlink()
        assert main(None, command) == 0  # goes on, and counts what was there
        assert "no cell was found in 2 of them" in capsys.readouterr().out
    with pytest.warns(UserWarning, match="no cell was found in 2 of 7 images"):
        sslcells.embed(str(images), run)


def test_the_card_says_what_standardises_and_what_does_not(tmp_path):
    run = standardised(tmp_path / "run")
    encoder, spec = sslcells.load_encoder(run), json.loads((run / "encoder.json").read_text())
    text = card(run, encoder, spec, [], ["encoder.pt2"])
    assert "does not: raw images give wrong features there" in text
    assert "for pixels (N, 3, 32, 32) uint8; standardisation, resizing and normalisation are included" in text
    assert "colour: two_point" in text


def test_load_py_says_in_how_many_images_no_cell_was_found(tmp_path):
    run = standardised(tmp_path / "run")
    _write_standard(run)
    shutil.copyfile(standalone.__file__, run / "load.py")
    pixels = torch.stack([torch.full((3, 48, 48), 255, dtype=torch.uint8), cells(LABS["south"], 1)[0]])
    with pytest.warns(UserWarning, match="no cell was found in 1 of 2 images"):
        loaded(run).prepare(pixels, run)


def loaded(out):
    spec = importlib.util.spec_from_file_location("load_of_export", out / "load.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ALONE = """
import sys
sys.modules["sslcells"] = None  # importing it fails
import torch
from load import laboratory, load, prepare
pixels, network = torch.load("pixels.pt"), load()
torch.save([network(prepare(pixels, lab=lab)).detach() for lab in ("north", laboratory(pixels))], "features.pt")
torch.save(torch.export.load("encoder.pt2").module()(pixels).detach(), "program.pt")
for wrong in (lambda: prepare(pixels), lambda: laboratory(pixels[:1])):
    try:
        wrong()
    except ValueError as error:
        print(error)
"""


@pytest.mark.slow
def test_an_export_by_laboratory_in_a_fresh_process(tmp_path, capsys):
    by_lab = standardised(tmp_path / "runs" / "by_lab", by="lab", **PLAIN)
    assert main(None, ["export", str(by_lab), "--to", str(tmp_path / "none"), "--no-onnx"]) == 0
    said = capsys.readouterr().out
    assert "left out: encoder.pt2 and encoder.onnx: the encoder standardises by laboratory" in said
    assert not (tmp_path / "none" / "encoder.pt2").exists()
    for lab, word in (("nroth", "knows north (did you mean north?)"), (None, "--lab one of north; load.py takes any")):
        more = ["--lab", lab] if lab else ["--onnx"]
        assert main(None, ["export", str(by_lab), *more]) == 2
        assert word in capsys.readouterr().err
    out, x = tmp_path / "out", cells(LABS["south"])
    assert main(None, ["export", str(by_lab), "--to", str(out), "--lab", "north", "--no-onnx"]) == 0
    torch.save(x, out / "pixels.pt")
    done = subprocess.run([sys.executable, "-c", ALONE], cwd=out, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "give lab=NAME (known: north)" in done.stdout
    assert "about a hundred; here is 1" in done.stdout
    encoder = sslcells.load_encoder(by_lab)
    known, new = torch.load(out / "features.pt")
    torch.testing.assert_close(known, by_hand(by_lab, x, encoder.standard.row("north")), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(new, by_hand(by_lab, x, encoder.laboratory(x)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.load(out / "program.pt"), known, rtol=1e-5, atol=1e-5)
    assert "of the laboratory north" in (out / "README.md").read_text()
