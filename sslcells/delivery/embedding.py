"""`sslcells embed`: the features of a folder's images or a table's rows, in shards, on any number of ranks, resumed."""

import logging
import os
import signal
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from rich.console import Console
from torch import Tensor
from torch.utils.data import Sampler

from sslcells import launcher, ranks
from sslcells.config import ConfigError, extra, installed
from sslcells.data import DataError, Pick
from sslcells.data._names import some
from sslcells.data._patterns import Patterns, given
from sslcells.data.loader import Readable, read_readable, with_workers
from sslcells.delivery import DeliveryError
from sslcells.delivery.embedding_meter import Meter
from sslcells.delivery.encoder import Encoder, find_run, finite, load_encoder
from sslcells.delivery.labs import OfLabs, of_labs
from sslcells.delivery.listed import Listed, listed
from sslcells.delivery.shards import FORMATS, MANIFEST, NO_CELL, UNREADABLE, Embeddings, Shard, spelt
from sslcells.evaluation.encode import encode_batches
from sslcells.run.interrupt import Awaited, Interrupt, Stopped
from sslcells.run.lock import Lock
from sslcells.standardise import AS_THEY_ARE
from sslcells.storage import is_file
from sslcells.values import place

SHARD = 4096
"""Images a shard: the most that a kill costs one rank."""
_WAIT = 7 * 24 * 60.0
"""Minutes that a rank which is done waits for the others."""

_log = logging.getLogger(__name__)


def embed_folder(
    run: str | os.PathLike[str],
    images: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    format: str = "parquet",
    labels: bool = True,
    batch: int = 256,
    workers: int | None = None,
    shard: int | None = None,
    cpu: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    overrides: Sequence[str] = (),
    lab: str | None = None,
) -> Path:
    """Embed every image below a folder, or every row of a table (.csv, .tsv, .parquet).

    Returns the folder of shards, RUN/embeddings/NAME unless `out` names another. With a table they hold its columns
    too, and `overrides` are settings of it, such as `data.path=/images`; if the run was trained on this very table, its
    settings hold.

    `lab` is the laboratory of all images, for an encoder that standardises by laboratory: one that training knew, or
    a new one, which is measured on its images. Without it, the table or the folders name it as in training.

    `include` and `exclude` are patterns for the images' paths below the folder, as `data.include` and `data.exclude`.

    Shard k holds the images k·`shard` … of the sorted list of paths, whatever the number of ranks; a shard that
    exists is not computed again. Every rank of a launch must call this.

    Raises:
        ConfigError: if there is no such run or folder, it holds no images, a pattern matches none, or `out` holds
            embeddings of another encoder or of other images, or is in use.
        DataError: if the storage is gone, or a shard cannot be written.
        DeliveryError: if not one image could be read.
        Stopped: if a signal asked to stop.
        Lost: if another rank is gone.
    """
    run, images = os.fspath(run), os.fspath(images)
    if format not in FORMATS:
        raise ConfigError(f"--format {format}: there are {', '.join(FORMATS)}")
    for name, number in (("--batch", batch), ("--shard", SHARD if shard is None else shard)):
        if number < 1:
            raise ConfigError(f"{name} {number} should be at least 1")
    patterns = given(include, exclude)
    if workers is None:
        workers = max(1, min(8, launcher.share() - 1))
    with Interrupt() as interrupt:
        device = launcher.start(cpu, _WAIT, workers=workers).device
        lock: list[Lock] = []
        try:
            with ranks.parting():
                encoder = ranks.together(lambda: _load(run, device))
                begun = ranks.from_main(
                    lambda: _begin(run, images, out, format, labels, shard, encoder, lock, patterns, overrides, lab)
                )
                _work(*begun, encoder, device, batch, workers, interrupt)
                return begun[0].folder
        finally:
            for held in lock:
                held.release()


def _load(run: str, device: torch.device) -> Encoder:
    encoder = load_encoder(run, device)
    encoder.reader()
    if launcher.channels_last_for(device, "no"):
        encoder.backbone.to(memory_format=torch.channels_last)
    return encoder


def _begin(
    run: str,
    images: str,
    out: str | os.PathLike[str] | None,
    format: str,
    labels: bool,
    shard: int | None,
    encoder: Encoder,
    lock: list[Lock],
    patterns: Patterns,
    overrides: Sequence[str],
    lab: str | None,
) -> tuple[Embeddings, Listed, OfLabs | None, list[int]]:
    """On rank 0: open the folder of shards; returns it, the images, their laboratories, and the missing shards."""
    if lab is not None and not encoder.by_lab:
        raise ConfigError(f"--lab {lab}: the encoder of {run} takes each image by itself (standardise.by=image)")
    found = listed(run, images, encoder, patterns, overrides, labels)
    root = Path(found.root)
    folder = place(out) if out is not None else find_run(run) / "embeddings" / found.name
    inside = Path(os.path.realpath(folder)).is_relative_to(root.resolve())  # resolve() raises at a link to itself
    if inside and found.table is None:
        raise ConfigError(f"--out {folder} lies in {images}, the folder of images; choose another")
    if format == "h5ad":
        installed("anndata", "anndata", "--format h5ad")
        extra("h5py", "anndata", "--format h5ad")
        extra("pandas", "anndata", "--format h5ad")
    fresh = {
        "encoder": encoder.digest,
        "run": str(find_run(run).resolve()),
        "images": str(root.resolve()),
        "count": len(found.images),
        "list": found.digest,
        "shard": shard or SHARD,
        "format": format,
        "labels": labels,
        "features": encoder.features,
    }
    if found.table is not None:
        fresh |= {"table": found.table, "key": found.key}
    labs: OfLabs | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.append(Lock(folder, otherwise="choose another --out"))
        if is_file(folder / MANIFEST):
            before = Embeddings.open(folder)
            if shard is None:
                fresh["shard"] = before.size
            _same(before, Embeddings(folder, fresh))
            labs = of_labs(encoder, found, lab, before.labs)
            if labs is not None and before.labs is not None and [*labs.labs] != [*before.labs]:
                named = some([*before.labs], 8)
                raise ConfigError(f"{folder} was begun with the laboratories {named}; choose another --out")
        else:
            labs = of_labs(encoder, found, lab, None)
        if labs is not None:
            fresh["labs"] = labs.labs
        embeddings = Embeddings(folder, fresh)
        embeddings.begin()
        there = set(embeddings.written())
    except OSError as error:
        raise ConfigError(f"--out {folder} cannot be written: {error}") from None
    return embeddings, found, labs, [number for number in range(embeddings.shards) if number not in there]


def _same(before: Embeddings, now: Embeddings) -> None:
    """Raise a ConfigError if the existing shards do not fit those that would be added."""
    folder, other = now.folder, "; choose another --out"
    if before.encoder != now.encoder:
        raise ConfigError(
            f"{folder} holds embeddings of another encoder, {before.encoder} of {before.run}, not {now.encoder}{other}"
        )
    if before.listed != now.listed and now.table is not None and before.table is not None:
        raise ConfigError(
            f"{folder} was begun with another table, or other settings of it: {before.count} rows of {before.table}, "
            f"now {now.count} of {now.table}{other}"
        )
    if before.listed != now.listed:
        raise ConfigError(
            f"{folder} was begun with other images: {before.count} below {before.root}, now {now.count} below "
            f"{now.root}{other}"
        )
    for what, then, wanted in (
        ("--format", before.format, now.format),
        ("--shard", before.size, now.size),
        ("--labels", before.labels, now.labels),
    ):
        if then != wanted:
            raise ConfigError(f"{folder} was begun with {what} {then}, not {wanted}; use that value, or{other[1:]}")


def _work(
    embeddings: Embeddings,
    found: Listed,
    labs: OfLabs | None,
    missing: Sequence[int],
    encoder: Encoder,
    device: torch.device,
    batch: int,
    workers: int,
    interrupt: Interrupt,
) -> None:
    """Write this rank's part of the missing shards; then all ranks together list the unreadable images."""
    mine = missing[ranks.rank() :: ranks.world()]
    console = Console(highlight=False, quiet=ranks.rank() > 0)
    for line in labs.said if labs is not None else []:
        console.print(line, markup=False, soft_wrap=True)
    with Meter(embeddings, missing, console) as meter:
        failure: Exception | None = None
        try:
            _embed(embeddings, found, labs, mine, encoder, device, batch, workers, interrupt, meter)
        except Exception as error:  # logged at once, and raised on every rank when all are done
            failure = error
            if ranks.world() > 1:
                _log.error("rank %d stopped: %s; the other ranks finish their parts", ranks.rank(), error)
        ranks.raise_first(failure)
        received = ranks.largest(interrupt.received)
    folder = embeddings.folder
    if received:
        there = len(ranks.from_main(embeddings.written))
        name = signal.Signals(received).name
        raise Stopped(
            received,
            f"{folder}: stopped by {name} with {there} of {embeddings.shards} shards; the same command resumes",
        )

    def finish() -> tuple[int, int, str]:
        unreadable, no_cell = embeddings.write_unreadable(), embeddings.write_no_cell()
        return unreadable, no_cell, f", {embeddings.write_h5ad().name}" if embeddings.format == "h5ad" else ""

    unreadable, no_cell, more = ranks.from_main(finish)
    if unreadable == embeddings.count:
        path, why = ranks.from_main(lambda: next(iter(embeddings.unreadable())))
        raise DeliveryError(
            f"none of the {unreadable} images below {embeddings.root} could be read, such as {path}: {why}; "
            f"{folder / UNREADABLE} lists them all. When they are repaired, remove {folder} and embed again"
        )
    listed = f"; {unreadable} could not be read: {folder / UNREADABLE}" if unreadable else ""
    listed += f"; no cell was found in {no_cell} of them, {AS_THEY_ARE}: {folder / NO_CELL}" if no_cell else ""
    console.print(
        f"{folder}: {embeddings.count - unreadable} images of {embeddings.features} features in "
        f"{embeddings.shards} shards{more}{listed}",
        markup=False,
        soft_wrap=True,
    )


def _embed(
    embeddings: Embeddings,
    found: Listed,
    labs: OfLabs | None,
    mine: Sequence[int],
    encoder: Encoder,
    device: torch.device,
    batch: int,
    workers: int,
    interrupt: Interrupt,
    meter: Meter,
) -> None:
    """Make and write these shards, one after the other, until all are done or a signal asks to stop."""
    root = embeddings.root
    failed = list[Tensor]()  # of the last batch

    def features(part: Readable) -> Tensor:
        prepared = encoder.prepared(part.pixels, None if labs is None else labs.at(part.image))
        failed[:] = [prepared.failed]
        return encoder.features_of(prepared)

    ahead = read_readable(found.images, _Parts(embeddings, mine, batch), workers, pin_memory=device.type == "cuda")
    with with_workers(ahead) as parts, suppress(Awaited):
        encoded = encode_batches(_awaited(parts, root, interrupt), features, meter.add)
        for number in mine:
            rows, wanted, held = [], len(embeddings.members(number)), list[Readable]()
            no_cell = list[int]()
            while wanted:
                part, z = next(encoded)
                wanted -= part.size
                if z is not None:
                    rows.append(finite(z.cpu(), encoder))
                    no_cell += [part.image[i] for i in failed[0].nonzero()[:, 0].tolist()]
                held.append(part._replace(pixels=[]))
            embeddings.write(number, _shard(embeddings, found, held, rows, no_cell))


def _awaited(parts: Generator[Readable, None, None], root: str, interrupt: Interrupt) -> Iterator[Readable]:
    """The parts as they are read.

    Raises:
        Awaited: if a signal asks to stop while a part is waited for.
        DataError: if images are unreadable because their folder is gone.
    """
    while True:
        with interrupt.waiting():
            part = next(parts, None)
        if part is None:
            return
        if part.unreadable:
            _still_there(root)
        yield part


def _shard(
    embeddings: Embeddings, found: Listed, held: Sequence[Readable], rows: Sequence[Tensor], no_cell: Sequence[int]
) -> Shard:
    """The shard of the parts that were read, the rows (B, F) of those with readable images, and images without cell."""
    ids, name = [i for part in held for i in part.image], found.images.name
    return Shard(
        np.array(ids, dtype=np.int64),
        [spelt(name(i)) for i in ids],
        torch.cat(list(rows)).numpy() if rows else np.zeros((0, embeddings.features), dtype=np.float32),
        [found.label(i) for i in ids] if embeddings.labels else None,
        [(spelt(name(i)), found.reason(i, why)) for part in held for i, why in part.unreadable],
        None if found.more is None else found.more.take(pa.array(ids, pa.int64())),
        [spelt(name(i)) for i in no_cell],
    )


def _still_there(root: str) -> None:
    """Raise a DataError if the folder of images is gone: then its images must not be listed as unreadable."""
    try:
        with os.scandir(root) as entries:
            there = next(entries, None) is not None
    except OSError:
        there = False
    if not there:
        raise DataError(f"{root} is gone, or empty now; the same command resumes when it is back")


class _Parts(Sampler[list[Pick]]):
    """The images of some shards, `batch` at a time; a batch never spans two shards."""

    def __init__(self, embeddings: Embeddings, shards: Sequence[int], batch: int) -> None:
        self._embeddings, self._shards, self._batch = embeddings, shards, batch

    def __iter__(self) -> Iterator[list[Pick]]:
        for number in self._shards:
            members = self._embeddings.members(number)
            for start in range(0, len(members), self._batch):
                yield [Pick(i) for i in members[start : start + self._batch]]

    def __len__(self) -> int:
        return sum(-(-len(self._embeddings.members(number)) // self._batch) for number in self._shards)
