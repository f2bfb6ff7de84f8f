"""The arguments of every command, and what becomes of an error: one line, and the exit status.

Nothing here imports torch: --help, --version and a misspelt option need none of it.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from sslcells import __version__
from sslcells.errors import ConfigError, UserError
from sslcells.storage import denied
from sslcells.values import place

_TRAIN = """\
Train an encoder. With no argument: SimCLR on synthetic blood cells, small enough for a laptop.

  accelerate launch -m sslcells.train --config folder data.path=my/cells name=my_cells
  sslcells train --config simclr_bloodcells --check
  sslcells train --debug method.name=triplet
"""

_EMBED = """\
Embed every image below a folder: shards of path, id, vector, label. Killed at any moment and given again, it goes on.

  sslcells embed runs/my_cells path/to/images
  accelerate launch --config_file launch/gpu8.yaml -m sslcells embed runs/my_cells path/to/images
"""

_EVALUATE = """\
Measure a finished run: leaks first, then kNN, linear probe, few-shot, retrieval, clustering, figures without labels;
and on request fine-tuning.
Printed, written to RUN/evaluation.json, and with pictures to RUN/report.html. It asks test, which training did not
read; evaluate.split=val is for choosing between runs.

  sslcells evaluate runs/my_cells
  sslcells evaluate runs/my_cells data.sources=sources.csv evaluate.split=val
  accelerate launch --config_file launch/gpu8.yaml -m sslcells.evaluate runs/my_cells
"""


_COMPARE = """\
Train the recipe's encoder without labels, then on parts of the labels three classifiers with the same backbone, data
and steps: supervised from scratch, a probe on the frozen encoder, and the encoder fine-tuned. Printed, written to
RUN/comparison.json, and with curves and predictions to RUN/comparison.html. What is done is not done again.

  sslcells compare --config compare_pbc28 data.path=pbc28.npz
  accelerate launch --config_file launch/gpu8.yaml -m sslcells.compare --config compare_pathmnist
"""


_SOURCES = """\
Find which images of a folder were made from one photograph (turned, mirrored, shifted, cropped), where no name says so:
sources.csv for data.sources, so that such images are no negatives of each other and leak into no figure.

  sslcells sources path/to/images --out runs/sources
  sslcells train --config simclr_bloodcells data.path=path/to/images data.sources=runs/sources/sources.csv
"""


_INIT = """\
Write launch/ (who runs where, for accelerate launch), slurm/ (templates of jobs) and a sweep's file into a folder of
yours, and all recipes if asked to. Files that are there and differ are kept, and named.

  sslcells init my_project
  cd my_project && accelerate launch --config_file launch/gpu8.yaml -m sslcells.train --config folder data.path=my/cells
  cd my_project && bash slurm/simclr.sh data.path=/shared/cells name=cells
"""

_EXPORT = """\
Write the encoder for timm, torch.export and ONNX, each checked against it, with a model card. A form that cannot be
made is left out, and the last lines say why.

  sslcells export runs/my_cells
"""


def run(name: str, command: Callable[[argparse.Namespace], None]) -> int:
    """Run one command on the arguments of this process: the exit status of `python -m sslcells.<name>`."""
    args = arguments(name)
    return guarded(lambda: command(args))


def arguments(command: str | None = None, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse what was typed, the command's name first unless `command` gives it; exits with 2 where that fails."""
    parser = argparse.ArgumentParser(prog="sslcells", description="Self-supervised learning for cell images.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    raw = argparse.RawDescriptionHelpFormatter
    sub = commands.add_parser("train", help="train an encoder", description=_TRAIN, formatter_class=raw)
    sub.add_argument("--config", metavar="RECIPE", type=_path, help=_RECIPE)
    sub.add_argument("--check", action="store_true", help="print the whole configuration, what follows from it; stop")
    sub.add_argument("--debug", action="store_true", help="five steps in one process, checked and shown in detail")
    sub.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the recipe")
    sub = commands.add_parser("evaluate", help="measure a finished run", description=_EVALUATE, formatter_class=raw)
    sub.add_argument("run", metavar="RUN", type=place, help="the run's folder")
    sub.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to data, evaluate or train")
    words = "fine-tune the encoder on parts of the labels first (compare.* says how): minutes to hours"
    sub.add_argument("--fine-tune", action="store_true", help=words)
    three = "what labels are worth: supervised, probe, fine-tuned"
    sub = commands.add_parser("compare", help=three, description=_COMPARE, formatter_class=raw)
    sub.add_argument("--config", metavar="RECIPE", type=_path, help=_RECIPE)
    sub.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the recipe")
    commands.add_parser("selfcheck", help="does this machine or cluster compute what it should?")
    words = "write the encoder for timm, torch and ONNX, with a model card"
    sub = commands.add_parser("export", help=words, description=_EXPORT, formatter_class=raw)
    sub.add_argument("run", metavar="RUN", type=_path, help="folder of a finished run")
    sub.add_argument("--to", metavar="FOLDER", type=_path, help="where to; RUN/export otherwise")
    onnx = sub.add_mutually_exclusive_group()
    onnx.add_argument("--onnx", action="store_true", help="fail where ONNX cannot be written")
    onnx.add_argument("--no-onnx", action="store_true", help="leave ONNX out")
    sub = commands.add_parser("embed", help="embed a folder of images", description=_EMBED, formatter_class=raw)
    sub.add_argument("run", metavar="RUN", type=_path, help="folder of a finished run, or an exported encoder")
    sub.add_argument("images", metavar="IMAGES", type=_path, help="folder of images, at any depth")
    sub.add_argument("--out", metavar="FOLDER", type=_path, help="where to; RUN/embeddings/NAME otherwise")
    sub.add_argument("--format", default="parquet", choices=["parquet", "npz", "h5ad"], help="of the shards (parquet)")
    sub.add_argument("--no-labels", action="store_true", help="the first sub-folder is not a class")
    sub.add_argument("--batch", type=int, default=256, metavar="N", help="images a rank and forward pass (256)")
    sub.add_argument("--workers", type=int, metavar="N", help="processes a rank that read images")
    sub.add_argument("--shard", type=int, metavar="N", help="images a shard (4096)")
    sub.add_argument("--cpu", action="store_true", help="even where there is an accelerator")
    sub = commands.add_parser("search", help="find the embedded images nearest to others")
    sub.add_argument(
        "target", metavar="RUN_OR_EMBEDDINGS", type=_path, help="what sslcells embed wrote, or the run it used"
    )
    sub.add_argument("queries", metavar="QUERY", nargs="+", type=_path, help="image files")
    sub.add_argument("--k", type=int, default=10, metavar="N", help="neighbours of each (10)")
    sub.add_argument(
        "--out", metavar="FOLDER", type=_path, help="for the picture and the table; EMBEDDINGS/search otherwise"
    )
    sub.add_argument("--encoder", metavar="RUN", type=_path, help="where the run is not where it was")
    sub.add_argument(
        "--sources", metavar="CSV", type=_path, help="columns path and source: a query's own source is left out"
    )
    sub.add_argument("--source-pattern", metavar="REGEX", help="its one group, searched in the path, is the source")
    sub.add_argument("--faiss", action="store_true", help="with an index that is made once: quicker, may miss some")
    sub.add_argument("--cpu", action="store_true", help="even where there is an accelerator")
    same = "find images made from one photograph"
    sub = commands.add_parser("sources", help=same, description=_SOURCES, formatter_class=raw)
    sub.add_argument("images", metavar="IMAGES", type=_path, help="folder of images, at any depth")
    sub.add_argument(
        "--out", metavar="FOLDER", type=_path, help="for sources.csv and sources.png; this folder otherwise"
    )
    sub.add_argument(
        "--known", metavar="CSV", type=_path, help="columns path and source: print precision and recall against them"
    )
    sub.add_argument(
        "--inliers",
        type=int,
        default=12,
        metavar="N",
        help="details that two images must share (12), twice as many between groups",
    )
    sub.add_argument("--neighbours", type=int, default=20, metavar="N", help="by colour, compared with each (20)")
    words = "pairs of groups, compared with one another at the end (100000)"
    sub.add_argument("--between", type=int, default=100_000, metavar="N", help=words)
    sub = commands.add_parser("sync", help="send runs to W&B, as far as it has not got them yet")
    sub.add_argument("runs", nargs="+", metavar="RUN", type=_path, help="a run's folder, such as runs/quickstart")
    words = "list the recipes, or print one"
    sub = commands.add_parser("recipes", help=words, description="List what --config takes by name, or print it.")
    sub.add_argument("name", metavar="RECIPE", nargs="?", help="print this recipe's file")
    words = "write launch files and SLURM templates into a folder"
    sub = commands.add_parser("init", help=words, description=_INIT, formatter_class=raw)
    sub.add_argument("folder", metavar="FOLDER", type=_path, help="made where there is none")
    sub.add_argument("--recipes", action="store_true", help="all recipes too, into configs/")
    sub.add_argument("--overwrite", action="store_true", help="replace files that are there and differ")
    argv = list(sys.argv[1:] if argv is None else argv)
    args, rest = parser.parse_known_args([command, *argv] if command else argv)
    if rest and (not hasattr(args, "overrides") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest  # argparse takes one run of them, before or after the options
    return args


_RECIPE = "a YAML file, or the name of a recipe: sslcells recipes lists them"


def _path(typed: str) -> str:
    return str(place(typed))


def guarded(command: Callable[[], None]) -> int:
    """The exit status of a command; a mistake of the user's is told once, without a traceback."""
    try:
        command()
    except UserError as error:
        status = told(error, error.status)
        if error.at_once:
            sys.stderr.flush()
            os._exit(status)  # what waits for a rank that is gone may never end in order
        return status
    except PermissionError as error:
        return told(ConfigError(denied(error)), 2)
    except RuntimeError as error:
        if "does not have a deterministic implementation" not in str(error):
            raise
        return told(
            error, 1, "\nAsked for by train.deterministic; warn goes on and names it, false gives the promise up"
        )
    except KeyboardInterrupt as ended:
        status = getattr(ended, "status", 130)
        word = "interrupted" if status == 130 else "ended by a second SIGTERM, without a checkpoint"
        print(f"sslcells: {word}", file=sys.stderr)
        return int(status)
    except Exception as error:
        if not _out_of_memory(error):
            raise
        return told(error, 1, "; a smaller train.micro_batch needs less, and train.precision=bf16")
    finally:
        if "sslcells.ranks" in sys.modules:
            from sslcells import ranks

            ranks.close()
    return 0


def _out_of_memory(error: Exception) -> bool:
    """Whether the device has no memory left; where torch was not imported, it was not asked for any."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(error, torch.OutOfMemoryError)


_LAUNCHED = {"RANK", "WORLD_SIZE", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK"}
"""Without any of these variables there is one process, which need not ask the launcher who it is."""


def told(error: Exception, status: int, advice: str = "") -> int:
    """Print what every rank knows once, and what one rank knows with its number."""
    notes, of, speaks = getattr(error, "__notes__", []), "", True
    if _LAUNCHED & os.environ.keys():
        from sslcells import launcher

        may_be_alone = error.one_ranks if isinstance(error, UserError) else _out_of_memory(error)
        alone = may_be_alone and not notes and launcher.launched_world() > 1
        of = f"rank {launcher.launched_rank()}: " if alone else "".join(f"{note}: " for note in notes[:1])
        speaks = launcher.first() or alone
    if speaks:
        print(f"sslcells: {of}{error}{advice}", file=sys.stderr)
    return status


def one_process(what: str) -> None:
    """Raise a ConfigError where several processes were launched."""
    from sslcells import launcher

    if launcher.launched_world() > 1:
        raise ConfigError(f"{what} is for one process; {launcher.launched_world()} were launched")
