"""What a resumed run needs, as one plain object, and what can be had of a finished run's."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sslcells import learner, ranks
from sslcells.config import ConfigError, Run
from sslcells.data import ImageSet
from sslcells.methods import Learner
from sslcells.run import checkpoint
from sslcells.run.meter import Meter


@dataclass
class State:
    """Everything that changes from step to step; the rest of a run is a function of its configuration and `step`."""

    learner: Learner
    optimizer: torch.optim.Optimizer
    scaler: Any
    """of fp16's losses, or None"""
    meter: Meter
    step: int = 0
    """finished optimizer steps"""
    saved: int = 0
    """finished steps of the newest checkpoint"""

    def load(self, path: Path) -> None:
        """Take everything from a whole checkpoint."""
        self.step, states = checkpoint.load(path, self.learner)
        self.saved = self.step
        self.optimizer.load_state_dict(states["optimizer"])
        self.meter.load_state_dict(states["meter"])
        if self.scaler is not None:
            self.scaler.load_state_dict(states["scaler"])

    def check(self) -> None:
        """Make sure that every number is finite, and give all ranks one network; every rank takes part.

        Where each rank has its own BatchNorm statistics, rank 0's count, as DDP has it at the next step.

        Raises:
            TrainingError: where a loss, a gradient's norm, a weight or the optimizer's state is not finite.
        """
        self.meter.check(self.step)
        self.meter.check_states(self.step, self.learner, {"optimizer": self.optimizer.state_dict()})
        ranks.as_on_main(self.learner)

    def save(self, writer: checkpoint.Writer) -> None:
        """Have rank 0 begin to write a checkpoint, where steps were finished since the last one.

        Raises:
            TrainingError: as `check`; nothing is written then.
            CheckpointError: where the checkpoint before could not be written.
        """
        ranks.together(writer.wait)  # so that an error below names the newest checkpoint
        self.check()
        if ranks.rank() == 0 and self.step > self.saved:
            states = {"optimizer": self.optimizer.state_dict(), "meter": self.meter.state_dict()}
            if self.scaler is not None:
                states["scaler"] = self.scaler.state_dict()
            writer.save(self.step, self.learner, states)
        self.saved = self.step


def trained(run: Run, folder: Path, images: ImageSet, device: torch.device) -> Learner:
    """What a run has trained, from its newest checkpoint; every rank takes part.

    Raises:
        ConfigError: where the run's folder holds no whole checkpoint.
    """
    newest = ranks.from_main(lambda: checkpoint.newest(folder / "checkpoints"))
    if newest is None:
        raise ConfigError(f"{folder / 'checkpoints'} holds no whole checkpoint: what the run trained is not there")
    without = {"model": {"encoder": None, "pretrained": False}, "train": {"compile": False}}
    own = {section: getattr(run, section).model_copy(update=update) for section, update in without.items()}
    built = learner.build(run.model_copy(update=own), images, sync_batchnorm=False)
    checkpoint.load(newest, built)
    return built.to(device)
