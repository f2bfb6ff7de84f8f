"""Images a second that reach the training process: files, pack, cache, and the loaders of torchvision and lightly.

    python benchmarks/throughput.py ../shared/data/pbc96                       # JPEG of 96×96 px
    python benchmarks/throughput.py my/cells --size 128 --workers 8 --out benchmarks/RESULTS.md
    python benchmarks/throughput.py --drawn 4096 360 --size 64 --only files device   # drawn JPEG of 360 px

Every row reads the train images (or all, where there is no train folder) in random order and batches, uint8 and without
augmentation, in a process of its own; the first pass is not measured. CPU time, of all processes, tells more than the
clock where something else shares the cores. Then a ResNet-18 trains at 64 px in bf16, and says how long it waits for
data. `device` is data.decode=device: on CUDA where there is one (not yet measured on a GPU), else on the CPU, where it
is for tests and has one process to decode in. Peers (pip install lightly) that are not installed are left out.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from _measure import in_fresh_process, markdown, section, show
from PIL import Image
from torch.utils.data import DataLoader

ROWS = ("files", "pack", "cache", "device", "torchvision", "lightly")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _ours(data: list[str], batch: int, workers: int, passes: int) -> Iterator[int]:
    """The number of batches in a pass, then that of images in each batch, as training reads them."""
    from sslcells.config import load
    from sslcells.data import open_splits
    from sslcells.data.loader import read, with_workers
    from sslcells.data.sampler import Shuffle, Steps

    images = open_splits(load(None, data).data)["train"]
    steps = Steps(Shuffle(len(images), batch, 0), 0, 1, 0, passes * (len(images) // batch))
    yield len(images) // batch
    with with_workers(read(images, steps, workers, pin_memory=False, device=torch.device(DEVICE))) as batches:
        for read_batch in batches:
            assert read_batch.pixels.dtype == torch.uint8
            if read_batch.pixels.is_cuda:
                torch.cuda.synchronize()
            yield len(read_batch.image)


@contextmanager
def _classes_alone(folder: str) -> Iterator[str]:
    """A folder of links to the classes: torchvision takes a hidden folder for a class without images."""
    with tempfile.TemporaryDirectory() as links:
        for each in Path(folder).resolve().iterdir():
            if each.is_dir() and not each.name.startswith("."):
                (Path(links) / each.name).symlink_to(each)
        yield links


def _theirs(row: str, folder: str, size: int | None, batch: int, workers: int, passes: int) -> Iterator[int]:
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    change: Any = v2.Compose([*([v2.Resize((size, size))] if size else []), v2.PILToTensor()])
    with _classes_alone(folder) as classes:
        if row == "lightly":
            from lightly.data import LightlyDataset

            images: Any = LightlyDataset(classes, transform=change)
        else:
            images = ImageFolder(classes, transform=change)
        options: dict[str, Any] = {"shuffle": True, "drop_last": True, "num_workers": workers}
        loader: Any = DataLoader(images, batch, persistent_workers=workers > 0, **options)
        yield len(loader)
        for _ in range(passes):
            for pixels, *_ in loader:
                assert pixels.dtype == torch.uint8
                yield len(pixels)


def measure(row: str, folder: str, pack: str, size: int | None, batch: int, workers: int, passes: int) -> list[float]:
    """Images, seconds and seconds of CPU of the passes after the first."""
    sized = [f"data.size={size}"] if size else []
    files = ["data.kind=folder", f"data.path={folder}", "data.verify=header", *sized]
    data = {"files": files, "cache": [*files, "data.cache=ram"], "device": [*files, "data.decode=device"]}
    data["pack"] = ["data.kind=pack", f"data.path={pack}"]
    train = Path(folder) / "train"
    theirs = str(train if train.is_dir() else folder)
    counts = (
        _ours(data[row], batch, workers, passes) if row in data else _theirs(row, theirs, size, batch, workers, passes)
    )
    in_pass, seen = next(counts), 0
    for number, count in enumerate(counts, 1):
        seen += count
        if number == in_pass:
            first = seen, time.perf_counter(), _cpu()
        if number == passes * in_pass:  # before the processes end, whose time would be lost
            last = seen, time.perf_counter(), _cpu()
    return [end - begin for end, begin in zip(last, first, strict=True)]


def _cpu() -> float:
    """Seconds of CPU of this process and those that it started."""
    own = psutil.Process()
    times = [process.cpu_times() for process in (own, *own.children(recursive=True))]
    return sum(each.user + each.system for each in times)


def waits(data: list[str], steps: int, batch: int, workers: int, out: str) -> list[float]:
    """Images a second and share of the time spent waiting for data of a ResNet-18 at 64 px in bf16."""
    from sslcells.config import load
    from sslcells.run.metrics import read_metrics
    from sslcells.train import train

    words = ["model.backbone=resnet18", "augment.size=64", "train.precision=bf16", f"train.global_batch={batch}"]
    words += [f"train.total_steps={steps}", f"train.workers={workers}", f"out={out}", "evaluate.pictures=false"]
    words += [f"log.every_steps={max(1, steps // 2)}", "evaluate.max_images=256", f"checkpoint.every_steps={steps}"]
    rows = [row for row in read_metrics(train(load(None, [*words, *data]))) if "data_wait" in row]
    return [float(rows[-1]["images_per_second"]), float(rows[-1]["data_wait"])]


def draw(folder: Path, count: int, side: int) -> None:
    """JPEG files of drawn cells in two classes, of 16 different cells in several qualities."""
    from sslcells.data._smear import draw_smear

    cells = [Image.fromarray(draw_smear(7, i, i % 5, side)) for i in range(16)]
    for i in range(count):
        below = folder / "train" / "ab"[i % 2]
        below.mkdir(parents=True, exist_ok=True)
        cells[i % 16].save(below / f"{i:06}.jpg", quality=75 + i % 20)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", help="folder of images, with classes below it or below its train/")
    parser.add_argument("--drawn", nargs=2, type=int, metavar=("COUNT", "SIDE"), help="instead, drawn JPEG of SIDE px")
    parser.add_argument("--size", type=int, help="resize to this many pixels, where images differ in size")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--passes", type=int, default=3, help="passes over the images, of which the first is left out")
    parser.add_argument("--only", nargs="+", default=ROWS, choices=ROWS)
    parser.add_argument("--steps", type=int, default=8, help="of the ResNet-18; 0 trains none")
    parser.add_argument("--out", type=Path, help="append the section to this file")
    args = parser.parse_args()
    if (args.folder is None) == (args.drawn is None):
        parser.error("give a folder or --drawn")
    return args


def main() -> None:
    """Print the tables."""
    args = arguments()
    from sslcells.delivery.packing import pack

    with tempfile.TemporaryDirectory() as temporary:
        packed = f"{temporary}/pack"
        if args.drawn:
            args.folder = f"{temporary}/drawn"
            draw(Path(args.folder), *args.drawn)
        sized = [f"data.size={args.size}"] if args.size else []
        packing = ""
        if "pack" in args.only or args.steps:
            began = time.perf_counter()
            pack(args.folder, packed, sized)
            packing = f" Packing took {time.perf_counter() - began:.1f} s."
        options = (args.folder, packed, args.size, args.batch, args.workers, args.passes)
        found = {row: in_fresh_process(measure, row, *options) for row in args.only}
        found = {f"device ({DEVICE})" if row == "device" else row: value for row, value in found.items()}
        rate, cpu = ({k: v[0] / v[at] for k, v in found.items() if not isinstance(v, str)} for at in (1, 2))
        rows = [[row, value] if isinstance(value, str) else _line(row, rate, cpu) for row, value in found.items()]
        notes = f"{args.batch} images a batch, {args.workers} processes that read.{packing}"
        parts = [markdown(["source", "images/s", "× files", "images a CPU second", "× files"], rows)]
        if args.steps:
            of = {"files": ["data.kind=folder", f"data.path={args.folder}", "data.verify=header", *sized]}
            of["pack"] = ["data.kind=pack", f"data.path={packed}"]
            if DEVICE == "cuda":
                of["device (cuda)"] = [*of["files"], "data.decode=device"]
            trained = {k: waits(v, args.steps, args.batch, args.workers, f"{temporary}/{k}") for k, v in of.items()}
            lines = [[k, f"{speed:,.0f}", f"{100 * wait:.2f} %"] for k, (speed, wait) in trained.items()]
            parts.append(markdown(["ResNet-18, 64 px, bf16, on", "images/s", "waits for data"], lines))
    text = section("Throughput", DEVICE, notes, parts)
    show(text, args.out)


def _line(row: str, rate: dict[str, float], cpu: dict[str, float]) -> list[str]:
    cells = [row]
    for each in (rate, cpu):
        cells += [f"{each[row]:,.0f}", f"{each[row] / each['files']:.1f}" if "files" in each else ""]
    return cells


if __name__ == "__main__":
    main()
