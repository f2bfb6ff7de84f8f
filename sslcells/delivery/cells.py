"""`sslcells cells`: cut the cells of fields and masks into images of their own, with a table of one row a cell."""

import math
import os
import posixpath
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sslcells import launcher
from sslcells.config import ConfigError
from sslcells.data import DataError, Unreadable
from sslcells.data._columns import KNOWN, find, names_of, read
from sslcells.data._fields import Field, How, read_field, read_mask, window, write_cell
from sslcells.data._masks import cells_of, pair, stem_of
from sslcells.data._places import Place, below
from sslcells.data._scales import stated_scales
from sslcells.data.folder import list_images
from sslcells.delivery.cell_table import (
    BOX,
    IMAGES,
    LEFT_OUT,
    TABLE,
    Cut,
    Fields,
    Rule,
    table_of,
    tell,
    write,
    write_left_out,
)
from sslcells.delivery.cells_done import Done
from sslcells.delivery.shards import spelt
from sslcells.run.lock import Lock
from sslcells.storage import is_file, is_folder
from sslcells.values import place

_SHOWN = 5


def cells(
    images: str,
    masks: str | None,
    out: str,
    rule: Rule,
    um_per_pixel: float | None = None,
    um_per_pixel_at_1x: float | None = None,
    label: str | None = None,
    how: How = How(),  # noqa: B008
    format: Literal["parquet", "csv"] = "parquet",
    say: Callable[[str], None] = print,
) -> Path:
    """Cut the cells of fields; returns the table, OUT/cells.parquet or .csv, which data.kind=table opens.

    `images` is a folder of fields, or a table with the path of one in each row, whose further columns each cell gets.
    Cut images, OUT/images/FIELD/LABEL.tif, keep the numbers of the field. After a kill the same call goes on with the
    fields that are left.

    Raises:
        ConfigError: if fields, masks or the request contradict each other; the message names the files.
        DataError: if a file cannot be read or written.
    """
    _check(rule, how, um_per_pixel, um_per_pixel_at_1x)
    fields = _fields(images, um_per_pixel_at_1x)
    root_of_masks = None if masks is None else _folder(masks, "--masks")
    target = place(out)
    walked = [fields.root] if fields.columns is None else []
    _check_out(target, [*walked, *([root_of_masks] if root_of_masks is not None else [])])
    if root_of_masks is not None:
        fields = _without(fields, root_of_masks)
    found = pair(fields.names, fields.root, root_of_masks, label)
    say(f"{len(found.fields):,} fields with masks below {fields.root}")
    stems, rows = _stems(found.fields), {name: i for i, name in enumerate(fields.names)}
    asked = _asked(fields, root_of_masks, label, rule, how, um_per_pixel)
    file = target / f"{TABLE}.{format}"
    try:
        with _owned(target):
            done = Done(target, asked)
            todo = [
                _Todo(str(fields.root / name), mask, target / IMAGES / stem, _stated(fields.um[rows[name]]))
                for name, mask, stem in zip(found.fields, found.masks, stems, strict=True)
            ]
            each = _cut_all(todo, done, lambda one: _cut(one, rule, how, um_per_pixel), say)
            write(table_of(found.fields, stems, each, fields, rows), file)
            write_left_out(target / LEFT_OUT, found.without, found.alone)
            done.forget()
    except OSError as error:
        raise DataError(f"{error.filename or target}: {error.strerror or error}") from None
    tell(say, each, found.without, found.alone, file, fields, rule)
    return file


class _Todo(NamedTuple):
    """A field to be cut."""

    field: str
    mask: str
    images: Path
    """the folder of its cells"""
    um: float | None
    """µm per pixel, if the table says it"""


def _stated(um: float) -> float | None:
    return None if np.isnan(um) else float(um)


def _asked(
    fields: Fields, masks: Path | None, label: str | None, rule: Rule, how: How, um: float | None
) -> dict[str, Any]:
    """What cells that are there already must have been cut by."""
    folders = [None if folder is None else spelt(os.path.realpath(folder)) for folder in (fields.root, masks)]
    return {"fields": folders[0], "masks": folders[1], "label": label, "um_per_pixel": um, **rule._asdict()} | {
        f"fields' {key}": value for key, value in how._asdict().items()
    }


@contextmanager
def _owned(target: Path) -> Iterator[None]:
    """The folder, made if it is missing, is this process's inside the block."""
    target.mkdir(parents=True, exist_ok=True)
    lock = Lock(target, otherwise="choose another --out")
    try:
        yield
    finally:
        lock.release()


def _cut_all(todo: Sequence[_Todo], done: Done, cut: Callable[[_Todo], Cut], say: Callable[[str], None]) -> list[Cut]:
    """The cells of all fields, cut by as many threads as there are cores; those that are there are not cut again."""

    def new(one: _Todo) -> Cut:
        for left in one.images.glob("*.tif") if done.resumed else ():  # of another mask, or not whole
            left.unlink()
        made = cut(one)
        done.keep(one.images, one.field, one.mask, one.um, made)
        return made

    with ThreadPoolExecutor(launcher.cores()) as pool:
        before = list(pool.map(lambda one: done.cut(one.images, one.field, one.mask, one.um), todo))
        if there := sum(one is not None for one in before):
            say(f"going on: {there:,} of {len(todo):,} fields were cut before")
        return list(pool.map(lambda i: before[i] or new(todo[i]), range(len(todo))))


def _check(rule: Rule, how: How, um: float | None, at_1x: float | None) -> None:
    if (rule.fov is None) == (rule.size is None):
        raise ConfigError("give one of --fov, in µm, and --size, in pixels")
    above = {"--fov": rule.fov, "--size": rule.size, "--um-per-pixel": um, "--um-per-pixel-at-1x": at_1x}
    for option, value in (above | {"--channels": how.channels}).items():
        if value is not None and not 0 < value < np.inf:
            raise ConfigError(f"{option} {value:g} must be above 0")
    if rule.background is not None and not np.isfinite(rule.background):
        raise ConfigError(f"--background {rule.background:g} is no number")
    for option, value in {"--min-area": rule.min_area, "--level": how.level}.items():
        if not 0 <= value < np.inf:
            raise ConfigError(f"{option} {value:g} must be 0 or more")


def _fields(images: str, at_1x: float | None) -> Fields:
    given = place(images)
    if not is_file(given):
        if at_1x is not None:
            raise ConfigError(
                f"--um-per-pixel-at-1x {at_1x:g} is for a table of fields with a column of magnifications"
            )
        root = _folder(images, "IMAGES")
        names = list_images(root)
        return Fields(root, names, np.full(len(names), np.nan), None)
    table = read(given)
    names, _ = names_of(given)
    path = find(names, given, "IMAGES", None, "path")
    if path is None:
        raise ConfigError(f"{given} has no column of paths: call it {', '.join(KNOWN['path'][:3])} or image")
    if {*BOX} <= {*names}:
        raise ConfigError(f"{given} has boxes already ({', '.join(BOX)}): data.kind=table cuts them, without masks")
    paths = table.text(path)
    if paths.null_count:
        raise ConfigError(f"{given}: {paths.null_count:,} rows have no path")
    root, relative = below(paths.to_pylist(), None, given.parent)
    there = Place(root).files(relative)
    missing = [i for i, name in enumerate(there) if name is None]
    if missing:
        shown = ", ".join(f"{table.row(i)}: {relative[i]}" for i in missing[:_SHOWN])
        raise ConfigError(f"{given}: {len(missing):,} of {len(there):,} rows name no file below {root}: {shown}")
    files = [name for name in there if name is not None]
    twice = {name for name in files if files.count(name) > 1} if len({*files}) < len(files) else set()
    if twice:
        raise ConfigError(f"{given}: {sorted(twice)[0]} has several rows; each field has one")
    um_column, times = (find(names, given, "", None, meaning) for meaning in ("um_per_pixel", "magnification"))
    um = stated_scales(table, um_column, times, at_1x, np.arange(len(files)))
    rest = [name for name in names if name not in (path, um_column)]
    return Fields(root, files, um, table.columns.select(rest))


def _folder(given: str, what: str) -> Path:
    folder = place(given)
    if not is_folder(folder):
        raise ConfigError(f"{what} {given}: no such folder")
    return folder


def _check_out(target: Path, folders: Sequence[Path]) -> None:
    real = Path(os.path.realpath(target))
    for folder in folders:
        if real.is_relative_to(os.path.realpath(folder)):
            raise ConfigError(f"--out {target} lies in {folder}, where fields and masks are; choose another")
    for other in ("parquet", "csv"):
        if (target / f"{TABLE}.{other}").exists():
            raise ConfigError(f"{target / f'{TABLE}.{other}'} exists already; remove it, or choose another --out")


def _without(fields: Fields, masks: Path) -> Fields:
    """The fields that do not lie in the folder of masks, where that is one among theirs."""
    inside = os.path.relpath(os.path.realpath(masks), os.path.realpath(fields.root)).replace(os.sep, "/")
    if inside.startswith("..") or inside == ".":
        return fields
    kept = [i for i, name in enumerate(fields.names) if not name.startswith(f"{inside}/")]
    if not kept:
        raise ConfigError(f"all images below {fields.root} lie in {masks}, the folder of masks")
    columns = None if fields.columns is None else fields.columns.take(pa.array(kept))
    return Fields(fields.root, [fields.names[i] for i in kept], fields.um[kept], columns)


def _stems(names: Sequence[str]) -> list[str]:
    """A folder for each field: its path without ending, or with it where two would be one."""
    short = [posixpath.join(posixpath.dirname(name), stem_of(name)) for name in names]
    count: dict[str, int] = {}
    for stem in short:
        count[stem.casefold()] = count.get(stem.casefold(), 0) + 1
    return [stem if count[stem.casefold()] == 1 else name for stem, name in zip(short, names, strict=True)]


def _cut(todo: _Todo, rule: Rule, how: How, default: float | None) -> Cut:
    """Cut the cells of one field."""
    file, mask_file, folder, stated = todo
    field, mask = _read(file, mask_file, how)
    um = stated or field.scale.um or default
    if rule.fov is not None and not um:
        why = f" ({field.scale.origin})" if field.scale.origin else ""
        raise ConfigError(
            f"{file}: its µm per pixel is not known{why}, and --fov is in µm; give it as a column um_per_pixel of a "
            f"table of fields, or as --um-per-pixel for all that do not say it; or cut --size pixels"
        )
    side = rule.size if rule.size is not None else max(1, math.ceil(rule.fov / um - 1e-3))  # type: ignore[operator]
    fill = rule.background
    if fill is not None and not _holds(field.values.dtype, fill):
        raise ConfigError(f"--background {fill:g}: {file} holds {field.values.dtype}, which has no such value")
    try:
        found = cells_of(mask)
    except Unreadable as error:
        raise DataError(f"{mask_file}: {error}") from None
    area = found.area * (um * um if rule.fov is not None and um else 1.0)
    at_border = found.border & (rule.border == "leave-out")
    small = ~at_border & (area < rule.min_area)
    kept = np.flatnonzero(~at_border & ~small)
    if len(kept):
        folder.mkdir(parents=True, exist_ok=True)
    for i in kept.tolist():
        y, x = found.centre[i].tolist()
        number = int(found.label[i])
        values = window(field, mask, (y, x), (side, side), number, fill)
        write_cell(folder / f"{number}.tif", values, field, um)
    chosen = found.only(kept)
    extent = (chosen.box[:, 2:] - chosen.box[:, :2]).max(1) if len(kept) else np.zeros(0)
    return Cut(chosen, um, int(at_border.sum()), int(small.sum()), int((extent > side).sum()), *_kind(field))


def _kind(field: Field) -> tuple[int | None, int]:
    """Channels that are no colours, and colours."""
    if field.axes == "CYX":
        return len(field.values), 1
    return None, 3 if field.axes == "YXS" and field.values.shape[2] >= 3 else 1


def _read(file: str, mask_file: str, how: How) -> tuple[Field, NDArray[np.integer[Any]]]:
    try:
        field = read_field(file, how)
    except Unreadable as error:
        raise DataError(f"{file}: {error}") from None
    try:
        mask = read_mask(mask_file, how)
    except Unreadable as error:
        raise DataError(f"{mask_file}: {error}") from None
    if mask.shape != field.size:
        sizes = [f"{height}×{width} px" for height, width in (mask.shape, field.size)]
        raise DataError(f"{mask_file} has {sizes[0]} (height × width), and its field {file} {sizes[1]}")
    return field, mask


def _holds(dtype: np.dtype[Any], value: float) -> bool:
    if dtype.kind == "f":
        return True
    span = np.iinfo(dtype)
    return value == int(value) and span.min <= value <= span.max
