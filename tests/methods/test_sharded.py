"""What shards owe (train.parallel=fsdp): N ranks = one, exact resume, and a part of the memory."""

import copy
import re

import pytest
import torch
from gloo import launched, on_ranks
from test_contract import (
    IMAGES,
    IN_MICRO_BATCHES,
    SIZE,
    Images,
    apart,
    assert_same,
    backward,
    batch,
    embed,
    learner,
    partly,
)
from test_train import tiny

from sslcells import launcher, methods, micro_batch, models, optim, ranks, sharding
from sslcells.config import PLUGINS, ConfigError, Model, Optim, load
from sslcells.models import adapt, depth
from sslcells.plan import consequences


def resnet(checkpointed=False):
    """A ResNet without BatchNorm."""
    torch.manual_seed(0)
    config = Model(backbone="test_resnet", norm="group")
    encoder = models.build(config, 3)
    if checkpointed:
        models.checkpoint_activations(encoder, config)
    method = methods.build(PLUGINS["method"].config("simclr")(norm="layer", hidden=16, dimension=8), 96, Images())
    return methods.Learner(encoder, method)


def checkpointed():
    network = learner("byol", {})
    models.checkpoint_activations(network.backbone, Model(backbone="test_vit"))
    return network


ADAMW = Optim(name="adamw", lr=1e-2)


def frozen():
    """A classifier on an encoder that does not learn."""
    torch.manual_seed(0)
    config = Model(backbone="test_vit", args={"img_size": SIZE}, freeze=True)
    encoder = models.build(config, 3)
    fixed = adapt.adapt(encoder, config).fixed
    return methods.Learner(encoder, methods.build(PLUGINS["method"].config("supervised")(), 64, Images()), fixed)


def shards(network, config=ADAMW, precision="no"):
    """The network and its optimizer, each rank with its part, and the Accelerator."""
    accelerator = launcher.start(True, 1.0, precision, threads=1, sharded=True)
    prepared = sharding.prepare(accelerator, network, optim.build(config, network), depth.blocks(network.backbone))
    return accelerator, *prepared


def mine():
    part = IMAGES // ranks.world()
    return slice(ranks.rank() * part, (ranks.rank() + 1) * part)


def whole_gradients(network):
    return [sharding.full(p.grad) for p in network.parameters() if p.requires_grad]


def state(network):
    return {name: x.detach().clone() for name, x in network.state_dict().items()}


def steps(network, optimizer, rows, count):
    for step in range(count):
        backward(network, network.method, rows)
        gradients = whole_gradients(network) if step == count - 1 else []
        optimizer.step()
        optimizer.zero_grad()
        network.follow(0.0)
    return gradients


SGD = Optim(name="sgd", lr=0.05)  # Adam's first steps divide rounding by itself


def two_steps_on_a_rank(make, *args):
    with launched():
        _, network, optimizer, whole = shards(make(*args), SGD)
        assert sum(hasattr(module, "unshard") for module in network.backbone.modules()) > 1
        gradients = steps(network, optimizer, mine(), 2)
        with whole.gathered() as net:
            return gradients, state(net)


def assert_two_ranks_equal_one(make, *args):
    one = make(*args)
    expected = steps(one, optim.build(SGD, one), slice(None), 2)
    for gradients, weights in on_ranks(2, two_steps_on_a_rank, make, *args):
        assert_same(gradients, expected)
        torch.testing.assert_close(weights, dict(one.state_dict()), rtol=1e-4, atol=1e-6)


CASES = [
    pytest.param((learner, "simclr", {"learn_temperature": True}), id="temperature"),
    pytest.param((resnet,), id="resnet"),
    pytest.param((checkpointed,), id="checkpointed"),
    pytest.param((frozen,), id="frozen"),
    pytest.param((partly, {"freeze": 2, "lora_rank": 4, "pretrained": True}), id="lora"),
    *(
        pytest.param((learner, name, options), id=name)
        for name, options in dict(IN_MICRO_BATCHES).items()
        if name in ("distill", "ibot", "mae", "margin", "swav")
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("made", CASES)
def test_two_ranks_with_shards_equal_one(made):
    assert_two_ranks_equal_one(*made)


def test_two_ranks_with_shards_and_a_teacher_equal_one():
    assert_two_ranks_equal_one(learner, "byol", {})


def in_micro_batches_on_a_rank(name, options):
    with launched():
        accelerator, network, _, _ = shards(learner(name, options))
        rows = mine()
        pieces = [batch(slice(i, i + 1)) for i in range(rows.start, rows.stop)]
        rows_of = lambda piece, i: embed(network, network.method, piece)  # noqa: E731
        before = dict(network.method.named_buffers(recurse=False))
        before = {name: x.clone() for name, x in before.items()}
        for _ in range(2):  # the second shows that the first left the shards in order
            for parameter in network.parameters():
                parameter.grad = None
            for name, x in before.items():
                network.method.get_buffer(name).copy_(x)
            micro_batch.backward(accelerator, network, rows_of, network.method, pieces, batch(rows), 0.0)
        return whole_gradients(network)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"), [("simclr", {"learn_temperature": True}), ("moco", {"queue": 24}), ("siamese", {})]
)
def test_micro_batches_with_shards_equal_one_pass(name, options):
    one = learner(name, options)
    backward(one, one.method)
    expected = [p.grad for p in one.parameters() if p.requires_grad]
    for gradients in on_ranks(2, in_micro_batches_on_a_rank, name, options):
        assert_same(gradients, expected)


def in_precision(precision, sharded):
    """Gradients in DDP or with shards, all in this precision but the parameters."""
    with launched():
        if sharded:
            _, network, _, _ = shards(learner("byol", {}), precision=precision)
            wrapped = network
        else:
            network = learner("byol", {})
            wrapped = launcher.start(True, 1.0, precision, threads=1).prepare(network)
        backward(wrapped, network.method, mine())
        return whole_gradients(network)


@pytest.mark.slow
def test_bf16_is_with_shards_what_it_is_in_ddp():
    one = learner("byol", {})
    backward(one, one.method)
    ddp, sharded = (on_ranks(2, in_precision, "bf16", sharded)[0] for sharded in (False, True))
    assert {g.dtype for g in sharded} == {torch.float32}
    assert_same(sharded, ddp)
    assert 1e-4 < apart(sharded, [p.grad for p in one.parameters() if p.requires_grad]) < 0.1


def optimized(config, sharded):
    """The weights after three steps."""
    network = learner("simclr", {}).double()
    optimizer = optim.build(config, network)
    parameters = list(network.parameters())
    whole = None
    if sharded:
        _, network, optimizer, whole = shards(network, config)
    generator = torch.Generator().manual_seed(2)
    for _ in range(3):
        for p in network.parameters():
            grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            p.grad = sharding.like(grad, p)
        optimizer.step()
    if whole is None:
        return [p.detach() for p in parameters]
    with whole.gathered() as net:
        return [p.detach().clone() for p in net.parameters()]


def optimized_on_a_rank(configs):
    with launched():
        return [optimized(config, sharded=True) for config in configs]


@pytest.mark.slow
def test_a_step_of_every_optimizer_is_that_on_whole_tensors():
    configs = [Optim(name=name, lr=0.01, weight_decay=0.1) for name in sharding.OPTIMIZERS]
    for found in on_ranks(2, optimized_on_a_rank, configs):
        for config, weights in zip(configs, found, strict=True):
            expected = optimized(config, sharded=False)
            said = config.name
            torch.testing.assert_close(weights, expected, rtol=1e-9, atol=1e-12, msg=lambda m, s=said: f"{s}: {m}")


def elements(trees):
    return sum(sharding.local(x).numel() for x in trees if isinstance(x, torch.Tensor))


def memory_on_a_rank():
    with launched():
        network = learner("byol", {})
        count = elements(network.parameters())
        _, network, optimizer, _ = shards(network)
        steps(network, optimizer, mine(), 1)
        backward(network, network.method, mine())
        state = [x for values in optimizer.state.values() for x in values.values()]
        taught = [p for p in network.parameters() if p.requires_grad]
        return count, *map(elements, (network.parameters(), taught, [p.grad for p in taught], state))


@pytest.mark.slow
def test_a_rank_keeps_half_of_parameters_gradients_and_optimizer_state():
    found = on_ranks(2, memory_on_a_rank)
    for count, held, taught, grads, state in found:
        assert 0.4 * count < held < 0.6 * count
        assert grads == taught
        assert 2 * taught <= state < 2.1 * taught  # two of AdamW, and its steps
    assert sum(held for _, held, *_ in found) == found[0][0]


def saved_and_loaded():
    """Weights after two more steps, going on and from what was saved; and what was saved."""
    with launched():
        _, network, optimizer, whole = shards(learner("byol", {}))
        steps(network, optimizer, mine(), 2)
        with whole.gathered() as net:
            saved = copy.deepcopy((state(net), sharding.state_of(optimizer)))
        saved = ranks.from_main(lambda: saved)
        steps(network, optimizer, mine(), 2)
        with whole.gathered() as net:
            on = state(net)
        _, network, optimizer, whole = shards(learner("byol", {}))
        with whole.gathered(change=True) as net:
            net.load_state_dict(saved[0])
        sharding.load_state(optimizer, saved[1])
        steps(network, optimizer, mine(), 2)
        with whole.gathered() as net:
            return on, state(net), saved


@pytest.mark.slow
def test_what_is_saved_is_whole_and_goes_on_to_the_last_bit():
    one = learner("byol", {})
    optimizer = optim.build(ADAMW, one)
    steps(one, optimizer, slice(None), 2)
    for on, again, (weights, states) in on_ranks(2, saved_and_loaded):
        torch.testing.assert_close(again, on, rtol=0, atol=0)
        assert not any(sharding.sharded(x) for x in weights.values())
        assert weights.keys() == one.state_dict().keys()
        expected = optimizer.state_dict()
        assert states["param_groups"] == expected["param_groups"]
        for index, values in expected["state"].items():
            assert {k: x.shape for k, x in values.items()} == {k: x.shape for k, x in states["state"][index].items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("optim.name=muon", "train.parallel=fsdp: optim.name=muon is not known to be right .* take one of adam, "),
        ("train.compile=true", "train.parallel=fsdp: train.compile=true is not supported with it"),
        ("train.precision=fp16", "train.parallel=fsdp: train.precision=fp16 is not supported with it: take bf16"),
    ],
)
def test_what_does_not_go_with_shards_is_refused_by_name(change, message):
    with pytest.raises(ConfigError, match=message):
        sharding.check(load(None, ["train.parallel=fsdp", change]))
    sharding.check(load(None, [change]))


def test_lamb_does_not_go_with_shards_and_what_a_loss_learns():
    run = load(None, ["train.parallel=fsdp", "optim.name=lamb"])
    sharding.check(run)
    with pytest.raises(ConfigError, match=r"optim\.name=lamb takes one norm of all gradients"):
        sharding.check(run, learner("simclr", {"learn_temperature": True}).method.loss_parameters())


def test_check_says_what_a_rank_keeps_and_refuses(tmp_path):
    said = consequences(tiny(tmp_path, "train.parallel=fsdp", "model.backbone=test_resnet", "model.args={}"), 2)
    assert re.search(r"parallel: fsdp: a rank keeps 1/2 of the 0\.\d\d M parameters, .* by BasicBlock, and whole", said)
    with pytest.raises(ConfigError, match=r"optim\.name=muon"):
        consequences(tiny(tmp_path, "train.parallel=fsdp", "optim.name=muon"), 2)


def test_blocks_of_backbones():
    kinds = {"test_vit": ["Block"], "test_resnet": ["BasicBlock"], "test_convnext": ["ConvNeXtBlock"], "small_cnn": []}
    for name, expected in kinds.items():
        assert depth.blocks(models.build(Model(backbone=name), 3)) == expected
