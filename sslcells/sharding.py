"""Parameters, gradients and optimizer state sharded over the ranks: FSDP2 through Accelerate, arXiv 2304.11277.

Only training steps use the shards. Figures, checkpoints and the export read a gathered copy, and so are those of DDP.
What is imported of torch.distributed is imported late: it takes a third as long as torch itself.
"""

import copy
import os
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import TYPE_CHECKING, Any, Generic, TypeGuard, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, ParallelismConfig
from accelerate.utils.operations import convert_outputs_to_fp32
from torch import Tensor, nn

from sslcells import ranks
from sslcells.config import ConfigError, Run

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

N = TypeVar("N", bound=nn.Module)

OPTIMIZERS = ("adam", "adamw", "lamb", "lambc", "larc", "lars", "lion", "momentum", "nadamw", "sgd")
"""Those whose step on shards was tested to be that on whole tensors."""


def check(run: Run, of_loss: Sequence[nn.Parameter] = ()) -> None:
    """Raise a ConfigError where settings do not go with train.parallel=fsdp; `of_loss` is what the loss learns."""
    if run.train.parallel != "fsdp":
        return
    if run.optim.name not in OPTIMIZERS:
        raise ConfigError(
            f"train.parallel=fsdp: optim.name={run.optim.name} is not known to be right where each rank has a part of "
            f"a tensor; take one of {', '.join(OPTIMIZERS)}"
        )
    if of_loss and run.optim.name.startswith("lamb"):
        raise ConfigError(
            f"train.parallel=fsdp: optim.name={run.optim.name} takes one norm of all gradients, and what this method's "
            f"loss learns is not sharded; take lars or adamw"
        )
    if run.train.compile:
        raise ConfigError("train.parallel=fsdp: train.compile=true is not supported with it: set only one")
    if run.train.precision == "fp16":
        raise ConfigError("train.parallel=fsdp: train.precision=fp16 is not supported with it: take bf16, or no")


def accelerator(**options: Any) -> Accelerator:
    """An Accelerator of these options that shards over all ranks.

    Parameters stay in float32 and autocast casts them, as in DDP: Accelerate's own policy for bf16 would also normalise
    and reduce gradients in bf16.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", mixed_precision_policy=MixedPrecisionPolicy()
    )
    started = Accelerator(fsdp_plugin=plugin, **options)
    del os.environ["ACCELERATE_USE_FSDP"]  # Accelerate sets it, and the next run of this process would refuse it
    # On a CPU Accelerate leaves the plugin out without a word, and torch would shard on a GPU if there is one.
    state, parallel = started.state, ParallelismConfig(dp_shard_size=ranks.world())
    state.distributed_type, state.fsdp_plugin, state.parallelism_config = DistributedType.FSDP, plugin, parallel
    names = tuple(parallel.fsdp_dim_names)
    state.device_mesh = init_device_mesh(started.device.type, (ranks.world(),), mesh_dim_names=names)
    # No loss changes the rows that it is given in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    return started


class Whole(Generic[N]):
    """A network with all of its parameters, for what does not train it. In DDP that is the network itself."""

    def __init__(self, network: N, copied: N | None = None) -> None:
        self._network, self._copy = network, copied

    @contextmanager
    def gathered(self, change: bool = False) -> Iterator[N]:
        """The network with all of its parameters; with `change` the shards take what the block makes of them.

        Every rank must call this.
        """
        if self._copy is None:
            yield self._network
            return
        parameters = list(zip(self._copy.parameters(), self._network.parameters(), strict=True))
        buffers = list(zip(self._copy.buffers(), self._network.buffers(), strict=True))
        for whole, part in parameters:
            whole.data = full(part.detach())
        for copied, own in buffers:
            copied.copy_(own)
        try:
            yield self._copy
            if change:
                with torch.no_grad():
                    for whole, part in parameters:
                        part.copy_(like(whole, part))
                    for copied, own in buffers:
                        own.copy_(copied)
        finally:
            _empty(self._copy)


def prepare(
    accelerator: Accelerator, network: N, optimizer: torch.optim.Optimizer, blocks: Collection[str]
) -> tuple[nn.Module, torch.optim.Optimizer, Whole[N]]:
    """What trains, as Accelerate prepares it, in DDP or sharded, and the whole of the network.

    Sharded, modules of the classes `blocks` are gathered one at a time, the rest together. What
    `network.method.loss_parameters()` names is used outside of the forward pass, and stays whole on every rank.
    """
    if accelerator.distributed_type != DistributedType.FSDP:
        return *accelerator.prepare(network, optimizer), Whole(network)
    from torch.distributed.fsdp import FSDPModule

    copied = copy.deepcopy(network)
    _empty(copied)
    copied.to(accelerator.device)
    for parameter in network.parameters():
        parameter.data = parameter.data.contiguous()  # FSDP2 takes no other memory format
    alone = nn.ParameterList(network.method.loss_parameters())  # type: ignore[operator,union-attr]
    for parameter in alone:
        parameter.data = parameter.data.to(accelerator.device)
        parameter.register_post_accumulate_grad_hook(_average)
    plugin = accelerator.state.fsdp_plugin
    plugin.transformer_cls_names_to_wrap, plugin.ignored_modules = list(blocks), [alone]
    _, optimizer = accelerator.prepare(network, optimizer)
    for module in network.modules():
        if isinstance(module, FSDPModule) and accelerator.device.type == "cpu":
            module.set_force_sum_reduction_for_comms(True)  # gloo has no mean
    if accelerator.native_amp:
        for one in (network, copied):
            one.forward = MethodType(convert_outputs_to_fp32(accelerator.autocast()(type(copied).forward)), one)
    return network, optimizer, Whole(network, copied)


def _empty(network: nn.Module) -> None:
    """Free the memory of the parameters."""
    for parameter in network.parameters():
        parameter.data = parameter.data.new_empty(0)


def _average(parameter: Tensor) -> None:
    """Give every rank the mean of the ranks' gradients, as DDP does; of equal ones that is the same again."""
    assert parameter.grad is not None
    parameter.grad.copy_(ranks.total(parameter.grad) / ranks.world())


def sharded(x: Any) -> "TypeGuard[DTensor]":
    """True for a tensor of which each rank has a part."""
    return hasattr(x, "device_mesh")


def local(x: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    return x.to_local() if sharded(x) else x


def full(x: Tensor) -> Tensor:
    """A tensor gathered from all ranks, each of which must call this."""
    return x.full_tensor() if sharded(x) else x


def like(x: Tensor, other: Tensor) -> Tensor:
    """A whole tensor, sharded as another one of its shape is."""
    if not sharded(other):
        return x
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x.to(other.device), other.device_mesh, other.placements, src_data_rank=None)


def state_of(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state with all of each tensor, on rank 0; every rank must call this."""
    state: dict[str, Any] = _mapped(optimizer.state_dict(), lambda x: _on_main(x) if sharded(x) else x)
    return state


def _on_main(x: "DTensor") -> Tensor:
    whole = x.full_tensor()
    return whole.cpu() if ranks.rank() == 0 else whole.new_empty(0)


def _mapped(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Nested dicts and lists with other tensors."""
    if isinstance(tree, Mapping):
        return {key: _mapped(value, change) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_mapped(value, change) for value in tree]
    return change(tree) if isinstance(tree, Tensor) else tree


def load_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load what `state_of` gave, or a training without shards, on any number of ranks."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    of_each = {
        index: {
            key: like(x, parameters[index]) if isinstance(x, Tensor) and x.shape == parameters[index].shape else x
            for key, x in values.items()
        }
        for index, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": of_each})


def describe(network: nn.Module, blocks: Collection[str], world: int) -> str:
    """What a rank keeps, for `--check`."""
    count = sum(p.numel() for p in network.parameters()) / 1e6
    if world == 1:
        return "parallel: fsdp, but one rank has nothing to share"
    return (
        f"parallel: fsdp: a rank keeps 1/{world} of the {count:.2f} M parameters, of their gradients and of the "
        f"optimizer's state; gathered for a step {'by ' + ', '.join(blocks) if blocks else 'all at once'}, and whole "
        f"for figures, checkpoints and the export"
    )
