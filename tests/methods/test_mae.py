"""MAE: which patches are hidden, what is predicted of them, and N ranks = one process in float64."""

import pytest
import torch
from gloo import on_ranks
from test_contract import Images
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sslcells import inputs, learner, methods, models, ranks
from sslcells.augment import Draws
from sslcells.config import ConfigError, Model, load
from sslcells.data import Batch
from sslcells.evaluation.during_training import Evaluation
from sslcells.methods.mae import Config
from sslcells.models import tokens
from sslcells.plan import consequences, open_run
from sslcells.train import train

SIZE, PATCH, B, L = 24, 8, 8, 9
SMALL = {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}


def build(channels=3, pool="avg", **options):
    """A learner in float64 whose encoder cuts 24 px into 9 patches."""
    torch.manual_seed(0)
    args = {"img_size": SIZE, "patch_size": PATCH, "global_pool": pool}
    encoder = models.build(Model(backbone="test_vit", args=args), channels)
    images = Images()
    images.channels = channels
    method = methods.build(Config(**SMALL, **options), 64, images, tokens.layout(encoder, SIZE))
    return methods.Learner(encoder, method).double()


def views(channels=3):
    return torch.randn(B, channels, SIZE, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def draws(part=slice(None), step=3):
    return Draws(0, step, torch.arange(B)[part], 1, methods.MASKS)


def hidden():
    """(B, M) patches that are hidden at this step: all but the first two of each image's order."""
    return draws().order(L)[:, 2:]


def cut(x, patch):
    row, column = divmod(patch, SIZE // PATCH)
    return x[..., row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH]


class Fixed(nn.Module):
    """A decoder that predicts the same, whatever it sees."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, encoded, visible, hidden):
        return self.answer


@pytest.mark.parametrize(("normalise", "over"), [("patch", (0, 1, 2)), ("channel", (1, 2)), ("none", ())])
@pytest.mark.parametrize("channels", [1, 5])
def test_the_error_is_that_of_hidden_patches_after_their_normalisation(normalise, over, channels):
    network, x = build(channels, normalise=normalise), views(channels)
    wanted = []
    for image, patches in zip(x, hidden().tolist(), strict=True):
        for one in (cut(image, patch) for patch in patches):
            mean = one.mean(over, keepdim=True) if over else 0
            spread = (one.var(over, correction=0, keepdim=True) + 1e-6).sqrt() if over else 1
            wanted.append(((one - mean) / spread).flatten())
    wanted = torch.stack(wanted).view(B, L - 2, -1)
    answer = torch.randn_like(wanted)
    network.method.head = Fixed(answer)
    rows = network(x, progress=0.0, draws=draws()).rows
    torch.testing.assert_close(rows[:, 0], (answer - wanted).square().mean((1, 2)))
    network.method.head = Fixed(wanted)
    assert network(x, progress=0.0, draws=draws()).rows.abs().max() < 1e-20
    seen, made = network.method.reconstruct(network.backbone, x, draws())
    torch.testing.assert_close(made, x)
    for image, shown, patches in zip(x, seen, hidden().tolist(), strict=True):
        for patch in range(L):
            assert torch.equal(cut(shown, patch), cut(image, patch) * (patch not in patches))


def test_the_encoder_sees_visible_patches_alone():
    network, x = build().eval(), views()
    predicted = network.method._predicted(network.backbone, x, draws())[0]
    other = x.clone()
    for image, patches in zip(other, hidden().tolist(), strict=True):
        for patch in patches:
            cut(image, patch).add_(5)
    torch.testing.assert_close(network.method._predicted(network.backbone, other, draws())[0], predicted)
    assert not torch.allclose(network.method._predicted(network.backbone, x + 5, draws())[0], predicted)


def test_what_is_hidden_is_of_the_image_and_the_step():
    network, x = build(), views()
    rows = network(x, progress=0.0, draws=draws()).rows
    part = slice(2, 5)
    torch.testing.assert_close(network(x[part], progress=0.0, draws=draws(part)).rows, rows[part])
    assert not torch.allclose(network(x, progress=0.0, draws=draws(step=4)).rows, rows)


def gradient(pool):
    """On a rank: the mean loss, and the gradient of all that is trained at the second step in DDP."""
    network, part = build(pool=pool), B // ranks.world()
    own = slice(ranks.rank() * part, (ranks.rank() + 1) * part)
    wrapped = DistributedDataParallel(network) if ranks.world() > 1 else network
    image = torch.arange(B)[own]
    batch = Batch(torch.zeros(part, 1, 1, 1), image, image, image, 0 * image, 0 * image)
    for _ in range(2):  # DDP complains of weights without a gradient at the second
        network.zero_grad()
        outputs = wrapped(views()[own], progress=0.0, draws=draws(own))
        loss, _ = network.method.loss(outputs, batch, 0.0)
        loss.backward()
    return ranks.gather(loss[None]).mean().item(), torch.cat([p.grad.flatten() for p in network.parameters()])


@pytest.mark.parametrize("pool", ["avg", "token"])
def test_ranks_equal_one_process(pool):
    value, grad = gradient(pool)
    for world in (2, 4):
        for loss, theirs in on_ranks(world, gradient, pool):
            assert loss == pytest.approx(value, rel=1e-12)
            assert (theirs - grad).norm() / grad.norm() < 1e-10


TINY = [
    *("data.size=24", "data.train=24", "data.val=12", "data.test=0", "augment.size=24", "evaluate.k=3"),
    *("model.backbone=test_vit", "model.args={img_size: 24, patch_size: 8, global_pool: avg}", "method.name=mae"),
    *("method.decoder_width=16", "method.decoder_depth=1", "train.global_batch=8", "train.total_epochs=1"),
    "train.workers=0",
]


def test_check_accepts_a_run_and_its_picture_is_drawn(tmp_path):
    run = load(None, [*TINY, f"out={tmp_path}"])
    assert "negatives: none" in consequences(run, 1)
    splits = open_run(run)
    network = learner.build(run, splits["train"], sync_batchnorm=False)
    evaluation = Evaluation(run, splits, inputs.augment(run, splits, None), torch.device("cpu"))
    drawn = evaluation.reconstructions(network)
    assert list(drawn) == ["reconstructions"]
    assert drawn["reconstructions"].stat().st_size > 1000
    assert network.training


@pytest.mark.slow
def test_a_run_ends_with_its_picture(tmp_path):
    assert (train(load(None, [*TINY, f"out={tmp_path}"])) / "plots" / "reconstructions.png").is_file()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("method.decoder_heads=3", "decoder_width=16 does not divide by decoder_heads=3"),
        ("method.decoder_width=18", "decoder_width=18 does not divide by"),
    ],
)
def test_a_decoder_that_does_not_divide_is_named(change, words):
    with pytest.raises(ConfigError, match=words):
        load(None, [*TINY, change])


def test_what_cannot_be_hidden_is_named():
    with pytest.raises(ConfigError, match=r"method.name=mae: .*test_resnet"):
        learner.build(load(None, [*TINY, "model={backbone: test_resnet}"]), Images(), sync_batchnorm=False)
    run = load(None, [*TINY, "method.mask_ratio=0.99"])
    with pytest.raises(ConfigError, match=r"mask_ratio=0\.99 of 9 patches: 0 would be seen and 9 hidden"):
        learner.build(run, Images(), sync_batchnorm=False)
    pooled = "model.args={img_size: 24, patch_size: 8, global_pool: map}"
    with pytest.raises(ConfigError, match=r"method.name=mae: the backbone pools by attention that is learned"):
        learner.build(load(None, [*TINY, pooled]), Images(), sync_batchnorm=False)
