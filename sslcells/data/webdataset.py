"""Shards of WebDataset, read as they are: tar files, whose members of one name up to the first dot are one sample.

The members are listed once, and then read at their places: in any order, so that a run resumes exactly.
"""

import hashlib
import json
import os
import tarfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import field_validator

from sslcells import launcher
from sslcells.config import ConfigError
from sslcells.data import SPLITS, ImageSet
from sslcells.data._encoded import Config as Base
from sslcells.data._encoded import Encoded, find_files, label_numbers, sources_of
from sslcells.data._found import Clock, Found
from sslcells.data._names import some
from sslcells.data._rows import Files
from sslcells.data._scan import OURS, SUFFIXES
from sslcells.data._verified import cache_folder, recent
from sslcells.storage import write_atomically

_WORDS = ("cls", "txt", "json")
"""endings of members that say something of the image"""
_MOST = 2**16
"""bytes of such a member that are kept"""
_VERSION = 1


class Config(Base):
    """A folder of .tar files, as WebDataset writes them: a sample is `key.jpg`, `key.cls`, `key.json`."""

    kind: Literal["webdataset"] = "webdataset"
    """Tar shards of WebDataset, read as they are."""
    image: str | None = None
    """Ending of the images in a sample, such as jpg; none: the only one that is an image's."""
    label: str | None = None
    """What holds the label: `cls`, `txt`, or a field of the JSON, such as json.cell_type; none: cls, if it is there."""
    source: str | None = None
    """What holds the source (donor, slide), such as json.donor."""

    @field_validator("label", "source")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        if value is not None and value not in _WORDS[:2] and not value.startswith("json."):
            raise ValueError("should be cls, txt, or a field of the JSON, such as json.cell_type")
        return value


class _Sample(NamedTuple):
    """An image in a shard, and what is said of it."""

    shard: int
    key: str
    ending: str
    at: int
    """the byte at which it begins"""
    size: int
    """bytes"""
    words: dict[str, bytes]
    """ending → content of the members that say something of it"""


class TarImages(Encoded):
    """One split; of each image its place in a shard is in memory."""

    def __init__(self, files: Files, samples: Sequence[_Sample], names: Sequence[str], config: Config) -> None:
        super().__init__(names, config.decoder())
        self._files = files
        self._place = [(sample.shard, sample.at, sample.size) for sample in samples]

    def encoded(self, index: int) -> bytes:
        """The member of image `index`."""
        return self._files.read(*self._place[index])


def open_splits(config: Config, wanted: Sequence[str] = SPLITS) -> dict[str, ImageSet]:
    """Those of the wanted splits that the shards have; the shards of all are listed once.

    Raises:
        ConfigError: if there are no shards, one cannot be read, or samples have several images.
    """
    clock = Clock()
    root, shards, unused = find_files(config, ".tar")
    names = sorted({name for chosen in shards.values() for name in chosen})
    members = dict(zip(names, _members(root, names), strict=True))
    samples = {split: _samples(root, chosen, members, config.image) for split, chosen in shards.items()}
    clock.lap("listing")
    label = config.label or ("cls" if any("cls" in s.words for of in samples.values() for s in of) else None)
    said = {split: [_said(s, label, root / shards[split][s.shard]) for s in of] for split, of in samples.items()}
    classes, labels = label_numbers(said, config.class_names, (), f"{root}, {label or 'no labels'}")
    opened = dict[str, ImageSet]()
    for split in (split for split in wanted if split in shards):
        images = _opened(config, root, shards[split], samples[split])
        images.classes, images.labels = classes, labels[split]
        images.found = Found(
            where=f"{root}, {len(shards[split])} shards such as {shards[split][0]}",
            ignored={"shards of no split": (len(unused), unused[0])} if unused and split == "train" else {},
            columns=[f"label from {label or 'nothing'}; source from {config.source or 'nothing'}"],
            seconds=clock.laps,
        )
        clock.lap("labels and sources")
        clock, opened[split] = Clock(), images
    return opened


def _opened(config: Config, root: Path, shards: Sequence[str], samples: Sequence[_Sample]) -> TarImages:
    if not samples:
        raise ConfigError(f"{root / shards[0]} has no images ({', '.join(SUFFIXES)})")
    names = [f"{shards[s.shard]}#{s.key}.{s.ending}" for s in samples]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ConfigError(f"{root}: {twice[0]} is there twice")
    images = TarImages(Files([str(root / name) for name in shards]), samples, names, config)
    sources = None
    if config.source is not None:
        sources = [_said(s, config.source, root / shards[s.shard]) for s in samples]
    images.sources, images.sourced = sources_of(names, sources)
    return images


_Member = tuple[str, int, int, bytes | None]
"""name, first byte, bytes, and the content of a member that says something of an image"""


def _members(root: Path, names: Sequence[str]) -> list[list[_Member]]:
    """The files in each shard, in their order; those of shards that did not change are remembered."""
    with ThreadPoolExecutor(min(16, 4 * launcher.cores())) as pool:
        return list(pool.map(lambda name: _members_of(root, name), names))


def _members_of(root: Path, name: str) -> list[_Member]:
    file = root / name
    try:
        stat = os.stat(file)
        what = hashlib.blake2b(
            f"{_VERSION} {name} {stat.st_size} {stat.st_mtime_ns}".encode("utf-8", "surrogateescape")
        )
        places = [folder / f"members-{what.hexdigest()[:16]}.parquet" for folder in (root / OURS, cache_folder(root))]
        for place in places:
            with suppress(OSError, pa.ArrowInvalid, KeyError):
                kept = pq.read_table(place, memory_map=False).to_pydict()
                return list(zip(kept["name"], kept["at"], kept["bytes"], kept["content"], strict=True))
        found = _listed(file)
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror or error}") from None
    except (tarfile.TarError, EOFError, UnicodeError) as error:
        raise ConfigError(f"{file} is no tar file, or a damaged one: {error}") from None
    if not recent(stat.st_mtime_ns):
        _keep(found, places)
    return found


def _listed(file: Path) -> list[_Member]:
    with tarfile.open(file, "r:") as tar:
        found: list[_Member] = []
        for member in tar:
            if not member.isreg() or member.issparse():
                continue
            content = None
            if member.name.lower().endswith(_WORDS) and member.size <= _MOST:
                opened = tar.extractfile(member)
                content = opened.read() if opened is not None else None
            found.append((member.name, member.offset_data, member.size, content))
        return found


def _keep(found: Sequence[_Member], places: Sequence[Path]) -> None:
    columns = zip(*found, strict=True) if found else ((), (), (), ())
    kinds = {"name": pa.string(), "at": pa.int64(), "bytes": pa.int64(), "content": pa.binary()}
    with suppress(UnicodeEncodeError):  # a name that is no text
        table = pa.table([pa.array(c, k) for c, k in zip(columns, kinds.values(), strict=True)], names=[*kinds])
        for place in places:
            with suppress(OSError):
                place.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(place, lambda file: pq.write_table(table, file, compression="zstd"))
                return


def _samples(root: Path, names: Sequence[str], members: dict[str, list[_Member]], image: str | None) -> list[_Sample]:
    """The images of these shards, in order."""
    found: list[_Sample] = []
    for number, name in enumerate(names):
        first: dict[str, _Sample] = {}
        words: dict[str, dict[str, bytes]] = {}
        for path, at, size, content in members[name]:
            folder, _, base = path.rpartition("/")
            stem, _, ending = base.partition(".")
            if not stem:
                continue  # hidden
            key, ending = f"{folder}/{stem}" if folder else stem, ending.lower()
            if content is not None and ending in _WORDS:
                words.setdefault(key, {})[ending] = content
            elif ending == image.lower() if image is not None else f".{ending}".endswith(SUFFIXES):
                if key in first:
                    raise ConfigError(
                        f"{root / name}: {key} has several images, .{first[key].ending} and .{ending}; say with "
                        f"data.image= which"
                    )
                first[key] = _Sample(number, key, ending, at, size, {})
        found += [sample._replace(words=words.get(key, {})) for key, sample in first.items()]
    return found


def _said(sample: _Sample, what: str | None, shard: Path) -> str | None:
    """What a sample says of itself, as text; None if nothing.

    Raises:
        ConfigError: if its JSON cannot be read, or the field holds no text or number.
    """
    if what is None:
        return None
    ending, _, field = what.partition(".")
    content = sample.words.get(ending)
    if content is None:
        return None
    try:
        text = content.decode("utf-8-sig").strip()
        if not field:
            return text or None
        value = json.loads(text)
        for part in field.split("."):
            value = value.get(part) if isinstance(value, dict) else None
    except ValueError as error:
        raise ConfigError(f"{shard}: {sample.key}.{ending} cannot be read: {error}") from None
    if value is None or isinstance(value, str | int):
        return None if value in (None, "") else str(value)
    raise ConfigError(
        f"{shard}: {sample.key}.json has {field}={some([repr(value)[:60]])}, which is no text or whole number"
    )
