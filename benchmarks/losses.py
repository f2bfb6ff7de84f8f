"""Time and memory of the losses compared with their peers: `python benchmarks/losses.py --out benchmarks/RESULTS.md`.

Every figure is for one forward and backward pass over (N, 128) float32 rows, which the loss normalises; each
implementation has its own process, on a CPU for each N. All implementations of a task compute the same loss; for small
N their gradients are compared with a float64 reference. Peers (pip install lightly pytorch-metric-learning) that are
not installed are left out. An implementation stops at the first N that fails.
"""

import argparse
import functools
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch
from _measure import (
    draw,
    fresh_process,
    in_fresh_process,
    limit_memory,
    markdown,
    peak_mib,
    product_rate,
    seconds,
    section,
    show,
)
from torch import Tensor
from torch.nn import functional as F

WIDTH = 128
TEMPERATURE = 0.1
MARGIN = 0.2
SIZES = {
    "cpu": [512, 1024, 2048, 4096, 8192, 16384],
    "cuda": [1024, 4096, 16384, 65536, 131072, 1048576],
}
LARGEST_REFERENCE = 4096
COLUMNS = ["N", "implementation", "best s", "median s", "extra peak MiB", "time ÷ ours", "memory ÷ ours"]
COLUMNS += ["of the product rate", "gradient error"]

Loss = Callable[[Tensor], Tensor]


class Form(NamedTuple):
    """One implementation of a task's loss."""

    name: str
    build: Callable[[Tensor], Loss]
    """(N,) ids, equal for the views of an image or the rows of a class → the loss of (N, D) rows"""
    largest: int | None = None
    cuda_only: bool = False


class Task(NamedTuple):
    """A loss, and who computes it; the first form is ours, the second the one that float64 references come from."""

    title: str
    products: int
    """operations of its matrix products, in N²·D"""
    forms: tuple[Form, ...]


class Result(NamedTuple):
    """What was measured of one form at one size."""

    best: float
    median: float
    mib: float
    error: float | None
    """of the gradient against float64, relative, in the 2-norm"""


def sslcells_nt_xent(ids: Tensor, precision: str = "bf16") -> Loss:
    """Ours; the precision is that of the fused kernels on CUDA."""
    from sslcells.losses import NTXentLoss

    loss = NTXentLoss(TEMPERATURE, precision=precision)
    return lambda z: loss(*z.chunk(2))


def plain_nt_xent(ids: Tensor) -> Loss:
    """Cross-entropy over the full similarity matrix, as in most repositories."""
    partner = torch.arange(len(ids), device=ids.device).roll(len(ids) // 2)

    def loss(z: Tensor) -> Tensor:
        rows = F.normalize(z, dim=1)
        return F.cross_entropy((rows @ rows.T / TEMPERATURE).fill_diagonal_(-torch.inf), partner)

    return loss


def lightly_nt_xent(ids: Tensor) -> Loss:
    """lightly.loss.NTXentLoss."""
    from lightly.loss import NTXentLoss

    loss = NTXentLoss(TEMPERATURE)
    return lambda z: loss(*z.chunk(2))


def pml_sup_con(ids: Tensor) -> Loss:
    """SupConLoss with the image as the label: the same loss."""
    from pytorch_metric_learning.losses import SupConLoss

    loss = SupConLoss(TEMPERATURE)
    return lambda z: loss(z, ids)


def pml_nt_xent(ids: Tensor) -> Loss:
    """NTXentLoss, which pairs every positive pair with every negative pair: 17·N³ bytes."""
    from pytorch_metric_learning.losses import NTXentLoss

    loss = NTXentLoss(TEMPERATURE)
    return lambda z: loss(z, ids)


def flex_nt_xent(ids: Tensor) -> Loss:
    """The logsumexp that FlexAttention returns beside its output; products in bf16, the positive pair in float32.

    The fastest form without a kernel of one's own. It also attends to 16 columns of values, the fewest that there may
    be, and its gradient makes the products for queries and keys apart: about 14·N²·D operations in place of 6.
    """
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    attend = torch.compile(flex_attention, dynamic=False)

    def others(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return torch.where(query == key, -torch.inf, score)

    def loss(z: Tensor) -> Tensor:
        rows = F.normalize(z, dim=1)
        keys = rows.bfloat16()[None, None]  # (1, 1, N, D)
        values = keys.new_zeros(1, 1, len(z), 16)
        wanted = AuxRequest(lse=True)
        _, aux = attend(keys, keys, values, score_mod=others, scale=1 / TEMPERATURE, return_aux=wanted)
        positive = (rows * rows.roll(len(z) // 2, 0)).sum(1) / TEMPERATURE
        return (aux.lse[0, 0] - positive).mean()

    return loss


def sslcells_triplet(ids: Tensor, precision: str = "exact") -> Loss:
    """Ours."""
    from sslcells.losses import BatchHardTripletLoss

    loss = BatchHardTripletLoss(MARGIN, precision=precision)
    return lambda z: loss(z, ids)


def plain_triplet(ids: Tensor) -> Loss:
    """Extremes of the full distance matrix."""

    def loss(z: Tensor) -> Tensor:
        rows = F.normalize(z, dim=1)
        distance = torch.cdist(rows, rows)
        same = ids[:, None] == ids
        far = distance.masked_fill(~same, -torch.inf).amax(1)
        near = distance.masked_fill(same, torch.inf).amin(1)
        return (far - near + MARGIN).clamp_min(0).mean()

    return loss


def pml_triplet(ids: Tensor) -> Loss:
    """BatchHardMiner and TripletMarginLoss, with the mean over all anchors."""
    from pytorch_metric_learning.losses import TripletMarginLoss
    from pytorch_metric_learning.miners import BatchHardMiner
    from pytorch_metric_learning.reducers import MeanReducer

    miner, loss = BatchHardMiner(), TripletMarginLoss(MARGIN, reducer=MeanReducer())
    return lambda z: loss(z, ids, miner(z, ids))


TASKS = {
    "nt-xent": Task(
        f"NT-Xent, temperature {TEMPERATURE}",
        6,
        (
            Form("sslcells", sslcells_nt_xent),
            Form("plain torch", plain_nt_xent),
            Form("lightly", lightly_nt_xent),
            Form("pytorch-metric-learning SupConLoss", pml_sup_con),
            Form("pytorch-metric-learning NTXentLoss", pml_nt_xent, largest=512),
            Form("FlexAttention in bf16", flex_nt_xent, cuda_only=True),
            Form("sslcells in tf32", functools.partial(sslcells_nt_xent, precision="tf32"), cuda_only=True),
        ),
    ),
    "triplet": Task(
        f"Batch-hard triplet, margin {MARGIN}",
        2,
        (
            Form("sslcells", sslcells_triplet),
            Form("plain torch", plain_triplet),
            Form("pytorch-metric-learning", pml_triplet),
            Form("sslcells, mined in bf16", functools.partial(sslcells_triplet, precision="bf16"), cuda_only=True),
        ),
    ),
}


def sample(size: int, group: int) -> tuple[Tensor, Tensor]:
    """(N, D) float64 rows in groups about random centres, and their (N,) ids; the same at every call."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.arange(size // group).repeat(group)
    centres = torch.randn(size // group, WIDTH, generator=generator)
    return (centres[ids] + torch.randn(size, WIDTH, generator=generator)).double(), ids


def step_of(form: Form, size: int, group: int, device: str, dtype: torch.dtype) -> tuple[Callable[[], None], Tensor]:
    """One forward and backward pass as a call, and the rows whose `grad` it leaves."""
    rows, ids = sample(size, group)
    z = rows.to(device, dtype).requires_grad_()
    loss = form.build(ids.to(device))

    def step() -> None:
        z.grad = None
        loss(z).backward()

    return step, z


def measure(task: str, name: str, size: int, group: int, device: str, matmul: str, repeats: int) -> Result:
    """Time, memory and accuracy of one form at one size; runs in a process of its own."""
    torch.set_float32_matmul_precision(matmul)
    if device == "cpu":
        limit_memory(os.getpid())
    form = next(f for f in TASKS[task].forms if f.name == name)
    little, _ = step_of(form, 128, group, device, torch.float32)
    little()
    if device == "cuda":
        torch.cuda.empty_cache()  # of the size before
    step, z = step_of(form, size, group, device, torch.float32)
    mib = peak_mib(step, device)
    taken = seconds(step, device, repeats)
    error = None
    if size <= LARGEST_REFERENCE:
        exact, reference = step_of(TASKS[task].forms[1], size, group, device, torch.float64)
        exact()
        error = ((z.grad - reference.grad).norm() / reference.grad.norm()).item()
    return Result(min(taken), statistics.median(taken), mib, error)


def run(args: argparse.Namespace) -> dict[str, dict[tuple[int, str], Result | str]]:
    """All requested results, by task, then by size and form."""
    results: dict[str, dict[tuple[int, str], Result | str]] = {}
    ends = time.monotonic() + args.budget
    for key, task in TASKS.items():
        forms = list(wanted(key, task, args))
        found = {(size, form.name): each for form in forms for size, each in curve(key, form, args, ends)}
        ordered = {(s, form.name): found[s, form.name] for s in args.sizes for form in forms if (s, form.name) in found}
        results |= {key: ordered} if ordered else {}
    return results


def curve(key: str, form: Form, args: argparse.Namespace, ends: float) -> Iterator[tuple[int, Result | str]]:
    """A form's result at each size, up to the first that fails or would begin after `ends`.

    A CPU counts a process's peak memory, so each size has its own process there; on CUDA all sizes have one.
    """
    with ExitStack() as stack:
        call = stack.enter_context(fresh_process()) if args.device == "cuda" else in_fresh_process
        for size in args.sizes:
            if form.largest is not None and size > form.largest:
                return
            group = args.per_class if key == "triplet" else 2
            arguments = (key, form.name, size, group, args.device, args.matmul, args.repeats)
            late = time.monotonic() > ends
            result = f"left out: --budget {args.budget:g}" if late else call(measure, *arguments)
            told = result if isinstance(result, str) else f"{result.best:.3g} s, {result.mib:,.1f} MiB"
            print(f"{key}, N = {size:,}, {form.name}: {told}", file=sys.stderr, flush=True)
            yield size, result
            if isinstance(result, str):
                return


def wanted(key: str, task: Task, args: argparse.Namespace) -> Iterable[Form]:
    """The forms of a task that run on the device and that --only names."""
    for form in task.forms:
        if (args.device == "cuda" or not form.cuda_only) and any(part in f"{key} {form.name}" for part in args.only):
            yield form


def table(task: Task, results: dict[tuple[int, str], Result | str], rate: float) -> str:
    """The results of a task, with ratios to ours."""
    rows = []
    for (size, name), result in results.items():
        if isinstance(result, str):
            rows.append([f"{size:,}", name, result, *[""] * (len(COLUMNS) - 3)])
            continue
        ours = results.get((size, task.forms[0].name))
        known = isinstance(ours, Result)
        rows.append(
            [
                f"{size:,}",
                name,
                f"{result.best:.3g}",
                f"{result.median:.3g}",
                f"{result.mib:,.1f}",
                f"{result.best / ours.best:,.2f}" if known else "",
                f"{result.mib / ours.mib:,.2f}" if known and ours.mib > 0 else "",
                f"{task.products * size**2 * WIDTH / result.best / rate:.1%}",
                f"{result.error:.1e}" if result.error is not None else "",
            ]
        )
    return f"### {task.title}\n\n{markdown(COLUMNS, rows)}"


def curves(task: Task, results: dict[tuple[int, str], Result | str]) -> dict[str, list[tuple[int, float, float]]]:
    """(N, seconds, MiB) of each form, in the task's order."""
    measured = {form.name: [] for form in task.forms}
    for (size, name), result in results.items():
        if isinstance(result, Result):
            measured[name].append((size, result.best, result.mib))
    return measured


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=SIZES, default=here)
    parser.add_argument("--sizes", type=int, nargs="+", metavar="N", help="numbers of rows, multiples of 4")
    parser.add_argument("--per-class", type=int, choices=(2, 4), default=4, help="rows of a class, for the triplet")
    words = "parts of `task implementation`, such as triplet or 'nt-xent light'"
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORDS", help=words)
    parser.add_argument("--repeats", type=int, default=5, help="timed passes of each, at least, for a second in all")
    parser.add_argument("--budget", type=float, default=math.inf, metavar="SECONDS", help="begin nothing after them")
    modes = "torch's float32 matmul precision (high allows TF32)"
    parser.add_argument("--matmul", choices=("highest", "high", "medium"), default="highest", help=modes)
    parser.add_argument("--out", type=Path, metavar="FILE", help="also append the section to this file")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw seconds and MiB against N")
    args = parser.parse_args()
    args.sizes = sorted(args.sizes or SIZES[args.device])
    if args.repeats < 1 or any(size < 4 or size % 4 for size in args.sizes):
        parser.error(f"--sizes {args.sizes} must be multiples of 4, and --repeats {args.repeats} at least 1")
    return args


def main() -> None:
    """Measure, print, and write the section and plots."""
    args = arguments()
    results = run(args)
    rate = in_fresh_process(product_rate, args.device, args.repeats)
    if not results or isinstance(rate, str):
        raise SystemExit(f"nothing matches --only {' '.join(args.only)}" if not results else f"matrix product: {rate}")
    dtype = "bfloat16" if args.device == "cuda" else "float32"
    notes = (
        f"Forward + backward of (N, {WIDTH}) float32 rows on {args.device}, best of {args.repeats} passes or more; "
        f"float32 matmul precision `{args.matmul}`; {args.per_class} rows a class in the triplet. "
        f"A large {dtype} product runs at {rate / 1e9:,.0f} GFLOP/s; the losses are charged "
        + ", ".join(f"{task.products}·N²·D ({key})" for key, task in TASKS.items())
        + " whatever they spend. Gradient error: relative, against float64."
    )
    text = section("Losses", args.device, notes, [table(TASKS[key], each, rate) for key, each in results.items()])
    show(text, args.out)
    if args.plot:
        draw({TASKS[key].title: curves(TASKS[key], each) for key, each in results.items()}, args.plot)


if __name__ == "__main__":
    main()
