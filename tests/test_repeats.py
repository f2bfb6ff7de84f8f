"""An image that a global batch shows more than once: views of its own each time, and no negative of itself."""

import numpy as np
import pytest
import torch
from gloo import on_ranks
from torch import nn

from sslcells import methods, ranks
from sslcells.augment import Augment, cells
from sslcells.config import Sampler, load
from sslcells.data import Batch, ImageSet
from sslcells.data.loader import read_in_parts
from sslcells.data.sampler import Steps, build
from sslcells.train import train

SIZES, GLOBAL, MICRO = (3, 30, 25), 36, 6


class Images(ImageSet):
    channels = 3
    classes = ("rare", "often", "more")

    def __init__(self):
        self.labels = torch.cat([torch.full((n,), c) for c, n in enumerate(SIZES)])
        self.sources = torch.arange(len(self.labels))

    def pixels(self, index):
        return torch.randint(0, 256, (3, 24, 24), generator=torch.Generator().manual_seed(index)).byte()

    def name(self, index):
        return str(index)


def shown(start, stop, micro=None):
    """Images and views (V, G, ...) of each global batch from step `start` on, as the ranks make them."""
    images, out = Images(), []
    sampling = build(Sampler(kind="balanced"), images, GLOBAL, 0)
    augment = Augment(cells.Config(size=16), (0.5,), (0.25,))
    steps = Steps(sampling, ranks.rank(), ranks.world(), start, stop)
    micro_batches = read_in_parts(images, steps, GLOBAL // ranks.world() // micro if micro else 1, 0, pin_memory=False)
    for step, parts in enumerate(micro_batches, start):
        views = [
            augment(b.pixels, b.image, seed=0, step=step, views=2, occurrence=b.occurrence).unflatten(0, (2, -1))
            for b in parts
        ]
        whole, by_image = Batch.ids(parts), torch.cat(views, 1).transpose(0, 1).contiguous()
        out.append((ranks.gather(whole.image), ranks.gather(by_image).transpose(0, 1)))
    return out


def test_no_two_views_of_a_repeated_image_are_the_same():
    for image, views in shown(0, 2):
        assert len(image.unique()) < len(image)
        rows = views.flatten(0, 1).flatten(1)
        assert (torch.cdist(rows, rows) + 1e9 * torch.eye(len(rows))).min() > 0.5


@pytest.mark.parametrize(("world", "start", "micro"), [(1, 0, MICRO), (1, 1, None), (2, 0, None), (3, 1, MICRO)])
def test_the_views_are_the_same_on_any_ranks_in_any_parts_and_after_any_start(world, start, micro):
    want = shown(0, 2)[start:]
    for ours in on_ranks(world, shown, start, 2, micro):
        for (image, views), (image_before, views_before) in zip(ours, want, strict=True):
            assert torch.equal(image, image_before)
            torch.testing.assert_close(views, views_before, rtol=0, atol=1e-4)


def batch(image):
    return Batch(torch.zeros(len(image), 1, 1, 1), image % 2, image, image, 0 * image, 0 * image)


def method(*changes):
    torch.manual_seed(0)
    return methods.build(load(None, list(changes)).method, 8, Images())


OF_VIEWS = [
    "method.name=simclr",
    "method={name: simclr, loss: decoupled}",
    "method={name: simclr, loss: hard_negative, beta: 0.5}",
    "method={name: simclr, same_source: ignore}",
    "method={name: simclr, same_source: positive}",
    "method={name: triplet, same_source: ignore}",
    "method.name=triplet",
    "method={name: triplet, negative: all, margin: 1}",
    "method={name: triplet, negative: semi-hard}",
    "method.name=pairs",
    "method={name: siamese, judge: cosine}",
    "method={name: supcon, positive: source}",
    "method={name: supcon, positive: label}",
]


@pytest.mark.parametrize("changes", OF_VIEWS)
def test_an_image_is_no_negative_of_itself(changes):
    """The views of its first occurrence agree, those of its second agree elsewhere: nothing pushes the two apart."""
    made = method(changes)
    first, second = nn.functional.normalize(torch.randn(2, 6), dim=1)
    rows = torch.stack([first, second, first, second]).requires_grad_()
    loss, _ = made.loss(methods.Outputs(rows), batch(torch.tensor([4, 4])), 0.0)
    loss.backward()
    towards = first - (first @ second) * second
    assert -rows.grad[[1, 3]].sum(0) @ towards >= -1e-6


@pytest.mark.parametrize("repeated", [True, False])
def test_simclr_with_a_repeated_image_by_hand(repeated):
    made = method("method={name: simclr, temperature: 0.5}")
    made.repeated = repeated
    image = torch.tensor([5, 6, 5, 7])
    z = nn.functional.normalize(torch.randn(8, 6), dim=1)
    loss, _ = made.loss(methods.Outputs(z), batch(image), 0.0)
    ids, total = image.repeat(2), 0.0
    for i in range(8):
        partner = (i + 4) % 8
        against = [j for j in range(8) if j not in (i, partner) and not (repeated and ids[j] == ids[i])]
        s = z @ z[i] / 0.5
        total -= s[partner] - s[[partner, *against]].logsumexp(0)
    assert loss.item() == pytest.approx(total.item() / 8, rel=1e-5)


@pytest.mark.parametrize("queue", [0, 6])
def test_moco_with_a_repeated_image_by_hand(queue):
    made = method(f"method={{name: moco, temperature: 0.5, queue: {queue}, dimension: 6}}")
    image, t = torch.tensor([5, 6, 5]), 0.5
    unit = nn.functional.normalize(torch.randn(2, 2, 6, 6), dim=3)  # (steps, rows and keys, 2B, D)
    held, names = made.queue.clone(), [-1] * queue
    for rows, keys in unit:
        loss, _ = made.loss(methods.Outputs(rows, keys), batch(image), 0.0)
        total = 0.0
        for own, others in ((0, 3), (3, 0)):
            for i in range(3):
                key = [*keys[others : others + 3], *held]
                name = [*image.tolist(), *names]
                s = torch.stack([rows[own + i] @ k / t for k in key])
                kept = [j for j in range(len(key)) if j == i or name[j] != int(image[i])]
                total += s[kept].logsumexp(0) - s[i]
        assert loss.item() == pytest.approx(2 * t * total.item() / 3, rel=1e-5)
        held, names = torch.cat([keys, held])[:queue], [*image.tolist() * 2, *names][:queue]
    assert made.queue_image.tolist() == names


def test_a_step_of_training_with_a_repeated_image(tmp_path):
    """A whole step, from a file with a class of two images: its views, the small ones too, are all different."""
    drawn = np.random.default_rng(0)
    parts = {
        f"{split}_{part}": drawn.integers(0, 256, (24, 28, 28, 3), dtype=np.uint8)
        if part == "images"
        else (np.arange(24) >= 2).astype(np.uint8)[:, None]
        for split in ("train", "val", "test")
        for part in ("images", "labels")
    }
    np.savez(tmp_path / "cells.npz", **parts)
    told = []
    data = ["data.kind=medmnist", f"data.path={tmp_path / 'cells.npz'}", "sampler.kind=balanced", "augment.size=16"]
    small = [
        "method={name: dino, prototypes: 16, hidden: 8, local_views: 4, local_size: 8}",
        "train.global_batch=12",
        "train.total_steps=1",
    ]
    quiet = ["evaluate.pictures=false", "train.workers=0", f"out={tmp_path}"]
    train(load(None, [*data, *small, *quiet]), lambda station, x: told.append(x) if station == "views" else None)
    assert [len(x) for x in told] == [24, 48]
    for views in told:
        rows = views.flatten(1)
        assert (torch.cdist(rows, rows) + 1e9 * torch.eye(len(rows))).min() > 0.5
