"""The arguments of all commands. Nothing here imports torch, so --help and a misspelt option answer at once."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from sslcells import __version__
from sslcells.values import place

_TRAIN = """\
Train an encoder. Without arguments: SimCLR on synthetic blood cells, small enough for a laptop.

  accelerate launch -m sslcells.train --config folder data.path=my/cells name=my_cells
  sslcells train --config simclr_bloodcells --check
  sslcells train --debug method.name=triplet
"""

_EMBED = """\
Embed every image in a folder, at any depth, into shards with path, id, vector and label; or every row of a table (CSV
or Parquet), with all of its columns. If it is killed, the same command resumes it.

  sslcells embed runs/my_cells path/to/images
  sslcells embed runs/my_cells cells.csv data.path=path/to/images --format h5ad
  accelerate launch --config_file launch/gpu8.yaml -m sslcells embed runs/my_cells path/to/images
"""

_EVALUATE = """\
Evaluate a finished run: leaks between splits, kNN, linear probe, few-shot, retrieval, clustering, measures that need
no labels; fine-tuning with --fine-tune. Results are printed and written to RUN/evaluation.json, and with pictures to
RUN/report.html. It uses the test split, which training never reads; use evaluate.split=val to choose between runs.

  sslcells evaluate runs/my_cells
  sslcells evaluate runs/my_cells data.sources=sources.csv evaluate.split=val
  sslcells evaluate runs/my_cells --lab clinic=path/to/clinic --lab other=cells.csv
  sslcells evaluate runs/my_cells data.path=path/to/other/cells data.sources=sources.csv --out runs/other_cells
  sslcells evaluate runs/my_cells --against vit_small_patch14_dinov2.lvd142m --against runs/before
  accelerate launch --config_file launch/gpu8.yaml -m sslcells.evaluate runs/my_cells
"""

_COMPARE = """\
Train the recipe's encoder without labels, then three classifiers on fractions of the labels, with the same backbone,
data and number of steps: supervised from scratch, a probe on the frozen encoder, and the encoder fine-tuned. Results
are printed and written to RUN/comparison.json, and with curves and predictions to RUN/comparison.html. If it is
stopped, the same command resumes it.

  sslcells compare --config compare_pbc28 data.path=pbc28.npz
  sslcells compare --config compare_pbc28 data.path=pbc28.npz --frozen resnet18.a1_in1k --lab clinic=path/to/clinic
  accelerate launch --config_file launch/gpu8.yaml -m sslcells.compare --config compare_pathmnist
"""

_COMPARE_RUNS = """\
Say whether RUN_B is better than RUN_A, on images that `sslcells evaluate` asked both about, and write one page that
opens offline: the difference with its interval from paired resamples, classes, images that one has right and the other
wrong, both trainings, settings that differ, commits and commands. It trains and encodes nothing.

  sslcells evaluate runs/before evaluate.split=val
  sslcells evaluate runs/after evaluate.split=val
  sslcells compare-runs runs/before runs/after
"""

_TUNE = """\
Search for good settings with Optuna (extra: optuna). Each trial is a run in its own folder below out/name; the figure
on val that training writes last decides (kNN, or a classifier's), test is never read. Run again, the same command
resumes; started several times, also on other machines, all share the trials. Ends with a table, search.png (what
mattered) and best.yaml, which `train --config` takes.

  sslcells tune --config simclr_bloodcells name=search --search optim.lr=1e-4..1e-2:log method.temperature=0.05..0.5
  sslcells tune --config folder data.path=my/cells name=batch --search train.global_batch=128,256,512 --trials 3
"""

_SOURCES = """\
Find images in a folder that were made from the same photograph (rotated, mirrored, shifted, cropped) when file names
do not tell. Writes sources.csv for data.sources; then such images are never negatives of each other, and never leak
between splits.

  sslcells sources path/to/images --out runs/sources
  sslcells train --config simclr_bloodcells data.path=path/to/images data.sources=runs/sources/sources.csv
"""

_SPLIT = """\
Divide the rows of a table into train, val and test that share no donor (or slide, photograph, …), and write it with a
column of splits. With --site also one column per laboratory, whose test split is that laboratory.

  sslcells split cells.csv --by donor --stratify label
  sslcells split cells.csv --by donor slide --parts 0.8 0.1 0.1 --site site
"""

_CELLS = """\
Cut the cells out of fields of a microscope, by masks of segmented cells (cellpose, StarDist, …): TIFF or PNG images
that number the cells, or labels of OME-Zarr. Each cell becomes an image with the numbers of its field, and a row of
OUT/cells.parquet with its id, field, centroid, area, box and µm per pixel, and what a table of the fields says of it.
After a kill the same command goes on with the fields that are left.

  sslcells cells path/to/fields --masks path/to/masks --fov 20 --out cells
  sslcells cells fields.csv --masks masks --size 64 --background 0 --out cells
  sslcells train --config table data.table=cells/cells.parquet data.um_per_pixel=0.5 data.size=40
"""

_PACK = """\
Decode every image of a data set once, into shards of fixed-size arrays with their table, which training reads many
times faster than files: data.kind=pack. SOURCE is a folder, a table (CSV, Parquet) or what else data.* names. If it
is killed, the same command goes on.

  sslcells pack path/to/images --out packs/cells --size 128
  sslcells pack cells.csv --out packs/cells --size 128 data.path=path/to/images data.sources=donor
  sslcells train --config pack data.path=packs/cells name=my_cells
"""

_INIT = """\
Write launch/ (configurations for accelerate launch), slurm/ (job templates) and an example of a sweep into a folder;
with --recipes all recipes too. Existing files that differ are kept, and listed.

  sslcells init my_project
  cd my_project && accelerate launch --config_file launch/gpu8.yaml -m sslcells.train --config folder data.path=my/cells
  cd my_project && bash slurm/simclr.sh data.path=/shared/cells name=cells
"""

_DOCTOR = """\
Look at versions, devices, threads, memory, shared memory, disk, network name and backends; gather on two ranks; compare
the gradient of every loss with one process in float64; train a little. One line each, with what to do; exit status 1 if
something fails. Launched on many ranks, it checks these instead of two of its own.

  sslcells doctor --out /scratch/me/runs
  accelerate launch --config_file launch/gpu8.yaml -m sslcells.doctor
"""

_RUNS = """\
List every run in a folder, at any depth: running, silent (since when), broken (what), failed (why), stopped, finished;
its step, the time left, the best figure on val, and the curve of its loss. It reads the folders and changes nothing.

  sslcells runs
  sslcells runs /shared/me/runs --watch
"""

_BOARD = """\
Show the runs of `sslcells runs` as a page that renews itself: sortable, filtered, with curves and links to reports.
Only this machine can open it, and it needs no network. On a cluster: ssh -L 8000:localhost:8000 LOGIN_NODE, and the
page is at http://localhost:8000 on your own computer.

  sslcells board /shared/me/runs
  sslcells board /shared/me/runs --out board.html
"""

_EXPORT = """\
Export the encoder for timm, torch.export and ONNX, with a model card. The output of each format is compared with the
encoder's. A format that cannot be written is skipped, and the last lines say why.

  sslcells export runs/my_cells
"""

_RECIPE = "a YAML file, or the name of a recipe (see: sslcells recipes)"

_CPU = "use the CPU even if the machine has an accelerator"


def arguments(command: str | None = None, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line, with the command's name first unless `command` gives it; exits with 2 on error."""
    parser = argparse.ArgumentParser(prog="sslcells", description="Self-supervised learning for cell images.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    making = (_train, _evaluate, _compare, _compare_runs, _tune, _doctor)
    using = (_export, _embed, _search, _sources, _cells, _split, _pack)
    for add in (*making, *using, _runs, _board, _sync, _recipes, _init):
        add(commands)
    argv = list(sys.argv[1:] if argv is None else argv)
    args, rest = parser.parse_known_args([command, *argv] if command else argv)
    if rest and (not hasattr(args, "overrides") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest  # argparse takes them only before or only after the options
    return args


_Commands = Any
"""What `add_subparsers` returns; argparse does not export its type."""


def _command(
    commands: _Commands, name: str, summary: str, description: str | None = None, aliases: Sequence[str] = ()
) -> argparse.ArgumentParser:
    """Add a command, with former names as aliases; its description keeps its line breaks."""
    raw = argparse.RawDescriptionHelpFormatter
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=description, formatter_class=raw, aliases=aliases
    )
    return parser


def _path(typed: str) -> str:
    return str(place(typed))


def _recipe_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--config", metavar="RECIPE", type=_path, help=_RECIPE)
    sub.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the recipe")


def _pattern_options(sub: argparse.ArgumentParser) -> None:
    words = "only images whose path below the folder matches, such as '*.tif' or 'plate_1/**/good'; may be repeated"
    sub.add_argument("--include", metavar="PATTERN", action="append", default=[], help=words)
    words = "not images whose path matches, such as '*_dup*' or blurred; may be repeated"
    sub.add_argument("--exclude", metavar="PATTERN", action="append", default=[], help=words)


def _train(commands: _Commands) -> None:
    sub = _command(commands, "train", "train an encoder", _TRAIN)
    _recipe_options(sub)
    words = "print the full configuration and what follows from it, then exit"
    sub.add_argument("--check", action="store_true", help=words)
    words = "run five steps in one process, with checks and detailed output"
    sub.add_argument("--debug", action="store_true", help=words)


def _evaluate(commands: _Commands) -> None:
    sub = _command(commands, "evaluate", "evaluate a finished run", _EVALUATE)
    sub.add_argument("run", metavar="RUN", type=place, help="the run's folder")
    sub.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to data, evaluate or train")
    words = "images of a laboratory that training never saw, classes as sub-folders, or a table; may be repeated"
    sub.add_argument("--lab", action="append", default=[], metavar="NAME=FOLDER", help=words)
    _lab_sources(sub)
    words = (
        "an encoder to measure beside the run's, frozen: published weights (as model.weights names them), a run or an "
        "export; {weights: FILE, backbone: NAME} for a file; may be repeated"
    )
    sub.add_argument("--against", action="append", default=[], metavar="NAME", help=words)
    words = "first fine-tune the encoder on fractions of the labels (set by compare.*): minutes to hours"
    sub.add_argument("--fine-tune", action="store_true", help=words)
    words = "folder for the results, such as those on other data than the run's (RUN)"
    sub.add_argument("--out", metavar="FOLDER", type=place, help=words)


def _compare(commands: _Commands) -> None:
    summary = "compare supervised training, a probe and fine-tuning on few labels"
    sub = _command(commands, "compare", summary, _COMPARE)
    _recipe_options(sub)
    words = "an encoder to measure beside the run's, frozen, as in `sslcells evaluate --against`; may be repeated"
    sub.add_argument("--frozen", action="append", default=[], metavar="NAME", help=words)
    words = "images of a laboratory that training never saw, to ask all models about; may be repeated"
    sub.add_argument("--lab", action="append", default=[], metavar="NAME=FOLDER", help=words)
    _lab_sources(sub)


def _compare_runs(commands: _Commands) -> None:
    summary = "compare two evaluated runs, on the same images"
    sub = _command(commands, "compare-runs", summary, _COMPARE_RUNS)
    words = "folder of an evaluated run, or of the results of `sslcells evaluate --out`"
    sub.add_argument("first", metavar="RUN_A", type=place, help=words)
    sub.add_argument("second", metavar="RUN_B", type=place, help="the same of the other, which is asked about")
    words = "file of the page (RUN_B/compared_with_RUN_A.html)"
    sub.add_argument("--out", metavar="FILE", type=place, help=words)
    words = "compare the images that both were asked about, where they were not asked about the same"
    sub.add_argument("--common", action="store_true", help=words)


def _tune(commands: _Commands) -> None:
    sub = _command(commands, "tune", "search for good settings, choosing on val", _TUNE)
    _recipe_options(sub)
    words = "what is searched: KEY=LOW..HIGH, KEY=LOW..HIGH:log or KEY=A,B,C; may be repeated"
    ranged: dict[str, Any] = {"nargs": "+", "action": "extend", "default": [], "metavar": "KEY=RANGE"}
    sub.add_argument("--search", help=words, **ranged)
    words = "trials of the study, of all processes together (20); a larger number goes on with a study"
    sub.add_argument("--trials", type=int, default=20, metavar="N", help=words)
    sub.add_argument("--seed", type=int, default=0, metavar="N", help="seed of what trials choose (0)")
    words = "print the configuration and what is searched, then exit"
    sub.add_argument("--check", action="store_true", help=words)


def _lab_sources(sub: argparse.ArgumentParser) -> None:
    words = "table with the source (photograph, slide, donor) of each image of that folder: columns path and source"
    sub.add_argument("--lab-sources", action="append", default=[], metavar="NAME=CSV", help=words)


def _doctor(commands: _Commands) -> None:
    summary = "check this machine or cluster, and say what to do about what is wrong"
    sub = _command(commands, "doctor", summary, _DOCTOR, aliases=["selfcheck"])
    sub.set_defaults(command="doctor")
    words = "folder where runs will be written, to look at its disk (runs)"
    sub.add_argument("--out", metavar="FOLDER", default="runs", type=_path, help=words)


def _export(commands: _Commands) -> None:
    summary = "export the encoder for timm, torch and ONNX, with a model card"
    sub = _command(commands, "export", summary, _EXPORT)
    sub.add_argument("run", metavar="RUN", type=_path, help="folder of a finished run")
    sub.add_argument("--to", metavar="FOLDER", type=_path, help="output folder (RUN/export)")
    words = "if the encoder standardises by laboratory: the one whose images the programs (torch.export, ONNX) take"
    sub.add_argument("--lab", metavar="NAME", help=words)
    onnx = sub.add_mutually_exclusive_group()
    onnx.add_argument("--onnx", action="store_true", help="fail if ONNX cannot be written")
    onnx.add_argument("--no-onnx", action="store_true", help="do not write ONNX")


def _embed(commands: _Commands) -> None:
    sub = _command(commands, "embed", "embed a folder of images, or a table of them", _EMBED)
    sub.add_argument("run", metavar="RUN", type=_path, help="folder of a finished run, or an exported encoder")
    words = "folder of images, at any depth, or a table of them"
    sub.add_argument("images", metavar="IMAGES", type=_path, help=words)
    words = "settings of the table, if it is not the one that the run was trained on"
    sub.add_argument("overrides", nargs="*", metavar="data.key=value", help=words)
    sub.add_argument("--out", metavar="FOLDER", type=_path, help="output folder (RUN/embeddings/NAME)")
    words = "laboratory of all images, if the encoder standardises by laboratory: a known one, or a new one"
    sub.add_argument("--lab", metavar="NAME", help=words)
    formats, words = ["parquet", "npz", "h5ad"], "file format of the shards (parquet)"
    sub.add_argument("--format", default="parquet", choices=formats, help=words)
    _pattern_options(sub)
    sub.add_argument("--no-labels", action="store_true", help="do not read classes: of a folder the first sub-folder")
    sub.add_argument("--batch", type=int, default=256, metavar="N", help="images per rank and forward pass (256)")
    sub.add_argument("--workers", type=int, metavar="N", help="data loader processes per rank")
    sub.add_argument("--shard", type=int, metavar="N", help="images per shard (4096)")
    sub.add_argument("--cpu", action="store_true", help=_CPU)


def _search(commands: _Commands) -> None:
    sub = _command(commands, "search", "find the embedded images most similar to given ones")
    words = "output folder of sslcells embed, or the run it used"
    sub.add_argument("target", metavar="RUN_OR_EMBEDDINGS", type=_path, help=words)
    sub.add_argument(
        "queries",
        metavar="QUERY",
        nargs="+",
        type=_path,
        help="image files; of an embedded table also names of rows or ids of cells",
    )
    sub.add_argument("--k", type=int, default=10, metavar="N", help="neighbours per query (10)")
    words = "folder for the picture and the table (EMBEDDINGS/search)"
    sub.add_argument("--out", metavar="FOLDER", type=_path, help=words)
    sub.add_argument("--encoder", metavar="RUN", type=_path, help="the run, if it was moved after embedding")
    words = "laboratory of query images, if the encoder standardises by laboratory and they are not embedded"
    sub.add_argument("--lab", metavar="NAME", help=words)
    words = "table with columns path and source; neighbours of the query's source are skipped"
    sub.add_argument("--sources", metavar="CSV", type=_path, help=words)
    sub.add_argument("--source-pattern", metavar="REGEX", help="its one group, searched in the path, gives the source")
    sub.add_argument("--faiss", action="store_true", help="use an index, built once: faster, but may miss neighbours")
    sub.add_argument("--cpu", action="store_true", help=_CPU)


def _sources(commands: _Commands) -> None:
    sub = _command(commands, "sources", "find images made from the same photograph", _SOURCES)
    sub.add_argument("images", metavar="IMAGES", type=_path, help="folder of images, at any depth")
    _pattern_options(sub)
    words = "folder for sources.csv and sources.png (current folder)"
    sub.add_argument("--out", metavar="FOLDER", type=_path, help=words)
    words = "table with the true sources, columns path and source; prints precision and recall"
    sub.add_argument("--known", metavar="CSV", type=_path, help=words)
    words = "keypoints that two images must share (12); twice as many between groups"
    sub.add_argument("--inliers", type=int, default=12, metavar="N", help=words)
    words = "images closest in colour that each image is compared with (20)"
    sub.add_argument("--neighbours", type=int, default=20, metavar="N", help=words)
    words = "pairs of groups to compare at the end (100000)"
    sub.add_argument("--between", type=int, default=100_000, metavar="N", help=words)


def _split(commands: _Commands) -> None:
    sub = _command(commands, "split", "divide a table into splits that share no donor", _SPLIT)
    sub.add_argument("table", metavar="TABLE", type=_path, help="CSV or Parquet file, one row per image")
    words = "columns whose values no two splits may share; images listed twice are never shared"
    sub.add_argument("--by", metavar="COLUMN", nargs="+", required=True, help=words)
    sub.add_argument("--stratify", metavar="COLUMN", help="column whose values each split should have alike")
    words = "also write a column for each value of this one, with its rows as test: leave one site out"
    sub.add_argument("--site", metavar="COLUMN", help=words)
    words = "shares of train, val and test (0.7 0.1 0.2)"
    sub.add_argument("--parts", metavar="SHARE", nargs=3, type=float, default=[0.7, 0.1, 0.2], help=words)
    sub.add_argument("--column", metavar="NAME", default="split", help="column to write (split)")
    sub.add_argument("--seed", type=int, default=0, metavar="N", help="another seed gives another division (0)")
    sub.add_argument("--out", metavar="FILE", type=_path, help="table to write (beside TABLE, called NAME_split)")


def _cells(commands: _Commands) -> None:
    sub = _command(commands, "cells", "cut cells out of fields by their masks", _CELLS)
    words = "folder of fields, at any depth, or a table with the path of a field in each row"
    sub.add_argument("images", metavar="IMAGES", type=_path, help=words)
    words = "folder of masks, called as their fields, also with _masks, _mask, _seg or _labels (beside the fields)"
    sub.add_argument("--masks", metavar="FOLDER", type=_path, help=words)
    sub.add_argument("--out", metavar="FOLDER", type=_path, required=True, help="output folder")
    side = sub.add_mutually_exclusive_group(required=True)
    side.add_argument("--fov", type=float, metavar="UM", help="width of each cut in µm, whatever the magnification")
    side.add_argument("--size", type=int, metavar="PIXELS", help="width of each cut in pixels of the field")
    words = "value of all that is not the cell; keep leaves it as it is (keep)"
    sub.add_argument("--background", type=_value_or_keep, metavar="VALUE", help=words)
    words = "cells that touch the border of the field (leave-out)"
    sub.add_argument("--border", choices=["leave-out", "keep"], default="leave-out", help=words)
    words = "leave out smaller cells: µm² with --fov, pixels with --size (0)"
    sub.add_argument("--min-area", type=float, default=0.0, metavar="AREA", help=words)
    words = "scale of fields of which neither table nor file says it"
    sub.add_argument("--um-per-pixel", type=float, metavar="UM", help=words)
    words = "µm per pixel at a magnification of 1, for a table's column of magnifications"
    sub.add_argument("--um-per-pixel-at-1x", type=float, metavar="UM", help=words)
    sub.add_argument("--label", metavar="NAME", help="which of several labels of an OME-Zarr image")
    sub.add_argument("--z", choices=["middle", "max"], default="middle", help="of several planes (middle)")
    sub.add_argument("--level", type=int, default=0, metavar="N", help="level of pyramids (0, the largest)")
    sub.add_argument("--channels", type=int, metavar="N", help="channels, if the files do not name their axes")
    sub.add_argument("--format", choices=["parquet", "csv"], default="parquet", help="of the table (parquet)")


def _value_or_keep(typed: str) -> float | None:
    try:
        return None if typed == "keep" else float(typed)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{typed!r} is neither keep nor a number") from None


def _pack(commands: _Commands) -> None:
    sub = _command(commands, "pack", "decode a data set once, to train faster", _PACK)
    sub.add_argument("source", metavar="SOURCE", type=_path, help="folder of images, table, or .npz file")
    sub.add_argument("overrides", nargs="*", metavar="data.key=value", help="how the data set is read")
    sub.add_argument("--out", metavar="FOLDER", type=_path, required=True, help="folder for the pack")
    words = "resize images to this many pixels, or HEIGHTxWIDTH; the same as data.size"
    sub.add_argument("--size", metavar="N", help=words)
    sub.add_argument("--config", metavar="RECIPE", type=_path, help=f"read the data set as {_RECIPE} does")
    sub.add_argument("--shard", type=int, metavar="MIB", help="size of a shard, the most that a kill costs (256)")
    sub.add_argument("--workers", type=int, metavar="N", help="processes that decode")


def _runs(commands: _Commands) -> None:
    sub = _command(commands, "runs", "list every run with state, step, time left and best figure", _RUNS)
    sub.add_argument("folder", metavar="FOLDER", nargs="?", default="runs", type=_path, help="searched in (runs)")
    words = "show them again every so many seconds (5) until Ctrl-C"
    sub.add_argument("--watch", metavar="SECONDS", nargs="?", const=5.0, type=_seconds, help=words)


def _board(commands: _Commands) -> None:
    sub = _command(commands, "board", "show the runs of `sslcells runs` as a page in your browser", _BOARD)
    sub.add_argument("folder", metavar="FOLDER", nargs="?", default="runs", type=_path, help="searched in (runs)")
    either = sub.add_mutually_exclusive_group()
    words = "port on this machine (8000); 0 for any that is free"
    either.add_argument("--port", metavar="N", type=_port, default=8000, help=words)
    either.add_argument("--out", metavar="FILE", type=_path, help="write the page to this file instead of serving it")


def _port(typed: str) -> int:
    if not typed.isdecimal() or int(typed) > 65_535:
        raise argparse.ArgumentTypeError(f"{typed!r} is no port from 0 to 65535")
    return int(typed)


def _seconds(typed: str) -> float:
    try:
        seconds = float(typed)
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds <= 86_400:
        raise argparse.ArgumentTypeError(f"{typed!r} is no number of seconds from 0.1 to 86400")
    return seconds


def _sync(commands: _Commands) -> None:
    sub = _command(commands, "sync", "upload to W&B what it does not have yet of a run")
    sub.add_argument("runs", nargs="+", metavar="RUN", type=_path, help="a run's folder, such as runs/quickstart")


def _recipes(commands: _Commands) -> None:
    description = "List the recipes that --config accepts by name, or print one."
    sub = _command(commands, "recipes", "list the recipes, or print one", description)
    sub.add_argument("name", metavar="RECIPE", nargs="?", help="recipe to print")


def _init(commands: _Commands) -> None:
    sub = _command(commands, "init", "write launch files and SLURM templates into a folder", _INIT)
    sub.add_argument("folder", metavar="FOLDER", type=_path, help="folder to write to; it is created if needed")
    sub.add_argument("--recipes", action="store_true", help="also write all recipes, into configs/")
    sub.add_argument("--overwrite", action="store_true", help="replace existing files that differ")
