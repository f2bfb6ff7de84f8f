"""`sslcells search`: the embedded images that are nearest to a query by cosine."""

import csv
import dataclasses
import io
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sslcells import launcher
from sslcells.config import ConfigError, extra, installed, nearest
from sslcells.data import Unreadable, check_pattern, look_up_sources, read_table, source_ids
from sslcells.data._boxes import cut
from sslcells.data._names import some
from sslcells.delivery.encoder import Encoder, find_run, load_encoder
from sslcells.delivery.shards import MANIFEST, SHOWN, Embeddings, Shard, spelt
from sslcells.delivery.vectors import embed
from sslcells.evaluation.knn import neighbours
from sslcells.evaluation.sheets import Image, found_sheet
from sslcells.losses import unit
from sslcells.models import files
from sslcells.storage import is_file, is_folder, write_atomically
from sslcells.values import place

_MOST_SHOWN = 20
"""Queries on the picture, and neighbours of each."""
_SMALL = 10_000
"""With fewer images the FAISS index is exhaustive."""


class Found(NamedTuple):
    """One image near a query."""

    path: str
    """below the folder of images"""
    distance: float
    """1 − cosine: 0 for the same direction, 2 for the opposite one"""
    label: str | None
    file: str = ""
    """of a row of a table, below the folder of images; its path is the same without a box and an id of a cell"""
    box: list[int] | None = None
    """left, upper, right and lower edge in px, if it was cut from its file"""
    table: Mapping[str, Any] = {}
    """column → value of its row of the embedded table, except what is said above"""


class _Query(NamedTuple):
    """What is looked for."""

    path: Path
    name: str
    """as the embeddings list it; its own path if they do not"""
    file: str = ""
    """below the folder of images, if it is a row of the embedded table"""
    box: list[int] | None = None
    row: Tensor | None = None
    """(F,) its vector, if it is a row of the embedded table"""


Sources = Callable[..., Tensor]
"""Names, and files if they are called otherwise → (N,) int64: images with equal numbers are not neighbours; an image
without a known source, by its file, has its own, by its name."""


def search(
    target: str | os.PathLike[str],
    queries: Sequence[str | os.PathLike[str]],
    k: int = 10,
    out: str | os.PathLike[str] | None = None,
    encoder: str | os.PathLike[str] | None = None,
    sources: str | None = None,
    source_pattern: str | None = None,
    faiss: bool = False,
    cpu: bool = False,
    say: Callable[[str], None] = print,
    lab: str | None = None,
) -> list[list[Found]]:
    """The `k` images nearest to each query, nearest first; prints a table, and writes it and a picture into `out`.

    A query is an image's file, or of an embedded table the name of a row or its cell's id. It is no neighbour of
    itself, nor are images of its source if `sources` or `source_pattern` tell the source. `lab` is the laboratory of
    queries that are not embedded, if the encoder standardises by laboratory and the embeddings have several.

    Raises:
        ConfigError: if there are no such embeddings, or they are incomplete or of another encoder, or a query's
            laboratory is not known and needed.
        DataError: if a query or a shard cannot be read.
    """
    if k < 1:
        raise ConfigError(f"--k {k} should be at least 1")
    if faiss:
        installed("faiss", "faiss", "--faiss")
    named = [os.fspath(query) for query in queries]
    embeddings = find_embeddings(target)
    embeddings.check_complete()
    ids = source_finder(sources, source_pattern)
    asked = _queries(named, embeddings)
    torch.set_num_threads(launcher.threads_for("auto", workers=0))
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() and not cpu else None
    network = _encoder_of(embeddings, encoder, device or torch.device("cpu"))
    if network.by_lab:
        asked = _with_rows(asked, embeddings)
    files_asked = [query.path for query in asked if query.row is None]
    row_of_lab = _row_of(lab, files_asked, embeddings, network) if files_asked else None
    read = iter(embed(files_asked, network, lab=row_of_lab))
    rows = torch.stack([next(read) if query.row is None else query.row for query in asked])
    own = ids([query.name for query in asked], [query.file or query.name for query in asked])
    find = approximately if faiss else exactly
    found = find(embeddings, rows, own, k, ids, network.mean.device)
    for query, near in zip(named, found, strict=True):
        say(f"{query}\n" + "\n".join(_lines(near)) if near else f"{query}\n  no image of another source")
    folder = place(out) if out is not None else embeddings.folder / "search"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_csv(folder / "neighbours.csv", named, found)
        picture = _draw(folder / "neighbours.png", embeddings, network, asked, found)
    except OSError as error:
        raise ConfigError(f"--out {folder} cannot be written: {error}") from None
    say(f"{picture}, {folder / 'neighbours.csv'}")
    return found


def find_embeddings(target: str | os.PathLike[str]) -> Embeddings:
    """The embeddings in a folder, or the only ones in a run's folder.

    Raises:
        ConfigError: if there are none, or several.
    """
    folder = place(target)
    if is_file(folder / MANIFEST):
        return Embeddings.open(folder)
    folder = find_run(target)
    if not is_file(folder / files.SPEC):
        raise ConfigError(
            f"{target} holds neither {MANIFEST} nor {files.SPEC}: it is neither a folder of embeddings nor a run"
        )
    inside = sorted(manifest.parent for manifest in folder.glob(f"embeddings/*/{MANIFEST}"))
    if not inside:
        raise ConfigError(f"{target} has no embeddings yet: sslcells embed {target} IMAGES")
    if len(inside) > 1:
        raise ConfigError(f"{target} has several embeddings; name one of them: {', '.join(map(str, inside))}")
    return Embeddings.open(inside[0])


def source_finder(table: str | None, pattern: str | None) -> Sources:
    """A function from paths to the numbers of their sources, from a CSV file or a pattern.

    Raises:
        ConfigError: if the file or the pattern is wrong.
    """
    listed: dict[str, str] = {}
    if table is not None:
        file = place(table)
        if not is_file(file):
            near = nearest(file.name, sorted(p.name for p in file.parent.glob("*.csv")))
            raise ConfigError(f"--sources {table}: no such file{near}")
        listed = read_table(file, key="--sources")
    if pattern is not None:
        try:
            check_pattern(pattern)
        except ValueError as error:
            raise ConfigError(f"--source-pattern {pattern!r} {error}") from None

    def ids(names: Sequence[str], files: Sequence[str] | None = None) -> Tensor:
        return source_ids(names, look_up_sources(names if files is None else files, listed, pattern))

    return ids


def exactly(
    embeddings: Embeddings, query: Tensor, source: Tensor, k: int, sources: Sources, device: torch.device
) -> list[list[Found]]:
    """Neighbours of queries (M, F) with sources (M,) among all rows, one shard at a time on the device."""
    query, source = query.to(device), source.to(device)
    best = torch.full((len(query), 0), -math.inf, device=device)  # (M, ≤ k) cosines
    rows = torch.zeros((len(query), 0), dtype=torch.int64, device=device)
    about: dict[int, Found] = {}
    first = 0
    for shard in embeddings.read_all():
        if not shard.path:
            continue
        bank = torch.from_numpy(np.array(shard.vector)).to(device)
        cosine, index = neighbours(query, bank, k, source, sources(shard.path, _files_of(shard)).to(device))
        # Stable, with the kept rows first: of equal cosines the first path wins, whatever the size of the shards.
        best, order = torch.cat([best, cosine], 1).sort(dim=1, descending=True, stable=True)
        rows = torch.cat([rows, index + first], 1).gather(1, order)[:, :k]
        best = best[:, :k]
        kept = set(rows.flatten().tolist())
        new = {row: row - first for row in kept if first <= row < first + len(shard.path)}
        about = {row: what for row, what in about.items() if row in kept} | {
            row: _found(shard, i) for row, i in new.items()
        }
        first += len(shard.path)
    return [
        [about[row]._replace(distance=max(0.0, 1 - cos)) for cos, row in zip(*pair, strict=True) if cos > -math.inf]
        for pair in zip(best.tolist(), rows.tolist(), strict=True)
    ]


def approximately(
    embeddings: Embeddings, query: Tensor, source: Tensor, k: int, sources: Sources, device: torch.device
) -> list[list[Found]]:
    """As `exactly`, from a FAISS index that is built once and kept: for millions of images; it may miss some."""
    index, starts = _index(embeddings)
    unit_queries: NDArray[np.float32] = unit(query.float()).cpu().numpy()
    total = int(starts[-1])
    found: list[list[Found]] = []
    cache: dict[int, Shard] = {}
    for row, own in zip(unit_queries, source.tolist(), strict=True):
        more, near = 2 * k + 1, list[Found]()
        while total:
            cosines, rows = index.search(row[None], min(more, total))
            near = []
            for cosine, at in zip(cosines[0].tolist(), rows[0].tolist(), strict=True):
                if at < 0:
                    continue
                number = int(np.searchsorted(starts, at, side="right")) - 1
                if number not in cache:
                    cache[number] = embeddings.read(number)
                shard = cache[number]
                place = at - int(starts[number])
                one = _found(shard, place)
                if sources([one.path], [one.file]).item() != own:
                    near.append(one._replace(distance=max(0.0, 1 - cosine)))
            if len(near) >= k or more >= total:
                break
            more *= 4  # the nearest rows were of the query's own source
        found.append(near[:k])
    return found


def _found(shard: Shard, index: int) -> Found:
    more = {} if shard.more is None else shard.more.slice(index, 1).to_pylist()[0]
    table = {name: value for name, value in more.items() if name not in SHOWN}
    return Found(shard.path[index], 0.0, shard.label[index] if shard.label else None, *shard.shown(index), table)


def _files_of(shard: Shard) -> list[str]:
    """The file of each image of a shard, below the folder of images."""
    files: list[str] = shard.path if shard.more is None else shard.more["image_file"].to_pylist()
    return files


def _index(embeddings: Embeddings) -> tuple[Any, NDArray[np.int64]]:
    """The FAISS index of all rows, built if it is missing; and (shards + 1,) the first row of each shard."""
    library = extra("faiss", "faiss", "--faiss")
    file = embeddings.folder / f"index-{embeddings.encoder}-{embeddings.listed[:16]}.faiss"
    starts_file = file.with_suffix(".npy")
    if file.is_file() and starts_file.is_file():
        return _probing(library, library.read_index(str(file))), np.load(starts_file)
    counts = [len(shard.path) for shard in embeddings.read_all()]
    total = sum(counts)
    index = library.IndexFlatIP(embeddings.features)
    if total >= _SMALL:
        lists = int(4 * math.sqrt(total))
        index = library.IndexIVFFlat(index, embeddings.features, lists, library.METRIC_INNER_PRODUCT)
        share = min(1.0, 64 * lists / total)  # of each shard, so that the sample covers the whole folder
        sample = [_unit_rows(shard.vector[:: max(1, round(1 / share))]) for shard in embeddings.read_all()]
        index.train(np.concatenate(sample))
    for shard in embeddings.read_all():
        index.add(_unit_rows(shard.vector))
    starts = np.cumsum([0, *counts]).astype(np.int64)
    write_atomically(file, lambda opened: opened.write(library.serialize_index(index).tobytes()))
    write_atomically(starts_file, lambda opened: np.save(opened, starts))
    return _probing(library, index), starts


def _probing(library: Any, index: Any) -> Any:
    """The index, set to search a sixteenth of its lists."""
    if isinstance(index, library.IndexIVF):
        index.nprobe = max(8, index.nlist // 16)
    return index


def _unit_rows(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    out: NDArray[np.float32] = unit(torch.from_numpy(np.array(rows))).numpy()
    return out


def _encoder_of(embeddings: Embeddings, given: str | os.PathLike[str] | None, device: torch.device) -> Encoder:
    """The encoder that made the embeddings; queries must use the same one."""
    run = given if given is not None else embeddings.run
    try:
        encoder = load_encoder(run, device)
    except ConfigError as error:
        if given is not None:
            raise
        raise ConfigError(f"the encoder of {embeddings.folder} is not where it was: {error}; --encoder RUN") from None
    if encoder.digest != embeddings.encoder:
        raise ConfigError(
            f"{embeddings.folder} holds embeddings of another encoder, {embeddings.encoder}; {run} has {encoder.digest}"
        )
    return encoder


def _queries(queries: Sequence[str], embeddings: Embeddings) -> list[_Query]:
    """The queries as files, or as rows of the embedded table.

    Raises:
        ConfigError: if one is neither.
    """
    rows = _rows_called({query for query in queries if not is_file(place(query))}, embeddings)
    out = []
    for query in queries:
        if query in rows:
            out.append(rows[query])
        else:
            path = _query(query, embeddings)
            out.append(_Query(path, _name(path, embeddings)))
    return out


def _rows_called(wanted: set[str], embeddings: Embeddings) -> dict[str, _Query]:
    """The rows of the embedded table with these names, or ids of cells, which must be of one row alone."""
    rows: dict[str, _Query] = {}
    if embeddings.table is None or not wanted:
        return rows
    for shard in embeddings.read_all():
        keys = [shard.path]
        if embeddings.key is not None and shard.more is not None and embeddings.key in shard.more.column_names:
            keys.append([str(one) for one in shard.more[embeddings.key].to_pylist()])
        for names in keys:
            for i in (i for i, name in enumerate(names) if name in wanted):
                one = _found(shard, i)
                row = torch.from_numpy(np.array(shard.vector[i]))
                query = _Query(Path(embeddings.root) / one.file, one.path, one.file, one.box, row)
                if rows.setdefault(names[i], query).name != one.path:
                    raise ConfigError(f"{names[i]} is the cell of several rows; name it as {one.path}")
    return rows


def _with_rows(asked: Sequence[_Query], embeddings: Embeddings) -> list[_Query]:
    """The queries, those that are embedded with their vectors."""
    wanted = {query.name for query in asked if query.row is None}
    rows = {
        name: torch.from_numpy(np.array(shard.vector[i]))
        for shard in (embeddings.read_all() if wanted else ())
        for i, name in enumerate(shard.path)
        if name in wanted
    }
    return [query if query.row is not None else query._replace(row=rows.get(query.name)) for query in asked]


def _row_of(lab: str | None, asked: Sequence[Path], embeddings: Embeddings, network: Encoder) -> Tensor | None:
    """(P,) what stands for images of the queries' laboratory; None if the encoder takes each image by itself.

    Raises:
        ConfigError: if it is not known.
    """
    if network.standard is None or not network.by_lab:
        if lab is not None:
            raise ConfigError(f"--lab {lab}: the encoder takes each image by itself (standardise.by=image)")
        return None
    known = {**(network.standard.spec.get("labs") or {}), **(embeddings.labs or {})}
    known = {name: of for name, of in known.items() if of["row"] is not None}  # of which no image could be read
    if lab is None and len(embeddings.labs or {}) == 1:
        (lab,) = embeddings.labs or {}
    if lab not in known:
        which = "is not said" if lab is None else f"--lab {lab} is not known"
        raise ConfigError(
            f"{asked[0]}: the encoder standardises by laboratory, and that of this image {which}; --lab one of "
            f"{some([*known], 12)}. Embed a folder of images of another one: they are queries by their path then"
        )
    return torch.tensor(known[lab]["row"])


def _query(query: str, embeddings: Embeddings) -> Path:
    """The file of a query: the path itself, or that path below the folder of images."""
    path = place(query)
    for file in (path, Path(embeddings.root) / query):
        if is_file(file):
            return file
    if is_folder(path):
        raise ConfigError(f"{query} is a folder; a query is an image")
    for file in (path, Path(embeddings.root) / query):
        if file.exists() or file.is_symlink():
            what = "a FIFO, a socket or a device" if file.exists() else f"a broken link, to {os.readlink(file)}"
            raise ConfigError(f"{query} is {what}; a query is an image")
    beside = path.parent if path.parent.is_dir() else Path(embeddings.root)
    near = nearest(path.name, sorted(p.name for p in beside.iterdir() if p.is_file()))
    rows = "" if embeddings.table is None else f", nor a row of {embeddings.table}"
    raise ConfigError(f"{query}: no such image, neither here nor in {embeddings.root}{rows}{near}")


def _name(path: Path, embeddings: Embeddings) -> str:
    """The path of a file as the embeddings list it; its own path if they do not."""
    for candidate in (Path(os.path.abspath(path)), path.resolve()):
        if candidate.is_relative_to(embeddings.root):
            return spelt(candidate.relative_to(embeddings.root).as_posix())
    return spelt(str(path))


def _lines(near: Sequence[Found]) -> list[str]:
    width = max(len(found.path) for found in near)
    head = f"  {'':>3}  {'distance':>8}  image"
    return [head] + [
        f"  {rank:>3}  {found.distance:8.4f}  {found.path:{width}}  {found.label or ''}".rstrip()
        for rank, found in enumerate(near, 1)
    ]


def _write_csv(file: Path, queries: Sequence[str], found: Sequence[Sequence[Found]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    own = ["query", "rank", "distance", "path", "label"]
    columns = [*dict.fromkeys(name for near in found for one in near for name in one.table)]
    writer.writerow([*own, *(f"table_{name}" if name in own else name for name in columns)])
    for query, near in zip(queries, found, strict=True):
        for rank, one in enumerate(near, 1):
            of_table = ["" if (value := one.table.get(name)) is None else value for name in columns]
            writer.writerow([spelt(query), rank, f"{one.distance:.6f}", one.path, one.label or "", *of_table])
    write_atomically(file, lambda opened: opened.write(text.getvalue().encode()))


def _draw(
    file: Path, embeddings: Embeddings, encoder: Encoder, asked: Sequence[_Query], found: Sequence[Sequence[Found]]
) -> Path:
    # At full size, not cropped.
    decoder = dataclasses.replace(encoder.reader(), size=None, um_per_pixel=None, um_per_pixel_default=None)

    def image(path: Path, box: list[int] | None = None) -> Image | None:
        try:
            pixels = decoder(str(path))
        except Unreadable:
            return None  # the file was moved after it was embedded
        try:
            part = pixels if box is None else cut(pixels, box, "clip")
        except ValueError:
            return None  # it is another file now
        return part.permute(1, 2, 0).numpy()

    rows = [
        [
            (image(query.path, query.box), (query.name if query.row is not None else query.path.name)[-24:]),
            *(
                (
                    image(Path(embeddings.root) / (one.file or one.path), one.box),
                    f"{one.distance:.3f} {(one.label or '')[:15]}".rstrip(),
                )
                for one in near[:_MOST_SHOWN]
            ),
        ]
        for query, near in zip(asked[:_MOST_SHOWN], found, strict=False)
    ]
    return found_sheet(rows, "Nearest images, with their cosine distance", file)
