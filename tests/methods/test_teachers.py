"""What the methods with a teacher say of it: who follows whom, what is kept from the optimizer, what is handed out."""

import math

import pytest
import torch
from safetensors.torch import load_file

from sslcells import methods, models, optim
from sslcells.config import ConfigError, Model, Optim, load
from sslcells.data import Batch, open_split
from sslcells.learner import build
from sslcells.models import files
from sslcells.plan import consequences
from sslcells.run import checkpoint
from sslcells.train import train

TINY = [
    *("data.size=32", "data.train=48", "data.val=16", "data.test=0", "augment.size=32", "evaluate.k=5"),
    *("model.backbone=small_cnn", "model.args={width: 8}", "method.hidden=16", "method.dimension=8"),
    *(
        "train.global_batch=16",
        "train.total_epochs=2",
        "train.workers=0",
        "log.every_steps=2",
        "checkpoint.every_steps=3",
    ),
]
DINO = ["method.name=dino", "method.local_size=16", "method.local_views=2", "method.prototypes=32"]
IBOT = [
    *("method.name=ibot", "method.prototypes=32", "method.centring=sinkhorn", "method.koleo=0.1"),
    *("model.backbone=test_vit", "model.args={img_size: 32, patch_size: 8}", "train.micro_batch=4"),
]


def tiny(folder, *changes):
    return load(None, [*TINY, f"out={folder}", *changes])


def learner(*changes):
    run = tiny(".", *changes)
    images = open_split(run.data, "train")
    return build(run, images, sync_batchnorm=False)


@pytest.mark.parametrize("name", ["byol", "moco", "dino"])
def test_the_teacher_follows_and_nothing_else_moves_it(name):
    network = learner(f"method.name={name}", *(DINO[1:] if name == "dino" else []))
    before = [p.clone() for p in network.teacher.parameters()]
    handed = {id(p) for group in optim.build(Optim(), network).param_groups for p in group["params"]}
    assert not handed & {id(p) for p in network.teacher.parameters()}
    assert handed >= {id(p) for p in network.backbone.parameters()}
    with torch.no_grad():
        for p in network.parameters():
            if p.requires_grad:
                p += 1
    network.follow(1 / 3)
    momentum = 1 - (1 - network.method.momentum) * (1 + math.cos(math.pi / 3)) / 2
    for old, new in zip(before, network.teacher.parameters(), strict=True):
        torch.testing.assert_close(new, old + (1 - momentum))
    kept = [p.clone() for p in network.teacher.parameters()]
    network.follow(1.0)
    assert all(torch.equal(a, b) for a, b in zip(kept, network.teacher.parameters(), strict=True))


@pytest.mark.parametrize("backbone", ["test_vit", "vit_small_patch16_dinov3"])
def test_a_teacher_has_no_dropout(backbone):
    rates = {"drop_path_rate": 0.5, "proj_drop_rate": 0.5, "patch_drop_rate": 0.5}
    small = {"depth": 2, "embed_dim": 32, "num_heads": 2} if "dinov3" in backbone else {}
    encoder = models.build(Model(backbone=backbone, args={**small, **rates, "img_size": 64}), 3)
    teacher = methods.Teacher(encoder.train(), torch.nn.Dropout(0.5)).train()
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(teacher(x), teacher(x))
    assert not torch.equal(encoder(x), encoder(x))


def test_rows_of_the_student_for_all_views_and_of_the_teacher_for_full_size_ones():
    network = learner(*DINO)
    rows, teacher, features, _ = network(torch.randn(8, 3, 32, 32), torch.randn(8, 3, 16, 16), progress=0.0)
    assert rows.shape == (16, 32)
    assert teacher.shape == (8, 32)
    assert len(features) == 8
    assert teacher.any(1).all()
    assert not teacher.requires_grad


def test_dinos_centre_is_the_mean_of_the_teacher_and_frozen_prototypes_stay():
    network = learner(*DINO, "method.freeze=0.5", "method.centre_momentum=0.5")
    crops = torch.randn(8, 3, 32, 32), torch.randn(8, 3, 16, 16)
    prototypes = network.method.head[1].weight
    for progress, moves in ((0.4, False), (0.6, True)):
        outputs, centre = network(*crops, progress=progress), network.method.centre.clone()
        loss, figures = network.method.loss(outputs, None, progress)
        torch.testing.assert_close(network.method.centre, (centre + outputs.teacher.mean(0)) / 2)
        network.zero_grad()
        loss.backward()
        assert prototypes.grad.any() == moves
    assert 0 < figures["teacher_entropy"] <= 1
    assert figures["kl"] >= 0


def test_mocos_queue_takes_the_newest_keys():
    network = learner("method.name=moco", "method.queue=12")
    old = network.method.queue.clone()
    keys = torch.randn(8, 8)
    image = torch.tensor([3, 1, 4, 1])
    outputs = methods.Outputs(torch.randn(8, 8), keys)
    network.method.loss(outputs, Batch(keys, image, image, image, 0 * image, 0 * image), 0.0)
    torch.testing.assert_close(network.method.queue, torch.cat([torch.nn.functional.normalize(keys, dim=1), old[:4]]))
    assert network.method.queue_image.tolist() == [*image.tolist() * 2, *[-1] * 4]


@pytest.mark.slow
@pytest.mark.parametrize("method", [DINO, IBOT], ids=["dino", "ibot"])
def test_the_teacher_is_handed_out_and_training_goes_on_exactly(method, tmp_path):
    class Killed(BaseException):
        pass

    def die(station, x, seen=[]):  # noqa: B006
        seen.append(station)
        if seen.count("loss") == 5:
            raise Killed

    whole = train(tiny(tmp_path / "whole", *method))
    with pytest.raises(Killed):
        train(tiny(tmp_path / "killed", *method), die)
    again = train(tiny(tmp_path / "killed", *method))
    exported = [load_file(f / files.WEIGHTS) for f in (whole, again)]
    torch.testing.assert_close(*exported, rtol=0, atol=0)
    kept = load_file(checkpoint.newest(whole / "checkpoints") / "model.safetensors")
    assert all(torch.equal(kept[f"teacher.backbone.{key}"], value) for key, value in exported[0].items())
    assert any(not torch.equal(kept[f"backbone.{key}"], value) for key, value in exported[0].items())


def test_what_does_not_fit_is_named(tmp_path):
    vit = ["model.backbone=vit_tiny_patch16_224", "model.args={img_size: 32}"]
    for act in (lambda run: consequences(run, 1), train):
        with pytest.raises(ConfigError, match=r"method\.local_size=16: the backbone takes no images"):
            act(tiny(tmp_path, *DINO, *vit))
    with pytest.raises(ConfigError, match="recipe=none: it has no crops"):
        train(tiny(tmp_path, *DINO, "augment.recipe=none"))
    with pytest.raises(ConfigError, match=r"local_min_scale=0\.6 is above local_max_scale=0\.4"):
        tiny(tmp_path, *DINO, "method.local_min_scale=0.6")
    with pytest.raises(ConfigError, match=r"min_scale=0\.6 is above max_scale=0\.5"):
        tiny(tmp_path, "augment.min_scale=0.6", "augment.max_scale=0.5")


def test_check_speaks_of_no_negatives_where_there_are_none(tmp_path):
    assert "negatives: none" in consequences(tiny(tmp_path, "method.name=byol"), 1)
    assert "negatives per anchor: 30, of 32 rows in the global batch" in consequences(tiny(tmp_path), 1)
    moco = consequences(tiny(tmp_path, "method.name=moco", "method.queue=12"), 1)
    assert "negatives per anchor: 27, of 44 rows in the global batch and the queue" in moco
