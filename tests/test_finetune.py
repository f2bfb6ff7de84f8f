"""A classifier from labels: from scratch, fine-tuned from a run's encoder, and on a frozen one."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from trained import SMALL

from sslcells.config import ConfigError, load
from sslcells.evaluation.classifier import read_predictions
from sslcells.run.metrics import read_metrics
from sslcells.train import train

TINY = [
    *SMALL,
    "method.name=supervised",
    "train.global_batch=16",
    "train.total_steps=4",
    "train.workers=0",
    "log.every_steps=2",
    "evaluate.every_epochs=1",
    "evaluate.pictures=false",
]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    return train(load(None, [*TINY, f"out={tmp_path_factory.mktemp('runs')}", "name=pretrained"]))


def trained(folder, *changes):
    folder = train(load(None, [*TINY, f"out={folder}", *changes]))
    return folder, load_file(folder / "encoder.safetensors")


def test_a_classifier_leaves_its_curves_and_predictions(pretrained):
    rows = [row for row in read_metrics(pretrained) if "val/loss" in row]
    assert [row["step"] for row in rows] == [0, 3, 4]
    assert {"val/loss", "val/top1", "val/balanced"} < rows[-1].keys()
    said = read_predictions(pretrained, "val")
    assert said.probabilities.shape == (20, 5)
    torch.testing.assert_close(said.probabilities.sum(1), torch.ones(20, dtype=torch.float64))
    assert said.names[3].startswith("synthetic")
    right = (said.probabilities.argmax(1) == said.labels).double().mean().item()
    assert said.figures()["top1"] == pytest.approx(right)
    assert not list((pretrained / "plots").iterdir())


def test_fine_tuning_starts_from_the_encoder_and_moves_it_as_gently_as_asked(pretrained, tmp_path):
    start = load_file(pretrained / "encoder.safetensors")

    def moved(name, *changes):
        _, end = trained(tmp_path, f"name={name}", f"model.encoder={pretrained}", *changes)
        return max((end[k] - start[k]).abs().max().item() for k in start if k.endswith("conv.weight") or ".0." in k)

    gentle, plain = moved("gentle", "optim.encoder_scale=0.01"), moved("plain")
    assert 0 < gentle < plain / 20


def test_a_frozen_encoder_stays_as_it_is_to_the_last_bit(pretrained, tmp_path):
    folder, end = trained(tmp_path, "name=probe", f"model.encoder={pretrained}", "model.freeze=true")
    start = load_file(pretrained / "encoder.safetensors")
    assert all(torch.equal(start[k], end[k]) for k in start)
    losses = [row["loss"] for row in read_metrics(folder) if "loss" in row]
    assert losses[0] != losses[-1]


def test_part_of_the_labels_is_all_that_is_seen(tmp_path):
    folder, _ = trained(
        tmp_path, "name=few", "train.label_fraction=0.5", "train.global_batch=30", "train.total_epochs=1"
    )
    assert read_metrics(folder)[-1]["epoch"] == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["model.args={width: 16}"], r"model.args={'width': 16}, but it was made with"),
        (["model.backbone=test_resnet", "model.args={}"], "model.backbone='test_resnet', but it is a small_cnn"),
        (["model.mean=[0.4]"], r"model.mean=\[0.4, 0.4, 0.4\], but it learned with \[0.5"),
        (["model.pretrained=true"], "both a starting point: set only one"),
    ],
)
def test_an_encoder_that_does_not_fit_is_told(pretrained, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        train(load(None, [*TINY, f"out={tmp_path}", f"model.encoder={pretrained}", *changes]))


def test_a_folder_without_an_encoder_is_told(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no encoder\.json"):
        train(load(None, [*TINY, f"out={tmp_path}", f"model.encoder={tmp_path}"]))


def test_several_classes_an_image(tmp_path):
    """MedMNIST's layout with 4 labels an image, as ChestMNIST has 14."""
    generator = np.random.default_rng(0)
    arrays = {}
    for split, images in (("train", 48), ("val", 24), ("test", 24)):
        labels = generator.integers(0, 2, (images, 4))
        pixels = generator.integers(0, 60, (images, 16, 16, 3)) + 150 * labels[:, None, None, :3]
        arrays |= {f"{split}_images": pixels.astype(np.uint8), f"{split}_labels": labels}
    np.savez(tmp_path / "chest.npz", **arrays)
    data = ["data={kind: medmnist, path: " + str(tmp_path / "chest.npz") + "}", "augment={recipe: none, size: 16}"]
    rest = [change for change in TINY if not change.startswith(("data.", "augment."))]
    changes = [*rest, *data, "method.loss=bce", "train.total_steps=60", f"out={tmp_path}", "optim.lr=1e-2"]
    folder = train(load(None, changes))
    rows = [row for row in read_metrics(folder) if "val/auroc" in row]
    assert rows[-1]["val/auroc"] > 0.8 > rows[0]["val/auroc"]  # three of four can be seen
    assert read_predictions(folder, "val").labels.shape == (24, 4)
