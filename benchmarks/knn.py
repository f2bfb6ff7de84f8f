"""Exact nearest neighbours of many queries in a large bank: ours, FAISS and scikit-learn on the same rows.

    python benchmarks/knn.py                                     # banks of 10,000, 100,000 and 1,000,000 rows of 512
    python benchmarks/knn.py --bank 20000 --queries 10000 --own  # leave-one-out: the queries' own sources left out

Each way runs in a process of its own, with as many threads as torch takes. Seconds include normalising the rows, and
for FAISS filling its index; memory is what the call takes beyond the rows themselves. `same` is the share of neighbours
that are ours, or as near to the last digits.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from _measure import in_fresh_process, limit_memory, markdown, peak_mib, product_rate, section, show
from torch import Tensor

from sslcells.evaluation.knn import neighbours

_NEAR = 1e-5
"""Cosines that differ by less are as near: rounding of single precision."""
WAYS = ("sslcells", "FAISS", "scikit-learn")


class Case(NamedTuple):
    """What is searched."""

    bank: int
    queries: int
    features: int
    k: int
    own: bool


def rows(case: Case) -> tuple[Tensor, Tensor]:
    """Queries (M, F) and bank (N, F) of a thousand clusters, equal at every call; with `own` queries are rows of it."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(1000, case.features, generator=generator)
    count = case.bank if case.own else case.bank + case.queries
    out = torch.randn(count, case.features, generator=generator)
    for start in range(0, count, 2**14):
        part = out[start : start + 2**14]
        part += centres[torch.randint(1000, (len(part),), generator=generator)]
    return out[: case.queries], out if case.own else out[case.queries :]


def _ours(query: Tensor, bank: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    sources = (torch.arange(case.queries), torch.arange(case.bank)) if case.own else (None, None)
    return neighbours(query, bank, case.k, *sources)


def _faiss(query: Tensor, bank: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(case.features)
    index.add(torch.nn.functional.normalize(bank).numpy())
    found = index.search(torch.nn.functional.normalize(query).numpy(), case.k + case.own)
    return _without_itself(*map(torch.from_numpy, found), case)


def _sklearn(query: Tensor, bank: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    from sklearn.neighbors import NearestNeighbors

    # Of unit rows the Euclidean order is the cosine's, and scikit-learn tiles it; its cosine keeps whole rows.
    unit = [torch.nn.functional.normalize(x).numpy() for x in (query, bank)]
    fitted = NearestNeighbors(n_neighbors=case.k + case.own, algorithm="brute").fit(unit[1])
    distance, index = fitted.kneighbors(unit[0])
    return _without_itself(torch.from_numpy(1 - distance.astype(np.float64) ** 2 / 2), torch.from_numpy(index), case)


def _without_itself(cosine: Tensor, index: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    if not case.own:
        return cosine, index
    others = index != torch.arange(case.queries)[:, None]
    others[others.all(1), -1] = False  # an equal row came first, and itself not at all
    return cosine[others].view(-1, case.k), index[others].view(-1, case.k)


def measure(way: str, case: Case, file: str) -> tuple[float, float]:
    """Seconds and MiB of one call; its cosines and indices are written to the file."""
    look = {"sslcells": _ours, "FAISS": _faiss, "scikit-learn": _sklearn}[way]
    small = case._replace(bank=2000, queries=200)
    look(*rows(small), small)  # its code is loaded, its threads are there
    query, bank = rows(case)
    taken, found = [], []

    def step() -> None:
        began = time.perf_counter()
        found.append(look(query, bank, case))
        taken.append(time.perf_counter() - began)

    mib = peak_mib(step, "cpu")
    torch.save(found[0], file)
    return taken[0], mib


def table(cases: list[Case], folder: Path) -> list[list[str]]:
    """A line for each case and way."""
    lines = []
    for case in cases:
        files = {way: folder / f"{way}.pt" for way in WAYS}
        for way in WAYS:
            files[way].unlink(missing_ok=True)
            result = in_fresh_process(measure, way, case, str(files[way]))
            figures = [result, "–", "–"] if isinstance(result, str) else [f"{result[0]:.1f}", f"{result[1]:,.0f}"]
            if not isinstance(result, str):
                figures.append(f"{_same(torch.load(files['sslcells']), torch.load(files[way])):.4f}")
            lines.append([f"{case.bank:,}", way, f"{case.queries:,}", *figures])
            print(" ".join(lines[-1]), flush=True)
    return lines


def _same(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> float:
    """Share of their neighbours that are among ours, or as near as our last one."""
    among = (theirs[1][:, :, None] == ours[1][:, None]).any(2)
    return float((among | (theirs[0] > ours[0][:, -1:] - _NEAR)).float().mean())


def main() -> None:
    """Measure every size and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bank", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--features", type=int, default=512)
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--own", action="store_true", help="queries are rows of the bank, each left out for itself")
    parser.add_argument("--out", type=Path, metavar="FILE", help="append the table to this file")
    args = parser.parse_args()
    limit_memory(os.getpid())
    cases = [Case(bank, min(args.queries, bank), args.features, args.k, args.own) for bank in args.bank]
    with tempfile.TemporaryDirectory() as folder:
        lines = table(cases, Path(folder))
    columns = ["bank", "way", "queries", "seconds", "MiB", "same"]
    load = os.getloadavg()[0]
    notes = (
        f"The {args.k} nearest of rows of {args.features}, float32; a matrix product alone runs at "
        f"{product_rate('cpu', 3) / 1e9:.0f} G operations a second. Load of the machine at the end: {load:.1f}."
    )
    text = section("Neighbours", "cpu", notes, [markdown(columns, lines)])
    show(text, args.out)


if __name__ == "__main__":
    main()
