"""Functions run on gloo ranks: real processes, started once and lent to every test."""

import atexit
import itertools
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import wait
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

_RANKS = 4
_TIMEOUT = timedelta(minutes=3)
_ANSWER = 600
"""seconds without an answer of any rank that count as a hang; four ranks that evaluate on slow cores take minutes"""
_counter = itertools.count()
_workers: list[tuple[Any, Any]] = []


def on_ranks(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What `function(*args)` returns on each of `world` ranks; an error on any of them is raised here."""
    try:
        return _on_ranks(world, function, args)
    except _NoGroup:  # gloo did not connect: no fault of the function, which no rank has called to its end
        return _on_ranks(world, function, args)


class _NoGroup(RuntimeError):
    """The ranks did not find each other."""


def _on_ranks(world: int, function: Callable[..., Any], args: tuple[Any, ...]) -> list[Any]:
    if not _workers:
        _start()
    store = f"{tempfile.gettempdir()}/sslcells-gloo-{os.getpid()}-{next(_counter)}"
    connections = [connection for _, connection in _workers[:world]]
    answers: dict[Any, tuple[Any, str | None, str | None]] = {}
    try:
        for rank, connection in enumerate(connections):
            connection.send(sys.path)  # test modules collected after the workers began
            connection.send((function, args, rank, world, store))
        while missing := [connection for connection in connections if connection not in answers]:
            ready = wait(missing, timeout=_ANSWER)
            if not ready:
                ranks = [connections.index(connection) for connection in missing]
                raise TimeoutError(f"ranks {ranks} of {world} did not answer in {_ANSWER} s")
            for connection in ready:
                answers[connection] = connection.recv()
                if no_group := answers[connection][2]:
                    raise _NoGroup(no_group)
    except (OSError, EOFError, _NoGroup):  # the next test gets ranks of its own
        _stop()
        raise
    for rank, connection in enumerate(connections):
        if error := answers[connection][1]:
            raise AssertionError(f"rank {rank} of {world} failed:\n{error}")
    return [answers[connection][0] for connection in connections]


@contextmanager
def launched() -> Iterator[None]:
    """On a rank: the environment that a launcher sets, so that Accelerate joins the process group."""
    from accelerate.state import AcceleratorState, GradientState

    rank, world = dist.get_rank(), dist.get_world_size()
    said = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world}
    said |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1, "ACCELERATE_USE_CPU": 1}
    os.environ.update({key: str(value) for key, value in said.items()})
    try:
        yield
    finally:
        for key in said:
            del os.environ[key]
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def _start() -> None:
    context = mp.get_context("spawn")
    for _ in range(_RANKS):
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs,), daemon=True)
        process.start()
        _workers.append((process, ours))
    atexit.register(_stop)


def _stop() -> None:
    for process, _ in _workers:
        process.kill()
    _workers.clear()


def _serve(connection: Any) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            sys.path[:] = connection.recv()
            function, args, rank, world, store = connection.recv()
        except EOFError:
            return
        try:
            dist.init_process_group(
                "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=_TIMEOUT
            )
        except BaseException:
            connection.send((None, None, f"rank {rank} of {world}:\n{traceback.format_exc()}"))
            continue
        try:
            answer = function(*args), None, None
        except BaseException:
            answer = None, traceback.format_exc(), None
        finally:
            dist.destroy_process_group()
        connection.send(answer)
