"""Standardised images of two laboratories are alike; an encoder standardises anywhere as in training."""

import json
import subprocess
import sys

import pytest
import torch
from cells_drawn import NUCLEUS, RED, disc, stained
from PIL import Image
from test_train import tiny
from torch.nn import functional
from trained import make_run

import sslcells
from sslcells import inputs
from sslcells.config import ConfigError, Standardise, load
from sslcells.data import open_splits
from sslcells.delivery.export import export, onnx_session
from sslcells.standardise import Standard, fit
from sslcells.standardise.cell import filled
from sslcells.standardise.standard import colours, curved, opponent, restained
from sslcells.train import train

PINK = {"lamp": (0.95, 0.85, 0.8), "density": 0.7}
BLUE = {"lamp": (0.75, 0.85, 0.9), "density": 1.3}


def images(**options):
    """Three cells of other sizes and places."""
    kinds = [(48, 48, 12, 20), (44, 52, 10, 17), (52, 50, 14, 21)]
    return torch.stack([stained(x=x, y=y, nucleus=n, cell=c, **options)[0] for x, y, n, c in kinds])


def standard(x, **config):
    return Standard(fit(Standardise(**config), x))


@pytest.mark.parametrize("colour", ["two_point", "reinhard"])
def test_two_laboratories_look_alike_afterwards(colour):
    ours, theirs = images(**PINK), images(**BLUE)
    change = standard(ours, colour=colour)
    before, after = (ours - theirs).abs().mean(), (change(ours) - change(theirs)).abs().mean()
    assert after < before / 4


def test_the_background_becomes_white_and_the_light_is_gone():
    ours, theirs = (standard(images(), colour="background")(images(lamp=lamp)) for lamp in (PINK["lamp"], BLUE["lamp"]))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.004)  # backgrounds are known to 1/255
    torch.testing.assert_close(ours[0, :, 0, 48], torch.ones(3), rtol=0, atol=0.004)


def test_cells_come_to_one_size_and_place():
    change = standard(images(), scale="nucleus", centre=True, diameter=0.4)
    rows, failed = change.measure(change(images()))
    assert not failed.any()
    again = change.found(change(images()), cell=True)
    torch.testing.assert_close(rows[:, -1], torch.ones(3), rtol=0, atol=0.06)  # found again at the wanted size
    middle = torch.arange(96) + 0.5
    for mask in again.cell[:, 0]:
        assert (mask.sum(0) * middle).sum().item() / mask.sum().item() == pytest.approx(48, abs=2)
        assert (mask.sum(1) * middle).sum().item() / mask.sum().item() == pytest.approx(48, abs=2)


def test_what_surrounds_the_cell_is_gone():
    blank = standard(images(), colour="background", outside="blank")
    x, y = blank(images()), blank(images(neighbours=False))
    assert (x - y).abs().mean() < 0.001
    assert (images() - images(neighbours=False)).abs().mean() > 0.02


def test_percentiles_of_each_channel_become_black_and_white():
    drawn = torch.rand(2, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    x = drawn * torch.tensor([0.1, 0.5, 0.9, 0.3])[:, None, None] + 0.05
    y = standard(x, colour="percentiles", stain="bright")(x)
    assert y.flatten(2).amax(2).min() > 0.998
    assert y.flatten(2).amin(2).max() < 0.002


def by_another_camera(x, lamp=(0.8, 0.82, 0.85), power=(0.75, 0.7), gain=(0.4, 0.5), blue=0.1):
    """It compresses dark red and green, and sees little blue in what is dense."""
    od = -x.log()
    out = [g * od[:, c] ** p for c, (g, p) in enumerate(zip(gain, power, strict=True))]
    return torch.tensor(lamp)[:, None, None] * (-torch.stack([*out, blue * od[:, 2]], 1)).exp()


def test_a_camera_that_compresses_dark_colours_is_taken_away_by_red_cells_and_nuclei():
    ours, theirs = images(), by_another_camera(images())
    apart = {}
    for colour in ("two_point", "three_point"):
        change = standard(ours, colour=colour, channels="red_green")
        apart[colour] = (change(ours) - change(theirs)).abs().mean().item()
        torch.testing.assert_close(change(theirs)[:, 2], change(theirs)[:, :2].mean(1), rtol=0, atol=1e-6)
    assert apart["three_point"] < 0.006 < apart["two_point"] / 4
    rows = standard(ours, colour="three_point").measure(theirs)[0]
    torch.testing.assert_close(
        rows[0, 3:5], torch.tensor([0.4 * RED[0] ** 0.75, 0.5 * RED[1] ** 0.7]), rtol=0, atol=0.01
    )


def test_densities_of_red_cells_and_nuclei_become_the_references():
    red, nucleus = torch.tensor([[0.12, 0.23, 0.23]]), torch.tensor([[0.39, 0.73, 0.01]])
    to_red, to_nucleus = torch.tensor([[0.23, 0.33, 0.23]]), torch.tensor([[1.1, 1.7, 0.44]])
    od = torch.stack([red, nucleus], 2)[..., None]
    red_there, nucleus_there = curved(od, red, nucleus, to_red, to_nucleus)[..., 0].unbind(2)
    torch.testing.assert_close(red_there, to_red)
    torch.testing.assert_close(nucleus_there[:, :2], to_nucleus[:, :2])
    torch.testing.assert_close(nucleus_there[:, 2], nucleus[:, 2])  # no nucleus in blue: a gain alone, 1


def test_without_red_cells_the_nucleus_sets_the_gain():
    alone = images(neighbours=False)
    red, nucleus = standard(images(), colour="three_point").measure(alone)[0][:, 3:9].chunk(2, 1)
    torch.testing.assert_close(red, 0.2 * nucleus)
    torch.testing.assert_close(nucleus, torch.tensor([NUCLEUS]).expand(3, -1), rtol=0, atol=0.05)


def test_borders_that_a_program_filled_are_background():
    x = images(lamp=(0.8, 0.9, 0.85))
    black, repeated = x.clone(), x.clone()
    black[:, :, :14, :] = 0
    repeated[:, :, :, 80:] = repeated[:, :, :, 79:80]
    repeated += 0.004 * torch.rand(x.shape)  # as JPEG leaves it
    assert filled(black)[:, :, :14].all()
    assert filled(repeated)[:, :, :, 81:].all()
    for y, cut in ((black, filled(black)), (repeated, filled(repeated))):
        assert cut.mean() < 0.3
        change = standard(x, colour="background")
        torch.testing.assert_close(change(y).where(cut > 0, torch.ones(())), torch.ones_like(y), rtol=0, atol=0.01)
        centred = standard(x, scale="nucleus", centre=True)
        torch.testing.assert_close(centred.measure(y), centred.measure(x), rtol=0, atol=0.05)


def test_an_oblong_image_gives_a_square_of_round_cells():
    wide = torch.ones(1, 3, 96, 160)
    wide[:, :, :, 40:136] = images()[:1]
    change = standard(images(), scale="nucleus", centre=True)
    square = change(images())[:1]
    assert change(wide).shape == square.shape
    middle = disc(96, 48, 48, 36)  # without neighbours that lie beyond the image that is narrow
    assert (change(wide) - square)[..., middle].abs().mean() < 0.04  # masks are found on another grid
    edge = torch.ones(1, 3, 96, 96)
    edge[:, :, :, :60] = images()[:1, :, :, 36:]
    torch.testing.assert_close(change(edge)[:, :, 48, :8], torch.ones(1, 3, 8), rtol=0, atol=0.01)  # not a mirror image


@pytest.mark.parametrize(
    "colour", ["none", "background", "two_point", "three_point", "reinhard", "macenko", "percentiles"]
)
@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_an_empty_image_stays_finite_and_is_counted(colour, value):
    change = standard(images(), colour=colour, scale="nucleus", centre=True, outside="blank")
    found = change.found(torch.full((1, 3, 40, 48), value))
    assert found.failed.all()
    assert found.x.isfinite().all()
    assert found.x.min() >= 0
    assert found.x.max() <= 1


def test_an_image_is_standardised_alone():
    change = standard(images(), colour="two_point", scale="nucleus", centre=True, outside="blank")
    torch.testing.assert_close(change(images())[1:2], change(images()[1:2]), rtol=0, atol=1e-5)


def test_opponent_colours_and_back():
    x = torch.rand(2, 3, 5, 5).clamp_min(0.02)
    torch.testing.assert_close(colours(opponent(x)), x, rtol=0, atol=1e-4)


def test_two_dyes_are_found_and_replaced():
    torch.manual_seed(0)
    ours = functional.normalize(torch.tensor([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11]]), dim=1)
    theirs = functional.normalize(torch.tensor([[0.55, 0.80, 0.20], [0.20, 0.90, 0.35]]), dim=1)
    amount = torch.rand(2, 64 * 64) * (torch.rand(2, 64 * 64) < 0.7) * 1.5 + 0.15
    x, y = ((-dyes.T @ amount).exp().view(1, 3, 64, 64) for dyes in (ours, theirs))
    change = standard(x, colour="macenko")
    assert (change(y) - x).abs().mean() < 0.05 < (y - x).abs().mean() + 0.03
    rows = torch.cat([theirs.flatten(), torch.ones(2)])[None]
    torch.testing.assert_close(restained(y, rows, torch.cat([ours.flatten(), torch.ones(2)])), x, rtol=0, atol=1e-3)


STANDARD = [
    *("standardise.colour=three_point", "standardise.channels=red_green", "standardise.scale=nucleus"),
    *("standardise.centre=true", "standardise.size=24"),
    "standardise.outside=blank",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return train(tiny(tmp_path_factory.mktemp("standard"), *STANDARD))


ALONE = """
import sys
sys.modules["sslcells"] = None  # importing it fails
import numpy, torch
from PIL import Image
from load import load, prepare
pixels = torch.from_numpy(numpy.array(Image.open("new.png"))).permute(2, 0, 1)[None]
torch.save(load()(prepare(pixels)).detach(), "features.pt")
torch.save(torch.export.load("encoder.pt2").module()(pixels).detach(), "program.pt")
"""


@pytest.mark.slow
def test_a_fresh_process_standardises_a_new_laboratorys_file_as_training_did(finished, tmp_path):
    out = export(str(finished), str(tmp_path / "out"), onnx=False, say=lambda line: None)
    new = (stained(size=32, x=15, y=17, nucleus=5, cell=8, **BLUE)[0] * 255).round().byte()
    Image.fromarray(new.permute(1, 2, 0).numpy()).save(out / "new.png")
    done = subprocess.run([sys.executable, "-c", ALONE], cwd=out, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    run = load(str(finished / "config.yaml"))
    augment = inputs.augment(run, open_splits(run.data), Standard(inputs.read(finished)))
    encoder = sslcells.load_encoder(finished)
    with torch.no_grad():
        trained = encoder.backbone(augment.plain(new[None]))
    for features in (
        torch.load(out / "features.pt"),
        torch.load(out / "program.pt"),
        sslcells.embed(str(out / "new.png"), out),
        sslcells.embed(str(out / "new.png"), encoder),
    ):
        torch.testing.assert_close(features, trained, rtol=1e-5, atol=1e-5)
    without = Standard(encoder.standard.spec | {"colour": "none"})
    assert (without(new[None].float() / 255) - encoder.standard(new[None].float() / 255)).abs().mean() > 0.01


def untrained(folder, colour, *changes):
    """A run whose encoder standardises, with the reference of drawn cells."""
    run = make_run(folder, f"standardise.colour={colour}", *changes)
    spec = json.loads((run / "encoder.json").read_text())
    x = functional.interpolate(images(**PINK), (32, 32), mode="bilinear", antialias=True)
    spec["standardise"] = fit(load(str(run / "config.yaml")).standardise, x)
    (run / "encoder.json").write_text(json.dumps(spec))
    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("colour", "changes"),
    [
        ("background", []),
        ("reinhard", []),
        ("percentiles", []),
        ("two_point", ["standardise.outside=blank"]),
        ("three_point", ["standardise.channels=red_green", "standardise.scale=nucleus", "standardise.centre=true"]),
    ],
)
def test_onnx_standardises_as_the_encoder_does(colour, changes, tmp_path):
    pytest.importorskip("onnxscript")
    run = untrained(tmp_path / "run", colour, *changes)
    out = export(str(run), str(tmp_path / "out"), onnx=True, say=lambda line: None)
    x = functional.interpolate(images(**BLUE), (32, 32), mode="bilinear", antialias=True)
    pixels = (x * 255).round().byte()
    features = onnx_session(out / "encoder.onnx")(pixels)
    torch.testing.assert_close(features, sslcells.embed(pixels, run), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_what_onnx_lacks_is_named(tmp_path):
    pytest.importorskip("onnxscript")
    run, said = untrained(tmp_path / "run", "macenko"), []
    out = export(str(run), str(tmp_path / "out"), say=said.append)
    assert not (out / "encoder.onnx").exists()
    assert (out / "encoder.pt2").is_file()
    assert any("encoder.onnx" in line and "linalg_eigh" in line for line in said if line.startswith("left out")), said


@pytest.mark.slow
def test_an_encoder_is_only_continued_with_its_own_standardisation(finished, tmp_path):
    start = f"model.encoder={finished}"
    with pytest.raises(ConfigError, match=r"standardise.colour='none', but it learned with 'three_point'"):
        train(tiny(tmp_path, start))
    run = tiny(tmp_path, start, *STANDARD)
    assert inputs.measured(run, open_splits(run.data)) == inputs.read(finished)


@pytest.mark.slow
def test_a_resumed_run_keeps_what_was_measured(finished, tmp_path):
    run = tiny(tmp_path, *STANDARD)
    run.folder.mkdir(parents=True)
    spec = inputs.read(finished)
    spec["reference"][-1] = 0.123
    (run.folder / inputs.FILE).write_text(json.dumps(spec))
    assert inputs.prepared(run, open_splits(run.data), resumes=True).spec == spec
    assert inputs.prepared(run, open_splits(run.data), resumes=False).spec == inputs.read(finished)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["standardise.colour=reinhard", "standardise.stain=bright"], "colour=reinhard is for light that dyes absorb"),
        (["standardise.colour=three_point", "standardise.stain=dark"], "three_point is for blood smears"),
        (["standardise.color=reinhard"], "did you mean standardise.colour"),
    ],
)
def test_a_mistake_is_named(changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        tiny(tmp_path, *changes)
