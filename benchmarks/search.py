"""Search among many embeddings: exact search compared with FAISS, on the same rows in one process.

  python benchmarks/search.py runs/simclr_pbc28 data.path=pbc28.npz --sizes 10000 100000 --out benchmarks/RESULTS.md

The rows are features of augmented views of the run's train images, as many as `--sizes` says; the queries are images of
its test split. The time is that of `sslcells search`, which includes reading the shards from the disk.
"""

import argparse
import functools
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from _measure import markdown, seconds, section, show
from torch import Tensor

from sslcells import models
from sslcells.augment import Augment
from sslcells.config import load
from sslcells.data import ImageSet
from sslcells.delivery.encoder import Encoder, load_encoder
from sslcells.delivery.search import approximately, exactly, source_finder
from sslcells.delivery.shards import Embeddings, Shard
from sslcells.plan import open_run

K, BATCH, SHARD = 10, 512, 4096


@torch.inference_mode()
def views(encoder: Encoder, augment: Augment, images: ImageSet) -> Iterator[Tensor]:
    """Features of views of the images, (B, F) each: of all of them once, then of all once more, and so on for ever."""
    epoch = 0
    while True:
        for start in range(0, len(images), BATCH):
            index = torch.arange(start, min(start + BATCH, len(images)))
            pixels = torch.stack([images.pixels(i) for i in index.tolist()])
            yield encoder.backbone(augment(pixels, index, seed=0, step=epoch, views=1))
        epoch += 1


def written(folder: Path, rows: Iterator[Tensor], count: int, features: int) -> Embeddings:
    """So many rows as `sslcells embed` writes them."""
    about = {"encoder": "views", "run": "", "images": "", "count": count, "list": f"{count:016}", "shard": SHARD}
    embeddings = Embeddings(folder, about | {"format": "parquet", "labels": False, "features": features})
    folder.mkdir()
    embeddings.begin()
    left = torch.zeros(0, features)
    for number in range(embeddings.shards):
        members = embeddings.members(number)
        while len(left) < len(members):
            left = torch.cat([left, next(rows)])
        taken, left = left[: len(members)], left[len(members) :]
        names = [f"view_{i:09}.png" for i in members]
        embeddings.write(number, Shard(np.array(members), names, taken.numpy(), None, []))
    return embeddings


def measure(embeddings: Embeddings, queries: Tensor) -> list[list[str]]:
    """Two lines of the table."""
    ids = source_finder(None, None)
    own = ids([f"query {i}" for i in range(len(queries))])
    found, taken = {}, {}
    began = time.perf_counter()
    approximately(embeddings, queries[:1], own[:1], K, ids, torch.device("cpu"))
    made = time.perf_counter() - began
    for name, look in (("every row", exactly), ("FAISS", approximately)):
        search = functools.partial(look, embeddings, sources=ids, k=K, device=torch.device("cpu"))
        found[name] = [[one.path for one in near] for near in search(query=queries, source=own)]
        one = functools.partial(search, query=queries[:1], source=own[:1])
        every = functools.partial(search, query=queries, source=own)
        taken[name] = [min(seconds(call, "cpu", 2)) for call in (one, every)]
    index = sum(file.stat().st_size for file in embeddings.folder.glob("*.faiss")) / 2**20
    rows = []
    for name, (one_s, every_s) in taken.items():
        pairs = list(zip(found[name], found["every row"], strict=True))
        first = np.mean([near[:1] == true[:1] for near, true in pairs])
        ten = np.mean([len(set(near) & set(true)) / K for near, true in pairs])
        once = ["–", "–"] if name == "every row" else [f"{made:.1f}", f"{index:.0f}"]
        ratios = [f"{taken['every row'][i] / t:.2f}" for i, t in enumerate((one_s, every_s))]
        figures = [f"{one_s:.3f}", ratios[0], f"{every_s:.3f}", ratios[1], f"{first:.3f}", f"{ten:.3f}"]
        rows.append([f"{embeddings.count:,}", name, *once, *figures])
    return rows


def main() -> None:
    """Measure every size, print the table, and write the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="where its images are now")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--out", type=Path, metavar="FILE", help="also append the section to this file")
    args = parser.parse_intermixed_args()
    run, encoder = load(str(args.run / "config.yaml"), args.overrides), load_encoder(args.run)
    splits = open_run(run)
    augment = Augment(run.augment, *models.preparation(run.model, splits["train"].channels))
    pixels = torch.stack([splits["test"].pixels(i) for i in range(min(args.queries, len(splits["test"])))])
    with torch.inference_mode():
        queries = encoder(pixels)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for size in args.sizes:
            endless = views(encoder, augment, splits["train"])
            rows += measure(written(Path(folder) / str(size), endless, size, encoder.features), queries)
            print("\n".join(" ".join(row) for row in rows[-2:]), flush=True)
    times = ["1 query, s", "quicker", f"{len(queries)} queries, s", "quicker"]
    columns = ["rows", "way", "index made, s", "index, MiB", *times, "recall@1", f"recall@{K}"]
    table = markdown(columns, rows)
    notes = (
        f"Features ({encoder.features}) of augmented views of the train images of `{args.run.name}`; queries are its "
        f"test images; {K} neighbours each. A call reads the shards, or the index and the shards of what was found."
    )
    text = section("Search", "cpu", notes, [table])
    show(text, args.out)


if __name__ == "__main__":
    main()
