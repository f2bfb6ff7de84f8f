"""What every method owes: found by its file, two steps of training, N ranks = one, survives save and resume."""

import atexit
import copy
import functools
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from gloo import launched, on_ranks
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from trained import make_run

from sslcells import launcher, methods, micro_batch, models, ranks
from sslcells.augment import Draws
from sslcells.config import PLUGINS, Model, load
from sslcells.data import Batch, ImageSet
from sslcells.models import adapt, tokens
from sslcells.run import checkpoint

NAMES = PLUGINS["method"].names()
IMAGES, SIZE = 8, 32
VARIANTS = {
    "distill": [{}, {"views": 2, "loss": "mse", "layers": 2}, {"loss": "similarity"}],
    "dino": [
        {"prototypes": 32, "local_views": 4, "local_size": SIZE // 2, "freeze": 0.0},
        {"prototypes": 32, "freeze": 1.0, "norm": "none"},
        {"prototypes": 32, "freeze": 0.0, "centring": "sinkhorn", "koleo": 0.1},
    ],
    "ibot": [
        {"prototypes": 32, "freeze": 0.0},
        {
            "prototypes": 32,
            "freeze": 0.0,
            "centring": "sinkhorn",
            "koleo": 0.1,
            "patch_head": "own",
            "masking": "random",
            "mask_probability": 1.0,
            "local_views": 2,
            "local_size": SIZE // 2,
        },
    ],
    "mae": [{"decoder_width": 16, "decoder_depth": 1}, {"decoder_width": 16, "views": 2, "normalise": "channel"}],
    "moco": [{}, {"queue": 24}],
    "supervised": [{}, {"loss": "focal", "class_weights": "balanced"}, {"loss": "bce", "layers": 2}],
    "simclr": [
        {},
        {"same_source": "ignore"},
        {"same_lab": "only"},
        {"same_source": "positive", "learn_temperature": True},
        {"learn_temperature": True},
        {"loss": "decoupled"},
        {"loss": "hard_negative", "beta": 0.5},
    ],
    "triplet": [
        {},
        {"positive": "label", "views": 1},
        {"positive": "source", "soft": True},
        {"same_source": "ignore", "rank": 2},
        {"same_lab": "only", "positive": "label"},
        {"negative": "all", "positive": "label", "views": 1},
        {"negative": "all", "same_source": "ignore"},
    ],
    "supcon": [{}, {"positive": "source"}, {"same_source": "ignore", "learn_temperature": True}, {"same_lab": "only"}],
    "pairs": [
        {},
        {"loss": "hinge", "positive": "label", "views": 1, "positive_margin": 0.1},
        {"same_source": "ignore"},
    ],
    "siamese": [
        {"judge": "concat"},
        {"judge": "difference", "positive": "label", "views": 1},
        {"judge": "cosine", "same_source": "ignore"},
    ],
    "lejepa": [{"slices": 16}, {"slices": 16, "views": 2, "local_views": 2, "local_size": SIZE // 2}],
    "swav": [
        {"prototypes": 16, "freeze": 0.0},
        {"prototypes": 16, "freeze": 1.0, "queue": 24, "queue_from": 0.0},
        {"prototypes": 16, "freeze": 0.0, "local_views": 2, "local_size": SIZE // 2},
    ],
    "arcface": [{}, {"views": 2, "scale": 16}],
    "sphereface": [{"margin": 2}],
    "margin": [{}, {"learn": "one", "views": 2, "nu": 0.1}, {"learn": "none"}],
    "proxies": [{}, {"loss": "proxy_nca", "views": 2}],
}
CASES = [(name, options) for name in NAMES for options in VARIANTS.get(name, [{}])]


class Images(ImageSet):
    """What a method may ask of the train split before it sees a batch."""

    channels = 3
    classes = ("a", "b", "c")

    def __init__(self):
        image = torch.arange(IMAGES)
        self.labels, self.sources, self.labs, self.lab_names = image % 3, image // 2, image // 4 + 1, ("x", "y")

    def pixels(self, index):
        raise NotImplementedError

    def name(self, index):
        return str(index)


@functools.cache
def teacher():
    """The folder of an encoder that methods with a frozen teacher learn from, the same in every process."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return str(make_run(folder / "teacher", "augment.size=24", "model.mean=[0.3]"))


def needed(name):
    """Options that a method cannot do without."""
    return {"teacher": {"weights": teacher()}} if name == "distill" else {}


def learner(name, options):
    """Without BatchNorm, whose statistics differ between ranks of a CPU."""
    options = needed(name) | options
    torch.manual_seed(0)
    kind = PLUGINS["method"].config(name)
    small = {k: v for k, v in {"norm": "layer", "hidden": 16, "dimension": 8}.items() if k in kind.model_fields}
    config = kind(**{**small, **options})
    args = {"img_size": SIZE, "dynamic_img_size": True, **({"patch_size": 8} if methods.masks(config) else {})}
    encoder = models.build(Model(backbone="test_vit", args=args), 3)
    layout = tokens.layout(encoder, SIZE)
    return methods.Learner(encoder, methods.build(config, models.width(encoder, 3, SIZE), Images(), layout))


def batch(rows=slice(None)):
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(2, IMAGES, 3, SIZE, SIZE, generator=generator)
    image = torch.arange(IMAGES)
    return Batch(pixels[:, rows], *(ids[rows] for ids in (image % 3, image, image // 2, image // 4 + 1, image * 0)))


def crops(b, method):
    """The full-size views of a batch, its local ones, and those for a frozen teacher."""
    views = [b.pixels[: method.views].flatten(0, 1)]
    if method.local:
        small = F.interpolate(b.pixels[0], (method.local.size, method.local.size))
        views.append(torch.cat([small.roll(i, 3) for i in range(method.local.views)]))
    if method.frozen_teacher:
        views.append(F.interpolate(views[0], [method.frozen_teacher.prepared.size] * 2))
    return views


def embed(network, method, b):
    """What the network, in DDP or not, makes of a batch at step 5, when the hidden patches differ between images."""
    draws = Draws(0, 5, b.image, method.views, methods.MASKS, b.occurrence)
    return network(*crops(b, method), progress=0.0, draws=draws)


def backward(network, method, rows=slice(None), dtype=torch.float32):
    b = batch(rows)
    b = b._replace(pixels=b.pixels.to(dtype))
    loss, figures = method.loss(embed(network, method, b), b, 0.0)
    loss.backward()
    return loss.detach(), figures


def on_a_rank(name, options):
    network = learner(name, options)
    part = IMAGES // ranks.world()
    start = ranks.rank() * part
    loss, _ = backward(DistributedDataParallel(network), network.method, slice(start, start + part))
    return ranks.gather(loss[None]).mean().item(), gradients(network), dict(network.named_buffers())


def gradients(network):
    """Of all that is trained, which is all but the teacher."""
    assert all(p.requires_grad != name.startswith("teacher.") for name, p in network.named_parameters())
    return [p.grad for p in network.parameters() if p.requires_grad]


def assert_same(grads, expected):
    """Up to float32's rounding; gradients of a loss that is a sum, as Barlow Twins', are larger, and so is that."""
    largest = max(g.abs().max().item() for g in expected)
    torch.testing.assert_close(grads, expected, rtol=1e-3, atol=2e-6 * max(1, largest))


@pytest.mark.parametrize(("name", "options"), CASES)
def test_two_ranks_equal_one(name, options):
    one = learner(name, options)
    loss, _ = backward(one, one.method)
    for value, grads, buffers in on_ranks(2, on_a_rank, name, options):
        assert value == pytest.approx(loss.item(), rel=1e-5)
        assert_same(grads, gradients(one))
        torch.testing.assert_close(buffers, dict(one.named_buffers()))  # queue and centre


IN_FLOAT64 = [
    (name, options | ({"local_size": SIZE} if "local_size" in options else {}))  # timm resizes positions in float32
    for name, options in CASES
    if name in ("dino", "ibot")
]


def in_float64(name, options):
    """Loss and gradients of the global batch, as every rank has them after DDP's mean."""
    network = learner(name, options).double()
    part = IMAGES // ranks.world()
    start = ranks.rank() * part
    wrapped = DistributedDataParallel(network) if ranks.world() > 1 else network
    loss, _ = backward(wrapped, network.method, slice(start, start + part), torch.float64)
    return ranks.gather(loss[None]).mean().item(), gradients(network)


@pytest.mark.parametrize(("name", "options"), IN_FLOAT64)
def test_ranks_equal_one_in_float64(name, options):
    """To 1e-10, where float32's rounding hides nothing."""
    value, expected = in_float64(name, options)
    for world in (2, 4):
        for loss, grads in on_ranks(world, in_float64, name, options):
            assert loss == pytest.approx(value, rel=1e-10, abs=1e-12)
            torch.testing.assert_close(grads, expected, rtol=1e-10, atol=1e-12)


def pieces_of(network, precision):
    """This rank's network and batch, the batch in micro-batches of one image, and the Accelerator of the run."""
    accelerator = launcher.start(True, 1.0, precision, threads=1)
    ddp = accelerator.prepare(network)
    part = IMAGES // ranks.world()
    first = ranks.rank() * part
    return (
        accelerator,
        ddp,
        batch(slice(first, first + part)),
        [batch(slice(i, i + 1)) for i in range(first, first + part)],
    )


def in_micro_batches(name, options, precision):
    """Gradients in micro-batches, and those of one pass with the same precision."""
    network = learner(name, options)
    with launched():
        accelerator, ddp, whole, pieces = pieces_of(network, precision)
        before = copy.deepcopy(network.state_dict())
        rows = lambda piece, i: embed(ddp, network.method, piece)  # noqa: E731
        for _ in range(2):  # the second shows that the first left DDP in order
            network.zero_grad()
            network.load_state_dict(before)
            micro_batch.backward(accelerator, ddp, rows, network.method, pieces, whole, 0.0)
        apart = [g.clone() for g in gradients(network)]
        network.zero_grad()
        network.load_state_dict(before)
        accelerator.backward(network.method.loss(rows(whole, 0), whole, 0.0)[0])
        return apart, gradients(network)


def partly(changes):
    """A network with a teacher, of whose encoder a part learns."""
    torch.manual_seed(0)
    config = Model(backbone="test_vit", args={"img_size": SIZE}, **changes)
    encoder = models.build(config, 3)
    fixed = adapt.adapt(encoder, config).fixed
    for name, p in encoder.named_parameters():
        if name.endswith("weight.0.b"):  # zero at first, where no gradient reaches the other half of an adapter
            torch.nn.init.normal_(p, std=0.02)
    method = methods.build(PLUGINS["method"].config("byol")(norm="layer", hidden=16, dimension=8), 64, Images())
    return methods.Learner(encoder, method, fixed)


def partly_on_a_rank(changes):
    network = partly(changes)
    wrapped, part = DistributedDataParallel(network), IMAGES // ranks.world()
    for _ in range(2):  # the second finds DDP waiting for a gradient that does not come
        network.zero_grad()
        backward(wrapped, network.method, slice(ranks.rank() * part, (ranks.rank() + 1) * part))
    return {name: p.grad for name, p in network.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("changes", [{"freeze": 3}, {"freeze": 2, "lora_rank": 4, "pretrained": True}])
def test_two_ranks_equal_one_where_a_part_of_the_encoder_learns(changes):
    one = partly(changes)
    backward(one, one.method)
    expected = {name: p.grad for name, p in one.named_parameters() if p.requires_grad}
    assert sum(name.startswith("backbone") for name in expected) > 30
    for found in on_ranks(2, partly_on_a_rank, changes):
        assert found.keys() == expected.keys()
        assert_same([*found.values()], [*expected.values()])


IN_MICRO_BATCHES = [
    ("simclr", {"learn_temperature": True}),
    ("triplet", {"soft": True}),
    ("arcface", {"scale": 8}),
    ("margin", {"views": 2}),
    ("siamese", {"judge": "concat"}),
    ("vicreg", {}),
    ("simsiam", {}),
    ("moco", {"queue": 24}),
    ("distill", {"views": 2, "loss": "similarity"}),
    ("lejepa", {"slices": 16}),
    ("swav", {"prototypes": 16, "freeze": 0.0, "queue": 24, "queue_from": 0.0}),
    ("mae", {"decoder_width": 16, "decoder_depth": 1, "views": 2}),
    *((name, options) for name, options in CASES if name in ("dino", "ibot")),
]


@pytest.mark.parametrize(("name", "options"), IN_MICRO_BATCHES)
def test_micro_batches_on_two_ranks_equal_one_pass(name, options):
    one = learner(name, options)
    backward(one, one.method)
    for grads, _ in on_ranks(2, in_micro_batches, name, options, "no"):
        assert_same(grads, gradients(one))


def apart(grads, expected):
    """The distance between gradients, as a fraction of the length of the expected one."""
    ours, theirs = (torch.cat([g.flatten() for g in one]) for one in (grads, expected))
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize(("name", "options"), [("simclr", {"learn_temperature": True}), ("arcface", {"scale": 8})])
def test_micro_batches_in_bf16_equal_one_pass_in_bf16(name, options):
    one = learner(name, options)
    backward(one, one.method)
    for grads, in_one_pass in on_ranks(2, in_micro_batches, name, options, "bf16"):
        assert apart(grads, in_one_pass) < 0.01
        assert 1e-4 < apart(grads, gradients(one)) < 0.1  # float32's, but for bf16's rounding


def with_a_scaler(scale):
    """Gradients of fp16 micro-batches, unscaled; whether a step changed the network; and the scaler's next scale."""
    network = learner("simclr", {})
    with launched():
        accelerator, ddp, whole, pieces = pieces_of(network, "no")
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)  # Accelerate itself makes one on GPUs alone
        optimizer = torch.optim.SGD(network.parameters(), 0.1)

        def rows(piece, i):
            with torch.autocast("cpu", torch.float16):
                outputs = embed(ddp, network.method, piece)
            return outputs._replace(rows=outputs.rows.float())

        micro_batch.backward(accelerator, ddp, rows, network.method, pieces, whole, 0.0)
        accelerator.scaler.unscale_(optimizer)
        grads, before = gradients(network), copy.deepcopy(network.state_dict())
        accelerator.scaler.step(optimizer)
        accelerator.scaler.update()
        changed = any(not torch.equal(value, before[key]) for key, value in network.state_dict().items())
        return grads, changed, accelerator.scaler.get_scale()


def test_micro_batches_with_the_loss_scaler_of_fp16():
    one = learner("simclr", {})
    backward(one, one.method)
    for grads, changed, scale in on_ranks(2, with_a_scaler, 2.0**10):
        assert 1e-5 < apart(grads, gradients(one)) < 0.02
        assert (changed, scale) == (True, 2.0**10)


def test_micro_batches_whose_scaled_gradient_overflows_leave_the_step_out():
    for grads, changed, scale in on_ranks(2, with_a_scaler, 2.0**100):
        assert not all(g.isfinite().all() for g in grads)
        assert (changed, scale) == (False, 2.0**99)


def two_steps(network, optimizer, count):
    losses = []
    for _ in range(count):
        loss, figures = backward(network, network.method)
        optimizer.step()
        optimizer.zero_grad()
        network.follow(0.0)
        losses.append(loss.item())
        assert all(not v.requires_grad and v.isfinite() for v in figures.values())
    return losses


@pytest.mark.parametrize(("name", "options"), CASES)
def test_training_lowers_the_loss_and_resumes_exactly(name, options, tmp_path):
    network = learner(name, options)
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3)
    start = two_steps(network, optimizer, 4)
    checkpoint.write(tmp_path, 4, checkpoint.files(4, network, {"optimizer": optimizer.state_dict()}), keep=1)
    saved = copy.deepcopy(network.state_dict())
    rest = two_steps(network, optimizer, 8)
    # The teacher and the centre of dino and ibot move on, and the loss rises with them.
    late = rest[:2] if name in ("dino", "ibot") else rest[-3:]
    if (name, "queue" in options) != ("swav", True):  # its queue has the same 8 images where they were some steps ago
        assert max(late) < min(start[:2])

    again = learner(name, options)
    step, states = checkpoint.load(checkpoint.newest(tmp_path), again)
    optimizer = torch.optim.AdamW(again.parameters(), 3e-3)
    optimizer.load_state_dict(states["optimizer"])
    assert step == 4
    torch.testing.assert_close(dict(again.state_dict()), dict(saved), rtol=0, atol=0)  # teacher, queue and centre too
    assert two_steps(again, optimizer, 8) == rest


@pytest.mark.parametrize("name", NAMES)
def test_recipe_and_registry(name):
    """The method builds from a configuration that names it, and what it cannot do without."""
    run = load(None, [f"method.name={name}", *(f"method.{key}={value}" for key, value in needed(name).items())])
    method = methods.build(run.method, 24, Images(), tokens.Layout((8, 8), (4, 4), 24, 1, "avg"))
    assert method.views in (1, 2)
    assert method(torch.randn(6, 24), 0.0).shape[0] == 6
