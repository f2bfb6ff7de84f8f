"""What the documentation's pages name beside the folder of the first hour: tables, TIFF stacks, shards, Parquet."""

import csv
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tifffile


def draw_what_pages_name(folder: Path) -> None:
    """Write cells.csv, path/to/tiffs, shards and my_dataset, of the images in path/to/cells."""
    images = sorted((folder / "path/to/cells").rglob("*.png"))
    write_table(folder / "cells.csv", images)
    write_sources(folder / "runs/sources/sources.csv", folder / "path/to/cells", images)
    write_stacks(folder / "path/to/tiffs", 300)
    write_shard(folder / "shards" / "cells-train-000.tar", images)
    write_parquet(folder / "my_dataset" / "data" / "train-00000-of-00001.parquet", images)


def write_table(file: Path, images: list[Path]) -> None:
    """A row an image, of eight donors at two sites."""
    with file.open("w", newline="") as out:
        rows = csv.writer(out)
        rows.writerow(["path", "label", "donor", "site"])
        rows.writerows(
            [image.relative_to(file.parent), image.parent.name, f"d{i % 8}", f"s{i % 2}"]
            for i, image in enumerate(images)
        )


def write_sources(file: Path, folder: Path, images: list[Path]) -> None:
    """What `sslcells sources` writes: eight photographs."""
    file.parent.mkdir(parents=True)
    lines = [f"{image.relative_to(folder).as_posix()},photograph_{i % 8}" for i, image in enumerate(images)]
    file.write_text("\n".join(["path,source", *lines]) + "\n", encoding="utf-8")


def write_stacks(folder: Path, count: int) -> None:
    """TIFF files of five channels of 16 bit."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for i in range(count):
        pixels = random.integers(0, 4096, (5, 24, 24), dtype=np.uint16)
        tifffile.imwrite(folder / f"{i}.tif", pixels, photometric="minisblack")


def write_shard(file: Path, images: list[Path]) -> None:
    """A WebDataset shard: each image, and a JSON that names its class."""
    file.parent.mkdir(parents=True)
    with tarfile.open(file, "w") as tar:
        for i, image in enumerate(images):
            about = json.dumps({"cell_type": image.parent.name}).encode()
            for suffix, data in (("png", image.read_bytes()), ("json", about)):
                member = tarfile.TarInfo(f"{i:05}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def write_parquet(file: Path, images: list[Path]) -> None:
    """A file as Hugging Face's datasets writes it."""
    file.parent.mkdir(parents=True)
    names = sorted({image.parent.name for image in images})
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    columns = {
        "image": pa.array([{"bytes": image.read_bytes(), "path": None} for image in images]),
        "label": pa.array([names.index(image.parent.name) for image in images], pa.int64()),
    }
    about = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(pa.table(columns).replace_schema_metadata(about), file, row_group_size=100)
