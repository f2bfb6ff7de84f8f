"""The benchmarks run, say what they measured, and would notice a wrong gradient; their figures are not tested."""

import fnmatch
import importlib
import importlib.util
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from trained import make_run

from sslcells import losses

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def printed(script, *arguments):
    done = subprocess.run([sys.executable, BENCHMARKS / script, *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def table(text):
    """(first two cells) → the others, of every row of figures."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    return {(row[0], row[1]): row[2:] for row in rows if row[0][:1].isdigit()}


@pytest.mark.slow
def test_losses(tmp_path):
    out, plot = tmp_path / "RESULTS.md", tmp_path / "plot.png"
    wanted = ["--device", "cpu", "--sizes", "256", "--only", "sslcells", "plain", "--repeats", "1"]
    text = printed("losses.py", *wanted, "--out", out, "--plot", plot)
    assert re.match(r"## Losses, \d{4}-\d\d-\d\d, commit \w+", text)
    assert out.read_text() in text
    assert plot.stat().st_size > 10_000
    tasks = text.split("\n### ")[1:]
    assert [title.split(",")[0] for title in tasks] == ["NT-Xent", "Batch-hard triplet"]
    for task in tasks:
        rows = table(task)
        assert list(rows) == [("256", "sslcells"), ("256", "plain torch")]
        assert rows["256", "sslcells"][3:5] == ["1.00", "1.00"]
        for best, median, mib, slower, larger, rate, error in rows.values():
            assert 0 < float(best) <= float(median)
            assert float(mib) > 0
            assert float(slower) > 0
            assert float(larger) > 0
            assert float(rate.rstrip("%")) > 0
            assert float(error) < 1e-5


@pytest.mark.slow
def test_augment():
    text = printed("augment.py", "--few", "--repeats", "1", "--device", "cpu")
    noise, cost = (part for part in text.split("\n\n") if part.startswith("| px"))
    kept = table(noise)
    assert float(kept["49 → 48", "bilinear"][-1].lstrip("× ")) > 1.03
    assert float(kept["49 → 48", "warp"][-1].lstrip("× ")) == pytest.approx(1, abs=0.03)
    assert all(float(cell) >= 0 for cell in table(cost)["28 → 28", ""])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "form"), [("lightly", "nt-xent lightly"), ("pytorch_metric_learning", "pytorch-metric-learning")]
)
def test_peers_compute_the_same_loss(package, form):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    rows = table(printed("losses.py", "--device", "cpu", "--repeats", "1", "--sizes", "64", "--only", form))
    assert rows
    assert all(float(row[-1]) < 1e-5 for row in rows.values())


@pytest.mark.slow
def test_large_batch():
    tiny = ["model.backbone=small_cnn", "model.stem=timm", "method.hidden=16", "data.test=16"]
    text = printed("large_batch.py", *tiny, "--device", "cpu", "--batches", "8", "16", "--micro-batches", "none", "8")
    rows = table(text)
    assert list(rows) == [("8", "none"), ("16", "none"), ("16", "8")]
    for speed, mib, *ratios in rows.values():
        assert float(speed) > 0
        assert float(mib.replace(",", "")) > 100
        assert all(float(ratio) > 0 for ratio in ratios)


@pytest.mark.slow
def test_variants(tmp_path):
    tiny = [
        "data.size=32",
        "data.train=60",
        "data.val=30",
        "data.test=20",
        "augment.size=32",
        "model.backbone=small_cnn",
    ]
    tiny += ["train.total_steps=2", "train.global_batch=16", "train.workers=0", "evaluate.bootstrap=100"]
    tiny += ["evaluate.pictures=false", "--folder", str(tmp_path)]
    common = [*tiny, "--seeds", "0", "1", "--names", "1a", "--variants", "method.temperature=0.1"]
    text = printed("variants.py", *common)
    rows = table(text)
    assert list(rows) == [("1a", "image")]
    assert all("±" in cell for cell in rows["1a", "image"][:-1])
    assert "Of val, in %" in text
    assert not list(tmp_path.glob("*.test.json"))
    logged = (tmp_path / "1a_0.log").stat().st_size
    assert table(printed("variants.py", *common)) == rows
    assert (tmp_path / "1a_0.log").stat().st_size == logged  # nothing was run again
    asking = [*tiny, "--seeds", "0", "--names", "1a", "--report-test", "1a", "--variants", "method.temperature=0.1"]
    chosen = printed("variants.py", *asking)
    assert list(table(chosen.split("On test, evaluated once")[1])) == [("1a", "image")]
    assert [path.name for path in tmp_path.glob("*.test.json")] == ["1a_0.test.json"]
    classifier = [*tiny, "--seeds", "0", "--names", "1b", "--variants", "method.name=supervised method.loss=focal"]
    assert [len(cells) for cells in table(printed("variants.py", *classifier)).values()] == [4]


@pytest.mark.slow
def test_search(tmp_path):
    pytest.importorskip("faiss", reason="the faiss extra is not installed")
    run = make_run(tmp_path / "run", "data.train=60", "data.val=0", "data.test=20", "train.global_batch=16")
    rows = table(printed("search.py", str(run), "--sizes", "300", "12000", "--queries", "5"))
    assert list(rows) == [(n, way) for n in ("300", "12,000") for way in ("every row", "FAISS")]
    assert rows["300", "FAISS"][-2:] == rows["12,000", "every row"][-2:] == ["1.000", "1.000"]
    assert 0.5 < float(rows["12,000", "FAISS"][-1]) <= 1
    assert all(float(cell) > 0 for cells in rows.values() for cell in cells[2:6])


def test_peer_tests_are_ready(monkeypatch):
    """The adapters import without the peers, and what is listed as deliberate names a test that runs, and a reason."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    peer_tests = importlib.import_module("peer_tests")
    assert list(peer_tests.SUITES) == list(peer_tests.PEERS)
    for known in peer_tests.DIFFERENCES:
        assert any(fnmatch.fnmatchcase(f, known.tests.split("::")[0]) for f in peer_tests.SUITES[known.peer]), known
        assert re.fullmatch(r"[A-Z].{20,}\.", known.why), known
    report = {"outcome": "passed", "why": "", "called": ["NTXentLoss"]}
    assert peer_tests.verdict(report, None) == "passed"
    assert peer_tests.verdict(report | {"called": []}, None) == "not applicable"
    failed = report | {"outcome": "failed"}
    assert peer_tests.verdict(failed, None) == "unexpected"
    assert peer_tests.verdict(failed, peer_tests.DIFFERENCES[0]) == "deliberate"
    assert peer_tests.verdict(report | {"outcome": "skipped", "why": "no GPU"}, None) == "skipped"


def test_adapters_call_ours(monkeypatch):
    """Each adapter of a loss gives what ours gives, and is noted as called."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    adapters = importlib.import_module("_peer_adapters")
    a, b = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
    assert adapters.LightlyNTXent(0.5)(a, b) == losses.NTXentLoss(0.5)(a, b)
    assert adapters.LightlyVICReg()(a, b) == losses.VICRegLoss(25, 12.5, 1)(a, b)
    assert adapters.solo_simclr(torch.cat([a, b]), torch.arange(6).repeat(2), 0.5) == pytest.approx(
        losses.NTXentLoss(0.5)(a, b).item()
    )
    torch.testing.assert_close(adapters.negative_cosine(a, b), -F.cosine_similarity(a, b).mean())
    both = (F.cosine_similarity(a, b + 1) + F.cosine_similarity(a + 1, b)).mean() / 2
    torch.testing.assert_close(adapters.negative_cosine(a, b + 1, a + 1, b), -both)
    torch.testing.assert_close(adapters.solo_byol(a, b), 2 - 2 * F.cosine_similarity(a, b).mean())
    loss, centre = adapters.dino_loss([a, b], [b, a], torch.zeros(4), (0.1, 0.05), 0.9)
    by_hand = F.cross_entropy(b / 0.1, (b / 0.05).softmax(1)) / 2 + F.cross_entropy(a / 0.1, (a / 0.05).softmax(1)) / 2
    torch.testing.assert_close(loss, by_hand)
    torch.testing.assert_close(centre, 0.1 * torch.cat([a, b]).mean(0))
    assert {"NTXentLoss", "VICRegLoss", "SupConLoss"} <= adapters._called


@pytest.mark.slow
@pytest.mark.parametrize("own", [(), ("--own",)])
def test_every_way_finds_the_same_neighbours(own):
    rows = table(printed("knn.py", "--bank", "3000", "--queries", "200", "--features", "32", "--k", "5", *own))
    for way in ("sslcells", "FAISS", "scikit-learn"):
        queries, seconds, mib, same = rows["3,000", way]
        assert (queries, same) == ("200", "1.0000")
        assert float(seconds) >= 0
        assert float(mib) >= 0


@pytest.mark.slow
def test_a_start_to_the_end():
    for files, _, first, after, whole, gib in (
        row.split("|")[1:-1]
        for row in printed("start.py", "--files", "300", "--to-end").splitlines()
        if "| 300 |" in row
    ):
        assert files.strip() == "300"
        assert float(first) + float(after) == pytest.approx(float(whole), abs=0.2)
        assert float(gib) > 0.1


@pytest.mark.slow
def test_end_to_end(tmp_path):
    """Ours and the bare network are measured, and the parts of our step; a peer that is not there says so."""
    plot = tmp_path / "bars.png"
    small = ["--images", "32", "--px", "64", "--sizes", "32", "--networks", "test_resnet", "--batch", "8"]
    short = ["--warm", "1", "--steps", "1", "--only", "pack at 2×", "lightly", "bare", "--plot", plot]
    text = printed("end_to_end.py", *small, *short)
    speeds, parts = (part for part in text.split("\n\n") if part.startswith("| "))
    rows = {row[1].strip(): [cell.strip() for cell in row[2:-1]] for row in lines(speeds)}
    assert rows["lightly"][0] == "not installed"
    ours = rows["sslcells, pack of twice the crop's size"]
    best = max(float(rows[f"bare network, {form}"][1]) for form in ("channels last", "contiguous"))
    assert float(ours[-1]) == pytest.approx(float(ours[1]) / best, rel=0.1)
    (step,) = lines(parts)
    *of_step, whole = map(float, step[3:-1])
    assert sum(of_step) == pytest.approx(whole, abs=5)
    assert plot.stat().st_size > 5_000


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "precision", "low"),
    [("sums", "bf16", False), ("rows", "bf16", False), ("hardest", "exact", False), ("rows", "tf32", True)],
)
def test_kernels_compile_for_hopper_without_spills(monkeypatch, kernel, precision, low):
    """No GPU is needed; the sums are without figures, as in most steps."""
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    kernels = importlib.import_module("kernels")
    tiling = kernels.triton_engine._tiling(kernel, 128, precision, kernels.ROOM)
    made = kernels.compiled(kernel, precision, 128, tiling, low=low, figures=False)
    assert made.spilled == 0
    assert not made.serialised
    assert made.together(tiling.warps) >= 1


@pytest.mark.slow
def test_scaling(tmp_path):
    plot = tmp_path / "curves.png"
    text = printed("scaling.py", "--only", "size", "--to", "64", "--budget", "100", "--plot", plot)
    small, large = (row for row in lines(text) if row[1].strip().isdigit())
    assert [small[1].strip(), large[1].strip()] == ["32", "64"]
    steeper = math.log(float(large[3]) / float(small[3])) / math.log(2)
    assert float(large[4]) == pytest.approx(steeper, abs=0.05)
    assert plot.stat().st_size > 5_000


def lines(text):
    """The cells of each row below a table's rule."""
    rows = [line.split("|") for line in text.splitlines() if line.startswith("|")]
    return [row for row in rows[2:] if not row[1].strip().startswith(":")]
