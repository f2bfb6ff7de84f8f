"""The export: timm, torch.export and ONNX give the network's features, without sslcells; the card says what it must."""

import json
import subprocess
import sys

import pytest
import timm
import torch
from trained import make_run

import sslcells
from sslcells.cli import main
from sslcells.config import ConfigError
from sslcells.delivery import DeliveryError
from sslcells.delivery.export import FromPixels, compare, drawn, export, noise, write_onnx, write_program
from sslcells.models import files

ALONE = """
import sys
sys.modules["sslcells"] = None  # importing it fails
import torch
from load import load, prepare
pixels = torch.load("pixels.pt")
torch.save(load()(prepare(pixels)).detach(), "features.pt")
program = torch.export.load("encoder.pt2").module()
torch.save(program(torch.load("sized.pt")).detach(), "program.pt")
"""

RUNS = {
    "small_cnn": (),
    "timm": ("model.backbone=test_resnet", "model.args={}"),
    "small stem": ("model.backbone=resnet18", "model.args={}", "model.stem=small", "augment.size=28"),
}


@pytest.mark.parametrize(
    "kind", ["timm", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("small_cnn", "small stem"))]
)
def test_torch_and_timm_alone_give_the_same_features(kind, tmp_path):
    run = make_run(tmp_path / "run", *RUNS[kind])
    out = export(str(run), str(tmp_path / "out"), onnx=False)
    encoder = sslcells.load_encoder(run)
    pixels = torch.randint(256, (3, 3, 40, 40), dtype=torch.uint8)
    sized = torch.randint(256, (3, 3, encoder.size, encoder.size), dtype=torch.uint8)
    torch.save(pixels, out / "pixels.pt")
    torch.save(sized, out / "sized.pt")
    done = subprocess.run([sys.executable, "-c", ALONE], cwd=out, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(out / "features.pt"), sslcells.embed(pixels, encoder), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.load(out / "program.pt"), sslcells.embed(sized, encoder), rtol=1e-5, atol=1e-6)
    again = sslcells.load_encoder(out)
    assert again.digest == encoder.digest
    assert ("two modules are replaced" in (out / "README.md").read_text()) == (kind == "small stem")


def test_the_cards_line_of_timm_loads_the_weights(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", *RUNS["timm"])
    out = export(str(run), onnx=False)
    assert out == run / "export"
    (line,) = [x for x in (out / "README.md").read_text().splitlines() if "timm.create_model" in x]
    monkeypatch.chdir(out)
    space = {"timm": timm}
    exec(line, space)
    network, _ = files.load(run)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(space["encoder"](x), network(x))


@pytest.mark.parametrize(("kind", "channels"), [pytest.param("timm", 3, marks=pytest.mark.slow), ("small_cnn", 6)])
def test_onnx_gives_the_same_features_for_any_number_of_images(kind, channels, tmp_path, capsys):
    run = make_run(tmp_path / "run", *RUNS[kind], channels=channels)
    assert main(None, ["export", str(run), "--to", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    checked = [line.partition(" on ")[0] for line in out.splitlines() if "largest difference" in line]
    forms = ["timm", *["timm local-dir"] * (kind == "timm"), "torch.export", "ONNX"]
    assert checked == [form for form in forms for _ in range(3)]
    assert ("left out: config.json" in out) == (kind != "timm")
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(str(tmp_path / "out" / "encoder.onnx"), providers=["CPUExecutionProvider"])
    pixels = torch.randint(256, (5, channels, 32, 32), dtype=torch.uint8)
    (features,) = session.run(None, {"pixels": pixels.numpy()})
    torch.testing.assert_close(torch.from_numpy(features), sslcells.embed(pixels, run), rtol=1e-4, atol=1e-5)
    assert not list((tmp_path / "out").glob(".partial*"))


def test_another_network_is_not_passed_off(run):
    encoder = sslcells.load_encoder(run)
    network, asked = FromPixels(encoder), {"noise": noise(encoder, 2)}
    with pytest.raises(DeliveryError, match="not the same encoder, on noise"):
        compare("ONNX", lambda x: network(x) * 1.01, network, asked)
    with pytest.raises(DeliveryError, match="not the same encoder"):
        compare("ONNX", lambda x: network(x) * float("nan"), network, asked)
    assert drawn(encoder, 3).float().std() > 20


def test_the_card_says_what_it_learned_from_how_with_what_figures_and_limits(tmp_path, cells):
    run = make_run(tmp_path / "run", "data.kind=folder", f"data.path={cells}", "data.size=32", "method.temperature=0.3")
    (run / "evaluation.json").write_text(json.dumps({"linear": {"accuracy": 0.912, "classes": ["a"]}, "images": 24}))
    card = (export(str(run), onnx=False) / "README.md").read_text()
    for line in (
        "| knn/top1 | 0.4 | 0.875 |",
        "| linear/accuracy | 0.912 |",
        "| images | 24 |",
        "path: cells",
        "  temperature: 0.3",
        "- torch.export: largest difference 0.00e+00",
    ):
        assert line in card.splitlines() or any(line in x for x in card.splitlines()), line
    assert str(tmp_path) not in card
    assert "Sources (slide, donor, photograph) of the images were not given" in card
    (run / "config.yaml").unlink()
    (run / "metrics.jsonl").unlink()
    (run / "evaluation.json").unlink()
    card = (export(str(run), onnx=False) / "README.md").read_text()
    assert card.count("Not known") == 2
    assert "its quality is not known" in card


def test_mistakes_are_named(run, tmp_path, capsys):
    assert main(None, ["export", str(run.parent / "tin"), "--no-onnx"]) == 2
    assert "tin: no such run's folder (did you mean tiny?)" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="the run's own folder"):
        export(str(run), str(run), onnx=False)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"):
        export(str(run), str(tmp_path / "file"), onnx=False)


def test_what_cannot_be_exported_is_left_out_and_said(run, tmp_path, capsys, monkeypatch):
    """What ONNX needs is an extra: without it the other forms are written, and no older ONNX file stays beside them."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "encoder.onnx").write_text("of other weights")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert main(None, ["export", str(run), "--to", str(out)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-1].startswith("left out: encoder.onnx (ONNX) needs onnxscript: pip install 'sslcells[export]'")
    assert sorted(file.name for file in out.iterdir()) == [
        *("README.md", "encoder.json", "encoder.pt2", "encoder.safetensors", "load.py", "small_cnn.py")
    ]
    assert "onnxruntime" not in (out / "README.md").read_text()
    assert main(None, ["export", str(run), "--to", str(out), "--onnx"]) == 1
    assert "--onnx: encoder.onnx (ONNX) needs onnxscript: pip install" in capsys.readouterr().err

    def fails(*_, **__):
        raise RuntimeError("cannot be traced")

    monkeypatch.setattr(torch.export, "export", fails)
    assert main(None, ["export", str(run), "--to", str(out)]) == 0
    assert "left out: encoder.pt2 and encoder.onnx: torch.export cannot follow" in capsys.readouterr().out
    assert not (out / "encoder.pt2").exists()
    assert "encoder.pt2" not in (out / "README.md").read_text()


class Changing(torch.nn.Module):
    def forward(self, pixels):
        return pixels[:, 0, 0].float() if pixels.float().sum() > 3 else pixels[:, 0, 1].float()


def test_a_backbone_that_cannot_be_followed_is_a_clear_error(run, tmp_path):
    with pytest.raises(DeliveryError, match=r"torch\.export cannot follow this backbone"):
        write_program(Changing(), sslcells.load_encoder(run), tmp_path / "x.pt2")
    with pytest.raises(DeliveryError, match=r"cannot be written as ONNX"):
        write_onnx(None, tmp_path / "x.onnx")
