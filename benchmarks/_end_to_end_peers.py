"""A peer, training for some steps on a folder of images; runs in the peers' own environment, without sslcells.

    PYTHON benchmarks/_end_to_end_peers.py CASE FILE           # CASE: the fields of `Case`, as JSON

It writes JSON to FILE: seconds of the measured steps, and the peer's version. The clock is read after the optimizer's
steps, by torch's own hook, which every peer's loop goes through.
"""

import importlib.metadata
import json
import math
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

HIDDEN, DIMENSION, TEMPERATURE, RATE = 2048, 128, 0.1, 1e-3


class Case(NamedTuple):
    """What is trained, and on what."""

    peer: str
    folder: str
    """with one sub-folder of images"""
    images: int
    network: str
    size: int
    batch: int
    precision: str
    """bf16 or no"""
    workers: int
    warm: int
    """steps that are not measured"""
    steps: int
    device: str

    def args(self) -> dict[str, Any]:
        """Keyword arguments for timm.create_model."""
        return {"img_size": self.size} if self.network.startswith(("vit", "deit", "test_vit")) else {}

    def epochs(self) -> int:
        """Passes over the images that have enough steps."""
        return 1 + math.ceil((self.warm + self.steps) / (self.images // self.batch))


class Clock:
    """Called after each step of an optimizer; writes the result after the last one, and ends the process."""

    def __init__(self, case: Case, file: Path) -> None:
        self._case, self._file, self._count, self._began = case, file, 0, 0.0

    def __call__(self, *_: Any) -> None:
        """One step more."""
        self._count += 1
        if self._count not in (self._case.warm, self._case.warm + self._case.steps):
            return
        if self._case.device == "cuda":
            import torch

            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._count == self._case.warm:
            self._began = now
            return
        version = importlib.metadata.version(self._case.peer)
        self._file.write_text(json.dumps({"seconds": now - self._began, "version": version}), encoding="utf-8")
        os._exit(0)  # a normal exit would evaluate, export and wait


def lightly_train(case: Case, out: str) -> None:
    """`lightly_train.pretrain` with method simclr, whose defaults are those of HIDDEN, DIMENSION and TEMPERATURE."""
    import lightly_train as peer

    peer.pretrain(
        out=f"{out}/lightly-train",
        data=case.folder,
        model=f"timm/{case.network}",
        model_args=case.args(),
        method="simclr",
        epochs=case.epochs(),
        batch_size=case.batch,
        num_workers=case.workers,
        accelerator="gpu" if case.device == "cuda" else "cpu",
        devices=1,
        precision="bf16-mixed" if case.precision == "bf16" else "32-true",
        optim="adamw",
        optim_args={"lr": RATE},
        transform_args={"image_size": (case.size, case.size)},
    )


def lightly(case: Case, out: str) -> None:
    """The loop of lightly's own SimCLR example: its dataset, transform, head and loss, and torch's DataLoader."""
    import timm
    import torch
    from lightly.data import LightlyDataset
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead
    from lightly.transforms import SimCLRTransform

    images = LightlyDataset(case.folder, transform=SimCLRTransform(input_size=case.size))
    loader = torch.utils.data.DataLoader(
        images, case.batch, shuffle=True, drop_last=True, num_workers=case.workers, persistent_workers=case.workers > 0
    )
    backbone = timm.create_model(case.network, num_classes=0, **case.args())
    head = SimCLRProjectionHead(backbone.num_features, HIDDEN, DIMENSION)
    network = torch.nn.Sequential(backbone, head).to(case.device)
    loss, optimizer = NTXentLoss(TEMPERATURE), torch.optim.AdamW(network.parameters(), RATE)
    for _ in range(case.epochs()):
        for (first, second), *_ in loader:
            views = torch.cat([first, second]).to(case.device)
            with torch.autocast(case.device, torch.bfloat16, enabled=case.precision == "bf16"):
                rows = network(views)
                value = loss(*rows.chunk(2))
            value.backward()
            optimizer.step()
            optimizer.zero_grad()


def stable_pretraining(case: Case, out: str) -> None:
    """Its module with its SimCLR, on its data set and transforms, in Lightning's trainer."""
    import lightning
    import stable_pretraining as peer
    import timm
    import torch
    from stable_pretraining.data import transforms
    from stable_pretraining.forward import simclr
    from torchvision.datasets import ImageFolder

    view = transforms.Compose(
        transforms.RGB(),
        transforms.RandomResizedCrop((case.size, case.size), scale=(0.08, 1)),
        transforms.RandomHorizontalFlip(),
        transforms.ColorJitter(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, p=0.8),
        transforms.RandomGrayscale(p=0.2),
        transforms.PILGaussianBlur(p=0.5),
        transforms.ToImage(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
    )
    both = transforms.MultiViewTransform([view, view])
    images = peer.data.FromTorchDataset(ImageFolder(case.folder), ["image", "label"], transform=both)
    loader = torch.utils.data.DataLoader(
        images, case.batch, shuffle=True, drop_last=True, num_workers=case.workers, persistent_workers=case.workers > 0
    )
    backbone = timm.create_model(case.network, num_classes=0, **case.args())
    head = torch.nn.Sequential(
        torch.nn.Linear(backbone.num_features, HIDDEN, bias=False),
        torch.nn.BatchNorm1d(HIDDEN),
        torch.nn.ReLU(inplace=True),
        torch.nn.Linear(HIDDEN, DIMENSION),
    )
    module = peer.Module(
        forward=simclr,
        backbone=backbone,
        projector=head,
        simclr_loss=peer.losses.NTXEntLoss(TEMPERATURE),
        optim={"optimizer": {"type": "AdamW", "lr": RATE}, "scheduler": "ConstantLR"},
    )
    trainer = lightning.Trainer(
        max_epochs=case.epochs(),
        accelerator="gpu" if case.device == "cuda" else "cpu",
        devices=1,
        precision="bf16-mixed" if case.precision == "bf16" else "32-true",
        default_root_dir=out,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, train_dataloaders=loader)


PEERS = {"lightly-train": lightly_train, "lightly": lightly, "stable-pretraining": stable_pretraining}


def main() -> None:
    """Train until the clock ends the process."""
    case = Case(**json.loads(sys.argv[1]))
    from torch.optim.optimizer import register_optimizer_step_post_hook

    register_optimizer_step_post_hook(Clock(case, Path(sys.argv[2])))
    with tempfile.TemporaryDirectory() as out:
        PEERS[case.peer](case, out)
    raise SystemExit("the training ended before its measured steps")


if __name__ == "__main__":
    main()
