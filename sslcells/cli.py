"""The commands: `sslcells <command>`. A command is imported only when it runs, as torch alone takes seconds."""

import argparse
import contextlib
from collections.abc import Sequence
from pathlib import Path

from sslcells import __version__, shipped
from sslcells.arguments import arguments
from sslcells.commandline import guarded, one_process, report_error
from sslcells.errors import ConfigError, UserError


def main(command: str | None = None, argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status: 0 success, 1 failure while running, 2 a mistake in the request."""
    args = arguments(command, argv)
    return guarded(lambda: _COMMANDS[args.command](args))


def _train(args: argparse.Namespace) -> None:
    from sslcells.config import load

    load(args.config, args.overrides)  # reports mistakes before torch is imported
    from sslcells.train import command

    command(args)


def _evaluate(args: argparse.Namespace) -> None:
    from sslcells.evaluate import command

    command(args)


def _compare(args: argparse.Namespace) -> None:
    from sslcells.config import load

    load(args.config, args.overrides)  # as above
    from sslcells.compare import command

    command(args)


def _compare_runs(args: argparse.Namespace) -> None:
    from sslcells.evaluation.two_runs import compare_runs

    one_process("compare-runs")
    compare_runs([args.first, args.second], args.out, args.common)


def _tune(args: argparse.Namespace) -> None:
    from sslcells.config import installed
    from sslcells.tuning.ranges import ranges

    ranges(args.search, args.config, args.overrides)  # as above
    installed("optuna", "optuna", "sslcells tune")
    from sslcells.tune import command

    command(args)


def _doctor(args: argparse.Namespace) -> None:
    from sslcells.doctor import command

    command(args)


def _runs(args: argparse.Namespace) -> None:
    from sslcells.overview import console

    if args.watch is None:
        console.show(Path(args.folder))
    else:
        with contextlib.suppress(KeyboardInterrupt):  # the way to end it
            console.watch(Path(args.folder), args.watch)


def _board(args: argparse.Namespace) -> None:
    from sslcells.overview import board

    if args.out is not None:
        board.write(Path(args.folder), Path(args.out))
        print(args.out)
        return
    with contextlib.suppress(KeyboardInterrupt):
        board.serve(Path(args.folder), args.port)


def _sync(args: argparse.Namespace) -> None:
    """Upload each run, even if others fail; the exit status is the highest of all."""
    status = 0
    from sslcells.models import files
    from sslcells.run import lock, wandb_sync

    for folder in map(Path, args.runs):
        ended, busy = (folder / files.SPEC).exists(), (folder / lock.FILE).exists()
        try:
            print(wandb_sync.sync(folder, "ended" if ended else "died" if busy else "stopped"), flush=True)
        except UserError as error:
            status = max(status, report_error(error, error.status))
    if status:
        raise SystemExit(status)


def _export(args: argparse.Namespace) -> None:
    from sslcells.delivery.export import export

    one_process("export")
    export(args.run, args.to, onnx=True if args.onnx else False if args.no_onnx else None, lab=args.lab)


def _recipes(args: argparse.Namespace) -> None:
    if args.name is None:
        recipes = shipped.recipes()
        width = max(map(len, recipes))
        print("\n".join(f"{name:{width}}  {shipped.about(file)}" for name, file in recipes.items()))
        return
    file = shipped.recipe(args.name)
    if file is None:
        from sslcells.config import no_recipe

        raise ConfigError(f"{args.name}: {no_recipe(args.name)}")
    print(file.read_text(encoding="utf-8"), end="")


def _init(args: argparse.Namespace) -> None:
    done = shipped.copy(args.folder, args.recipes, args.overwrite)
    for words, names in (("written", done.written), ("already there, unchanged", done.same)):
        if names:
            print(f"{words}: {', '.join(names)}")
    for name in done.kept:
        print(f"kept, although it differs from the file of sslcells {__version__}: {name}")
    if done.kept:
        print("use --overwrite to replace files that differ")
    print(f"work from {args.folder}; slurm/site.sh is the place for the options of your cluster")


def _embed(args: argparse.Namespace) -> None:
    from sslcells.delivery.embedding import embed_folder

    embed_folder(
        args.run,
        args.images,
        args.out,
        args.format,
        not args.no_labels,
        args.batch,
        args.workers,
        args.shard,
        args.cpu,
        args.include,
        args.exclude,
        args.overrides,
        args.lab,
    )


def _search(args: argparse.Namespace) -> None:
    from sslcells.delivery.search import search

    one_process("search")
    search(
        args.target,
        args.queries,
        args.k,
        args.out,
        args.encoder,
        args.sources,
        args.source_pattern,
        args.faiss,
        args.cpu,
        lab=args.lab,
    )


def _sources(args: argparse.Namespace) -> None:
    from sslcells.delivery.sources import sources

    one_process("sources")
    sources(args.images, args.out, args.known, args.inliers, args.neighbours, args.between, args.include, args.exclude)


def _split(args: argparse.Namespace) -> None:
    from sslcells.delivery.split import split

    one_process("split")
    split(args.table, args.by, args.stratify, args.site, args.parts, args.column, args.seed, args.out)


def _cells(args: argparse.Namespace) -> None:
    from sslcells.data._fields import How
    from sslcells.delivery.cell_table import Rule
    from sslcells.delivery.cells import cells

    one_process("cells")
    rule = Rule(args.fov, args.size, args.background, args.border, args.min_area)
    how = How(args.z, args.level, args.channels)
    scale = (args.um_per_pixel, args.um_per_pixel_at_1x)
    cells(args.images, args.masks, args.out, rule, *scale, args.label, how, args.format)


def _pack(args: argparse.Namespace) -> None:
    from sslcells.delivery.packing import pack

    one_process("pack")
    pack(args.source, args.out, args.overrides, args.config, args.size, args.shard, args.workers)


_COMMANDS = {
    "train": _train,
    "evaluate": _evaluate,
    "compare": _compare,
    "compare-runs": _compare_runs,
    "tune": _tune,
    "doctor": _doctor,
    "runs": _runs,
    "board": _board,
    "sync": _sync,
    "export": _export,
    "embed": _embed,
    "search": _search,
    "sources": _sources,
    "split": _split,
    "cells": _cells,
    "pack": _pack,
    "recipes": _recipes,
    "init": _init,
}
