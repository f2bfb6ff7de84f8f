"""Images a second of whole trainings with SimCLR: ours, the peers', and the bare network; and where a step's time goes.

    python benchmarks/end_to_end.py --peers /tmp/peers/bin/python --repeats 3 --out benchmarks/RESULTS.md
    python benchmarks/end_to_end.py --quick                                # a minute, without peers

All train the same timm network on two views of the same images with AdamW, with the same batch, head, precision, crop
size, cores and processes that read. Each is started anew, in turn, and its first steps are not measured. Ours starts
as in the README and timed by its own metrics.jsonl; peers by torch's hook after the optimizer's step. The bare network
makes forward, backward and step on views that are ready, in both memory formats. Peers have an environment of their
own:

    python -m venv /tmp/peers && /tmp/peers/bin/pip install lightly lightly-train timm stable-pretraining
"""

import argparse
import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import psutil
import torch
from _drawn import jpegs
from _end_to_end_peers import DIMENSION, HIDDEN, PEERS, RATE, TEMPERATURE, Case
from _measure import in_fresh_process, markdown, product_rate, reason, section, show
from _steps import PARTS, measured

ROOT = Path(__file__).parents[1]
OURS = {
    "files": "sslcells, JPEG",
    "files at 2×": "sslcells, JPEG, read at twice the crop's size",
    "pack at 2×": "sslcells, pack of twice the crop's size",
    "pack": "sslcells, pack of whole images",
}
BARE = {"channels last": torch.channels_last, "contiguous": torch.contiguous_format}
DEFAULT = ["files", "files at 2×", "pack at 2×", *PEERS, "bare"]
NOT_INSTALLED = "not installed"
Speed = float | str


def words(case: Case, source: str, packs: Path, out: Path) -> list[str]:
    """The configuration of our run."""
    at = f"data.size={2 * case.size}"
    data = {
        "files": ["data.kind=folder", f"data.path={case.folder}/cells", "data.labels=none"],
        "files at 2×": ["data.kind=folder", f"data.path={case.folder}/cells", "data.labels=none", at],
        "pack at 2×": ["data.kind=pack", f"data.path={packs / str(2 * case.size)}"],
        "pack": ["data.kind=pack", f"data.path={packs / 'whole'}"],
    }[source]
    args = ", ".join(f"{key}: {value}" for key, value in case.args().items())
    return [
        *data,
        f"out={out}",
        "name=run",
        "resume=never",
        "augment.recipe=simclr",
        f"augment.size={case.size}",
        f"model.backbone={case.network}",
        f"model.args={{{args}}}",
        f"method.hidden={HIDDEN}",
        f"method.dimension={DIMENSION}",
        f"method.temperature={TEMPERATURE}",
        f"optim.lr={RATE}",
        f"train.global_batch={case.batch}",
        f"train.total_steps={case.warm + case.steps}",
        f"train.precision={case.precision}",
        f"train.workers={case.workers}",
        f"train.device={'auto' if case.device == 'cuda' else 'cpu'}",
        f"log.every_steps={case.warm}",
        f"checkpoint.every_steps={case.warm + case.steps}",
        "evaluate.every_epochs=1000",
        "evaluate.max_images=64",
        "evaluate.pictures=false",
    ]


def run(command: Sequence[str], folder: Path, seconds: float) -> str | None:
    """Run a command with all its processes in `folder`; why it failed, or None."""
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    environment |= {"PYTHONPATH": str(ROOT), "TMPDIR": str(folder)}
    with (folder / "err.txt").open("w") as err:
        done = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=err, env=environment, start_new_session=True)
        try:
            status = done.wait(seconds)
        except subprocess.TimeoutExpired:
            return f"stopped after {seconds:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):  # processes that read may be left
                os.killpg(done.pid, signal.SIGKILL)
            done.wait()
    if not status:
        return None
    said = (folder / "err.txt").read_text(errors="replace").strip()
    if missing := re.search(r"ModuleNotFoundError: No module named '([\w.]+)'\Z", said):
        return f"{NOT_INSTALLED} ({missing[1]})"
    return reason(said or f"status {status}")


def ours(case: Case, source: str, packs: Path, seconds: float) -> Speed:
    """Images a second of a run that is started as the README does, after its first line of figures."""
    from sslcells.run.metrics import read_metrics

    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "accelerate.commands.launch", "-m", "sslcells.train"]
        failed = run([*command, *words(case, source, packs, Path(folder))], Path(folder), seconds)
        if failed:
            return failed
        rows = [row for row in read_metrics(Path(folder) / "run") if "images_per_second" in row]
    steps = [row["step"] - before["step"] for before, row in itertools.pairwise(rows)]
    return sum(steps) / sum(n / row["images_per_second"] for n, row in zip(steps, rows[1:], strict=True))


def theirs(case: Case, python: str | None, versions: dict[str, str], seconds: float) -> Speed:
    """Images a second of a peer's run."""
    if python is None:
        return NOT_INSTALLED
    with tempfile.TemporaryDirectory() as folder:
        script, result = Path(__file__).with_name("_end_to_end_peers.py"), Path(folder) / "result.json"
        failed = run([python, str(script), json.dumps(case._asdict()), str(result)], Path(folder), seconds)
        if failed:
            return failed
        found = json.loads(result.read_text(encoding="utf-8"))
    versions[case.peer] = found["version"]
    return case.steps * case.batch / float(found["seconds"])


def bare(case: Case, form: str) -> float:
    """Images a second of forward, backward and step of the network and its head on views that are ready."""
    from torch.nn import functional as F

    network = _network(case).to(case.device, memory_format=BARE[form])
    views = torch.randn(2 * case.batch, 3, case.size, case.size, device=case.device).to(memory_format=BARE[form])
    optimizer = torch.optim.AdamW(network.parameters(), RATE)
    pairs = torch.arange(2 * case.batch, device=case.device).roll(case.batch)
    for step in range(case.warm + case.steps):
        if step == case.warm:
            began = _now(case.device)
        with torch.autocast(case.device, torch.bfloat16, enabled=case.precision == "bf16"):
            rows = network(views)
        rows = F.normalize(rows.float(), dim=1)
        F.cross_entropy((rows @ rows.T / TEMPERATURE).fill_diagonal_(-torch.inf), pairs).backward()
        optimizer.step()
        optimizer.zero_grad()
    return case.steps * case.batch / (_now(case.device) - began)


def _network(case: Case) -> torch.nn.Module:
    import timm
    from torch import nn

    backbone = timm.create_model(case.network, num_classes=0, **case.args())
    head = [nn.Linear(backbone.num_features, HIDDEN, bias=False), nn.BatchNorm1d(HIDDEN), nn.ReLU(inplace=True)]
    return nn.Sequential(backbone, *head, nn.Linear(HIDDEN, DIMENSION))


def operations(case: Case) -> int:
    """Of the network's products for one image, two views forward and backward; the loss has few beside them."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    network, views = _network(case), torch.randn(2, 3, case.size, case.size)
    # The products of attention are counted only where they are operations of their own.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network(views).sum().backward()
    return counter.get_total_flops()


def peak(case: Case, rates: dict[str, float | str]) -> float | None:
    """Images a second if the network's products all ran as fast as one large product, or None if that failed."""
    if case.precision not in rates:
        dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
        rates[case.precision] = in_fresh_process(product_rate, case.device, 3, dtype)
    rate = rates[case.precision]
    return None if isinstance(rate, str) else rate / operations(case)


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def parts(case: Case, source: str, packs: Path, seconds: float) -> dict[str, float] | str:
    """Seconds of each part of our step, mean over the measured steps."""
    with tempfile.TemporaryDirectory() as folder:
        found = measured(words(case, source, packs, Path(folder)), Path(folder), seconds=seconds)
    if isinstance(found, str):
        return found
    return {part: mean(step[part] for step in found[0]["steps"][case.warm :]) for part in PARTS}


def speeds(case: Case, args: argparse.Namespace, packs: Path, versions: dict[str, str]) -> Iterator[tuple[str, Speed]]:
    """(row, images a second) of one pass over the rows."""
    for row in args.only:
        if row in OURS:
            yield OURS[row], ours(case, row, packs, args.seconds)
        elif row == "bare":
            for form in BARE:
                yield f"bare network, {form}", in_fresh_process(bare, case, form)
        else:
            yield row, theirs(case._replace(peer=row), args.peers, versions, args.seconds)


def table(case: Case, found: dict[str, list[Speed]], most: float | None) -> str:
    """Median, range and ratios of the rows; `most` images a second are what one large product would give."""
    middle = {row: median(speeds) for row, speeds in found.items() if all(isinstance(s, float) for s in speeds)}
    best = max((speed for row, speed in middle.items() if row.startswith("bare")), default=None)
    compared = middle.get("lightly-train"), best
    lines = []
    for row, speeds in found.items():
        if row not in middle:
            lines.append([row, next(s for s in speeds if isinstance(s, str)), *[""] * 5])
            continue
        share = f"{middle[row] / most:.1%}" if most else ""
        ratios = [f"{middle[row] / other:.2f}" if other else "" for other in compared]
        lines.append([row, "", f"{middle[row]:.0f}", f"{min(speeds):.0f}–{max(speeds):.0f}", share, *ratios])
    heads = [title(case), "", "images/s", "range", "of the product rate", "÷ lightly-train", "÷ bare network"]
    return markdown(heads, lines)


def title(case: Case) -> str:
    """A case in a few words."""
    return f"{case.network}, {case.size} px, {'float32' if case.precision == 'no' else case.precision}"


def parts_table(found: dict[tuple[Case, str], dict[str, float] | str]) -> str:
    """Milliseconds of each part of our steps."""
    lines = []
    for (case, source), seconds in found.items():
        start = [title(case), OURS[source]]
        if isinstance(seconds, str):
            lines.append([*start, seconds, *[""] * len(PARTS)])
        else:
            lines.append([*start, *(f"{1e3 * seconds[p]:.0f}" for p in PARTS), f"{1e3 * sum(seconds.values()):.0f}"])
    return markdown(["a step, ms", "", *PARTS, "in all"], lines)


def draw(found: dict[tuple[Case, str], dict[str, float] | str], out: Path) -> None:
    """A bar for each of our runs, divided into the parts of its step."""
    from matplotlib.figure import Figure

    from sslcells.evaluation.pictures import OKABE_ITO, save

    bars = {f"{title(case)}\n{OURS[source]}": s for (case, source), s in found.items() if not isinstance(s, str)}
    figure = Figure(figsize=(11, 1.2 + 0.6 * len(bars)), layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(bars)
    for part, color in zip(PARTS, OKABE_ITO, strict=True):
        width = [1e3 * seconds[part] for seconds in bars.values()]
        axes.barh(list(bars), width, left=left, label=part, color=color)
        left = [a + b for a, b in zip(left, width, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds of a step")
    axes.legend(ncols=len(PARTS), loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False, fontsize="small")
    save(figure, out)


def prepare(args: argparse.Namespace, root: Path) -> int:
    """Images in root/files/cells, apart from the packs for the peers' sake; returns the number of images."""
    from sslcells.delivery.packing import pack

    cells = root / "files" / "cells"
    if args.folder:
        cells.parent.mkdir()
        cells.symlink_to(args.folder.resolve())
    else:
        jpegs(cells, args.images, args.px)
    sizes = {str(2 * size): [f"data.size={2 * size}"] for size in args.sizes if "pack at 2×" in args.only}
    for name, sized in (sizes | ({"whole": list[str]()} if "pack" in args.only else {})).items():
        pack(str(cells), str(root / "packs" / name), ["data.labels=none", *sized])
    return sum(file.suffix.lower() in (".jpg", ".jpeg", ".png") for file in cells.resolve().rglob("*"))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", metavar="PYTHON", help="of the environment with the peers; none: they are left out")
    parser.add_argument("--folder", type=Path, help="of RGB images of one size; drawn ones otherwise")
    parser.add_argument("--images", type=int, default=2048, help="to draw (2048)")
    parser.add_argument("--px", type=int, default=360, help="height and width of drawn images (360)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 96], help="of the crops, in pixels (64 96)")
    parser.add_argument("--networks", nargs="+", default=["resnet18", "vit_tiny_patch16_224"], help="names of timm")
    parser.add_argument("--precisions", nargs="+", default=["bf16"], choices=["bf16", "no"])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--workers", type=int, default=1, help="processes that read, of each row (1, our default)")
    parser.add_argument("--cores", type=int, help="use only so many cores; all otherwise")
    parser.add_argument("--warm", type=int, default=4, help="first steps, which are not measured (4)")
    parser.add_argument("--steps", type=int, default=8, help="measured steps of a run (8)")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each row; take 3 or more for RESULTS.md")
    parser.add_argument("--only", nargs="+", default=DEFAULT, choices=[*OURS, *PEERS, "bare"], metavar="ROW")
    parser.add_argument("--no-parts", action="store_true", help="do not look where a step's time goes")
    parser.add_argument("--seconds", type=float, default=300, help="most of one run (300)")
    parser.add_argument("--quick", action="store_true", help="one size, one network, 4 steps")
    parser.add_argument("--out", type=Path, metavar="FILE", help="append the section to this file")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write the bars to this PNG")
    args = parser.parse_args()
    if args.quick:
        args.sizes, args.networks, args.steps = args.sizes[:1], args.networks[:1], 4
    if args.batch > args.images:
        parser.error(f"--batch {args.batch} is more than --images {args.images}")
    return args


def main() -> None:
    """Measure in turn, print the tables."""
    args = arguments()
    if args.cores:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started ends too
    os.environ.pop("OMP_NUM_THREADS", None)
    torch.set_num_threads(len(os.sched_getaffinity(0)))  # what the section says
    load, device, versions = psutil.getloadavg()[0], "cuda" if torch.cuda.is_available() else "cpu", dict[str, str]()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        images = prepare(args, root)
        common: dict[str, Any] = {"peer": "", "folder": str(root / "files"), "images": images, "batch": args.batch}
        common |= {"workers": args.workers, "warm": args.warm, "steps": args.steps, "device": device}
        grid = [(n, s, p) for p in args.precisions for n in args.networks for s in args.sizes]
        cases = [Case(network=n, size=s, precision=p, **common) for n, s, p in grid]
        found: dict[Case, dict[str, list[Speed]]] = {case: {} for case in cases}
        for _ in range(args.repeats):
            for case in cases:
                for row, speed in speeds(case, args, root / "packs", versions):
                    found[case].setdefault(row, []).append(speed)
                    print(f"{title(case)}: {row}: {speed}", file=sys.stderr, flush=True)
        sources = [] if args.no_parts else [row for row in args.only if row in OURS]
        went = {(case, s): parts(case, s, root / "packs", args.seconds) for case in cases for s in sources}
    if args.plot:
        draw(went, args.plot)
    rates: dict[str, float | str] = {}
    tables = [table(case, rows, peak(case, rates)) for case, rows in found.items()]
    tables += [parts_table(went)] if went else []
    text = section("End to end", device, notes(args, images, load, versions) + _rates(rates), tables)
    show(text, args.out)


def notes(args: argparse.Namespace, images: int, load: float, versions: dict[str, str]) -> str:
    """What the tables are of."""
    drawn = f"{images:,} " + (f"images of {args.folder}" if args.folder else f"drawn JPEG of {args.px} px")
    with_peers = ", ".join(f"{name} {version}" for name, version in versions.items()) or "no peers"
    return (
        f"{drawn}; SimCLR, two views an image, crops of 0.08 to 1 of the area, head of {HIDDEN}, AdamW; {args.batch} "
        f"images a batch, {args.workers} process that reads in every row, OMP_NUM_THREADS not set. Median of "
        f"{args.repeats} runs of {args.steps} steps, started in turn; their start and first {args.warm} steps are not "
        f"measured. Ours by `accelerate launch -m sslcells.train`. {with_peers}. solo-learn's package asks for torch "
        f"1.9.1 and is not installed. Load of the machine before it: {load:.1f}."
    )


def _rates(rates: dict[str, float | str]) -> str:
    known = [f"{rate / 1e12:.3g} TFLOP/s in {p}" for p, rate in rates.items() if not isinstance(rate, str)]
    return f" One large product runs at {', '.join(known)}." if known else ""


if __name__ == "__main__":
    main()
