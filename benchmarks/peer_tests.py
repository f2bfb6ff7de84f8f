"""The peers' own tests on our code: `python benchmarks/peer_tests.py --lightly DIR --pytorch-metric-learning DIR ...`.

DIR is a checkout of the peer. Its tests run unchanged, but adapters (`_peer_adapters.py`) replace the peer's code by
our losses, miners, samplers, schedules and figures. A test is counted as passed; as failed, either for a reason listed
below or unexpectedly; as skipped by the peer, for example without a GPU; or as not applicable: it needs a feature that
we lack, calls none of our code, or fails with the peer's own code too. The exit status is 1 if a failure is unexpected,
or if a listed test no longer fails.

The tests need `pip install pytest-mock pytorch_lightning lightning hydra-core einops` and, for solo-learn,
`'torchmetrics<0.12' 'setuptools<81'`. `--planted` changes all of our values by 5 %: a test that still passes would not
notice a wrong loss.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from _measure import markdown, section, show
from _peer_adapters import NOT_APPLICABLE, PEERS

SUITES = {
    "lightly": {
        "tests/loss/test_ntx_ent_loss.py": "",
        "tests/loss/test_dcl_loss.py": "",
        "tests/loss/test_barlow_twins_loss.py": "",
        "tests/loss/test_vicreg_loss.py": "",
        "tests/loss/test_negative_cosine_similarity.py": "",
        "tests/loss/test_sym_neg_cos_sim_loss.py": "",
        "tests/loss/test_dino_loss.py": "",
        "tests/models/test_ModelUtils.py": "momentum",
        "tests/models/test_ProjectionHeads.py": "",
        "tests/transforms/test_simclr_transform.py": "",
        "tests/transforms/test_dino_transform.py": "",
        "tests/utils/test_scheduler.py": "",
        "tests/utils/benchmarking/test_knn.py": "",
        "tests/utils/benchmarking/test_knn_classifier.py": "",
        "tests/utils/benchmarking/test_benchmark_module.py": "",
        "tests/utils/test_dist__gather__losses.py": "",
    },
    "pytorch-metric-learning": {
        "tests/losses/test_ntxent_loss.py": "",
        "tests/losses/test_contrastive_loss.py": "",
        "tests/losses/test_triplet_margin_loss.py": "",
        "tests/losses/test_vicreg_loss.py": "",
        "tests/losses/test_self_supervised_loss.py": "",
        "tests/losses/test_losses_without_labels.py": "",
        "tests/miners/test_batch_hard_miner.py": "",
        "tests/miners/test_distance_weighted_miner.py": "",
        "tests/samplers/test_m_per_class_sampler.py": "",
    },
    "solo-learn": {
        "tests/losses/test_barlow.py": "",
        "tests/losses/test_byol.py": "",
        "tests/losses/test_dino.py": "",
        "tests/losses/test_mocov2plus.py": "",
        "tests/losses/test_mocov3.py": "",
        "tests/losses/test_simclr.py": "",
        "tests/losses/test_simsiam.py": "",
        "tests/losses/test_vicreg.py": "",
        "tests/utils/test_knn.py": "",
        "tests/methods/test_barlow_twins.py": "",
        "tests/methods/test_byol.py": "",
        "tests/methods/test_dino.py": "",
        "tests/methods/test_mocov2plus.py": "",
        "tests/methods/test_mocov3.py": "",
        "tests/methods/test_simclr.py": "",
        "tests/methods/test_simsiam.py": "",
        "tests/methods/test_supcon.py": "",
        "tests/methods/test_vicreg.py": "",
    },
}
"""Tests of what has a counterpart here, and which of a file (pytest -k)."""

ALONE = ("tests/utils/test_dist__gather__losses.py",)
"""Lightning starts the whole of pytest again for a second rank: no other test in that process."""


MINUTES = 20
"""The longest that a process of pytest may take."""


class Difference(NamedTuple):
    """Tests of a peer that ours is meant to fail."""

    peer: str
    tests: str
    """pattern of their names, as pytest prints them"""
    why: str
    """one sentence"""
    always: bool = True
    """whether they always fail; otherwise the last digit of drawn numbers decides"""


DIFFERENCES = (
    Difference(
        "lightly",
        "tests/loss/*::test__gather_distributed",
        "There is no switch: where torch.distributed is initialised the rows of all ranks are used.",
    ),
    Difference(
        "lightly",
        "tests/loss/*::test__gather_distributed_dist_not_available",
        "There is no switch: where torch.distributed is not there one process is the world.",
    ),
    Difference(
        "lightly",
        "tests/loss/test_ntx_ent_loss.py::*::test_forward_pass_neg_temp",
        "A negative temperature would pull negatives near, and is refused.",
    ),
    Difference(
        "lightly",
        "tests/loss/test_vicreg_loss.py::*::test_forward__compare_vicregl",
        "Rows of more than two axes are refused: VICRegL's local features are not here.",
    ),
    Difference(
        "lightly",
        "tests/loss/test_vicreg_loss.py::*::test_forward__compare",
        "Equality to the last bit is asked for; the sums, which several ranks share, are taken in another order.",
        always=False,
    ),
    Difference(
        "lightly",
        "tests/loss/test_dino_loss.py::*::test_different_input_sizes[[]1-*",
        "One prototype is the same for every image, and is refused.",
    ),
    Difference(
        "lightly",
        "tests/utils/test_scheduler.py::test_cosine_warmup_schedule__error_warmup_steps*",
        "A learning rate that begins at 0 is refused by the configuration before the warm-up is looked at.",
    ),
    Difference(
        "pytorch-metric-learning",
        "tests/losses/test_ntxent_loss.py::*::test_with_no_valid_pairs",
        "With one class alone theirs is 0; in eq. 2 the denominator holds the positives too, and still spreads them.",
    ),
    Difference(
        "pytorch-metric-learning",
        "tests/samplers/test_m_per_class_sampler.py::*::test_mperclass_sampler",
        "A batch holds the first image of every class before the second of any, so that a rank's part has many.",
    ),
    Difference(
        "solo-learn",
        "tests/losses/test_moco*.py::*",
        "Keys carry no gradient, as a teacher's never do; the test moves them by it.",
    ),
)


class Row(NamedTuple):
    """What came of a file of tests."""

    peer: str
    file: str
    count: Counter[str]


def run(peer: str, checkout: Path, only: Sequence[str], planted: bool) -> dict[str, dict[str, str]]:
    """How each test ended, by its name."""
    files = [f for f in SUITES[peer] if not only or any(part in f for part in only)]
    files = [f for f in files if not (planted and f in ALONE)]  # a rank that fails leaves the other one waiting
    plain = [f for f in files if f not in ALONE and not SUITES[peer][f]]
    groups = [(plain, ""), *(([f], SUITES[peer][f]) for f in files if f not in plain)]
    reports: dict[str, dict[str, str]] = {}
    for group, wanted in groups:
        if not group:
            continue
        pool = {"USE_PYTEST_POOL": str(int(peer == "lightly" and group[0] not in ALONE))}
        found = pytest_on(peer, checkout, group, wanted, pool, planted)
        failed = [t for t, r in found.items() if r["outcome"] == "failed" and difference(peer, t) is None]
        if failed and not planted:  # a test that its own project fails too says nothing
            for test, without in pytest_on("", checkout, failed, "", pool, False).items():
                if without["outcome"] == "failed":
                    found[test] |= {
                        "outcome": "skipped",
                        "why": f"{NOT_APPLICABLE}it fails with the peer's own code too",
                    }
        reports |= found
    return reports


def pytest_on(
    peer: str, checkout: Path, tests: Sequence[str], wanted: str, extra: dict[str, str], planted: bool
) -> dict[str, dict[str, str]]:
    """How tests, of files or single ones, ended in a process of pytest, with a peer's adapters or none."""
    here = Path(__file__).resolve().parent
    paths = [checkout / "src", checkout, here, here.parent, *filter(None, [os.environ.get("PYTHONPATH")])]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        environment = os.environ | extra
        environment |= {
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PEER_TESTS_PEER": peer,
            "PEER_TESTS_REPORT": str(report),
            "PEER_TESTS_PLANTED": str(int(planted)),
            "TEST_DEVICE": "cpu",
        }
        command = [sys.executable, "-m", "pytest", "-p", "_peer_adapters", "-p", "no:cacheprovider", "-q", "--tb=short"]
        command += ["-k", wanted] if wanted else []
        options = {"cwd": checkout, "env": environment, "capture_output": True, "text": True, "timeout": MINUTES * 60}
        try:
            done = subprocess.run([*command, *tests], **options)
        except subprocess.TimeoutExpired:
            raise SystemExit(f"{checkout}: pytest did not end within {MINUTES} minutes: {' '.join(tests)}") from None
        if done.returncode not in (0, 1) or not report.exists():
            raise SystemExit(
                f"{checkout}: pytest ended with {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
            )
        return json.loads(report.read_text(encoding="utf-8"))


def verdict(report: dict[str, str], known: Difference | None) -> str:
    """The column of a test."""
    outcome, why = report["outcome"], report["why"]
    if outcome == "skipped":
        return "not applicable" if NOT_APPLICABLE in why else "skipped"
    if outcome == "failed":
        return "deliberate" if known else "unexpected"
    return "passed" if report["called"] else "not applicable"


def difference(peer: str, test: str) -> Difference | None:
    """The known difference that a test is listed under."""
    return next((d for d in DIFFERENCES if d.peer == peer and fnmatchcase(test, d.tests)), None)


def commit(checkout: Path) -> str:
    """The peer's commit, where the checkout knows it."""
    if not (checkout / ".git").exists():
        return "of no known commit"
    command = ["git", "log", "-1", "--format=%h of %cs"]
    return (
        subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False).stdout.strip()
        or "of no known commit"
    )


COLUMNS = ["passed", "deliberate", "unexpected", "skipped", "not applicable"]


def main() -> None:
    """Run, print, and write the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for peer in PEERS:
        parser.add_argument(f"--{peer}", type=Path, metavar="DIR", help=f"a checkout of {peer}")
    parser.add_argument("--only", nargs="+", default=[], metavar="PART", help="parts of names of files of tests")
    parser.add_argument("--planted", action="store_true", help="spoil our values: most tests must fail")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also append the section to this file")
    args = parser.parse_args()
    checkouts = {peer: vars(args)[peer.replace("-", "_")] for peer in PEERS}
    checkouts = {peer: path.resolve() for peer, path in checkouts.items() if path}
    if not checkouts:
        parser.error(f"name a checkout: {', '.join(f'--{peer} DIR' for peer in PEERS)}")

    rows: list[Row] = []
    reasons: dict[str, Counter[str]] = {}
    complaints: list[str] = []
    for peer, checkout in checkouts.items():
        if not (checkout / "tests").is_dir():
            parser.error(f"--{peer} {checkout}: there is no folder tests in it")
        by_file: dict[str, Counter[str]] = {}
        for test, report in run(peer, checkout, args.only, args.planted).items():
            known = difference(peer, test)
            kind = verdict(report, known)
            by_file.setdefault(test.split("::")[0], Counter())[kind] += 1
            why = report["why"].split(NOT_APPLICABLE)[-1] if kind == "not applicable" and report["why"] else ""
            why = known.why if known and kind == "deliberate" else why
            if why:
                reasons.setdefault(f"{peer}, {kind}", Counter())[why] += 1
            if kind == "unexpected":
                complaints.append(f"{peer} {test}: {report['why'].strip().splitlines()[:1]}")
            if known and known.always and kind == "passed":
                complaints.append(f"{peer} {test}: passes, though listed as deliberate: {known.why}")
        rows += [Row(peer, file, count) for file, count in by_file.items()]

    print(*complaints, sep="\n", file=sys.stderr)
    totals = [Row(peer, "all", sum((r.count for r in rows if r.peer == peer), Counter())) for peer in checkouts]
    cells = [[r.peer, r.file.removeprefix("tests/"), *(str(r.count[c]) for c in COLUMNS)] for r in [*rows, *totals]]
    notes = "Commits: " + "; ".join(f"{peer} {commit(path)}" for peer, path in checkouts.items()) + "."
    lists = [
        f"{title.capitalize()}:\n\n" + "\n".join(f"- {n} × {why}" for why, n in each.most_common())
        for title, each in reasons.items()
    ]
    text = section("The peers' own tests", "cpu", notes, [markdown(["peer", "tests", *COLUMNS], cells), *lists])
    show(text, args.out)
    if complaints and not args.planted:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
