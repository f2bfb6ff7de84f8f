"""The state of a run as one plain object, and the learner of a finished run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sslcells import learner, ranks, sharding
from sslcells.config import ConfigError, Run
from sslcells.data import ImageSet
from sslcells.methods import Learner
from sslcells.run import checkpoint
from sslcells.run.meter import Meter


@dataclass
class State:
    """Everything that changes with each step; the rest of a run depends only on its configuration and `step`."""

    learner: Learner
    whole: sharding.Whole[Learner]
    """the learner with all of its parameters"""
    optimizer: torch.optim.Optimizer
    scaler: Any
    """loss scaler of fp16, or None"""
    meter: Meter
    step: int = 0
    """finished optimizer steps"""
    saved: int = 0
    """finished steps at the newest checkpoint"""

    def load(self, path: Path) -> None:
        """Load everything from an intact checkpoint."""
        with self.whole.gathered(change=True) as net:
            self.step, states = checkpoint.load(path, net)
        self.saved = self.step
        sharding.load_state(self.optimizer, states["optimizer"])
        self.meter.load_state_dict(states["meter"])
        if self.scaler is not None:
            self.scaler.load_state_dict(states["scaler"])

    def check(self) -> None:
        """Check that all values are finite, and give every rank the network of rank 0; all ranks must call it.

        If each rank has its own BatchNorm statistics, those of rank 0 count, as in DDP's next step.

        Raises:
            TrainingError: if a loss, a gradient norm, a weight or the optimizer's state is not finite.
        """
        self.meter.check(self.step)
        self.meter.check_states(self.step, self.learner, {"optimizer": self.optimizer.state_dict()})
        ranks.as_on_main(self.learner)

    def save(self, writer: checkpoint.Writer) -> None:
        """Begin to write a checkpoint on rank 0 if there are steps since the last one; all ranks must call it.

        Raises:
            TrainingError: like `check`; then nothing is written.
            CheckpointError: if the previous checkpoint could not be written.
        """
        ranks.together(writer.wait)  # so that an error below names the newest checkpoint
        self.check()
        if self.step > self.saved:
            states = {"optimizer": sharding.state_of(self.optimizer), "meter": self.meter.state_dict()}
            if self.scaler is not None:
                states["scaler"] = self.scaler.state_dict()
            with self.whole.gathered() as net:
                if ranks.rank() == 0:
                    writer.save(self.step, net, states)
        self.saved = self.step


def trained(run: Run, folder: Path, images: ImageSet, device: torch.device) -> Learner:
    """The learner of a run, with the weights of its newest checkpoint; all ranks must call it.

    Raises:
        ConfigError: if the run's folder has no intact checkpoint.
    """
    newest = ranks.from_main(lambda: checkpoint.newest(folder / "checkpoints"))
    if newest is None:
        raise ConfigError(f"{folder / 'checkpoints'} has no intact checkpoint: the trained network cannot be loaded")
    run = run.model_copy(update={"train": run.train.model_copy(update={"compile": False})})
    built = learner.build(run, images, sync_batchnorm=False, resumes=True)
    checkpoint.load(newest, built)
    return built.to(device)
