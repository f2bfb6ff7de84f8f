"""What the launcher started: the Accelerator of this process, its device, and the launcher's rank and world size."""

import os
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import DistributedDataParallelKwargs

from sslcells import ranks
from sslcells.config import ConfigError, Run


def accelerator(run: Run) -> Accelerator:
    """Start the process group that the launcher described, if any, and bind this process to its device.

    Numerics come from the run's configuration alone: the launcher's mixed precision is overruled.

    Raises:
        ConfigError: where Accelerate would silently run apart the ranks that the launcher started.
    """
    return start(
        run.train.device == "cpu",
        run.train.timeout,
        mixed_precision=run.train.precision,
        log_with=None if run.log.tracker == "none" else run.log.tracker,
        project_dir=run.folder,
    )


def start(cpu: bool, minutes: float, **options: Any) -> Accelerator:
    """As `accelerator`, on the CPU if asked to or where there is nothing else; ranks wait for each other `minutes`.

    Raises:
        ConfigError: as `accelerator`.
    """
    timeout = timedelta(minutes=minutes)
    ranks.set_timeout(timeout)
    started = Accelerator(
        cpu=cpu or not torch.accelerator.is_available(),
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            InitProcessGroupKwargs(timeout=timeout),
        ],
        **options,
    )
    if started.num_processes != launched_world():
        raise ConfigError(
            f"{launched_world()} processes were launched, but Accelerate joins {started.num_processes}: "
            f"launch with one of launch/*.yaml"
        )
    return started


def launched_rank() -> int:
    """This process's rank as the launcher says it, known before any process group is."""
    return int(os.environ.get("RANK", "0"))


def launched_world() -> int:
    """Number of processes that the launcher started, known before any process group is."""
    return int(os.environ.get("WORLD_SIZE", "1"))
