"""The only file that uses torch.distributed, besides sharding.py. All of it also works without a process group."""

import contextlib
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sslcells.errors import UserError

T = TypeVar("T")

# Renamed in torch 2.13; the old name warns from then on.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def set_timeout(timeout: timedelta) -> None:
    """Set how long ranks wait for each other in the gloo group that is added to a bare NCCL group."""
    global _timeout
    _timeout = timeout


def world() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's rank; 0 without a process group."""
    return dist.get_rank() if world() > 1 else 0


def backends() -> list[str]:
    """The backends of this build of torch."""
    if not dist.is_available():
        return []
    nccl = [f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}"] if dist.is_nccl_available() else []  # type: ignore[no-untyped-call]
    return nccl + ["gloo"] * dist.is_gloo_available()


def gather(x: Tensor) -> Tensor:
    """Rows of all ranks in rank order, without gradient: (A, ...) on every rank → (A·world, ...).

    Every rank must pass the same shape; check it with `same_count` if it may differ.
    """
    x = x.detach().contiguous()
    if world() == 1:
        return x
    out = x.new_empty((world() * x.shape[0], *x.shape[1:]))
    _all_gather(out, x)
    return out


class _Total(torch.autograd.Function):
    """A sum over ranks whose backward pass is local."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = x.detach().clone(memory_format=torch.contiguous_format)
        if world() > 1:
            dist.all_reduce(out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return world() * grad


def total(x: Tensor) -> Tensor:
    """Sum x over ranks; the result is equal to the last bit on all of them. Every rank must pass the same shape.

    Every rank computes the same loss from the totals. The backward pass gives each rank world times its part of the
    gradient of one process, so that DDP's mean over ranks is that gradient. Therefore a total must not be computed
    from another total that carries gradient.
    """
    out: Tensor = _Total.apply(x)
    return out


def same_count(count: int, what: str) -> None:
    """Raise the same ValueError on every rank if the ranks' counts differ, where a gather would hang.

    The counts are exchanged between CPUs, so this does not wait for the device.
    """
    if world() == 1:
        return
    counts = torch.empty(world(), dtype=torch.int64)
    dist.all_gather(list(torch.split(counts, 1)), torch.tensor([count]), group=_cpu_group())
    if (counts != count).any():
        raise ValueError(f"every rank must bring the same number of {what}; the ranks brought {counts.tolist()}")


def all_ranks(x: T) -> list[T]:
    """Gather a Python object from every rank: a list in rank order, on every rank."""
    if world() == 1:
        return [x]
    out: list[T | None] = [None] * world()
    dist.all_gather_object(out, x, group=_cpu_group())
    return out  # type: ignore[return-value]


def from_main(make: Callable[[], T]) -> T:
    """Call `make` on rank 0 and return its result, or raise its error, on every rank."""
    if world() == 1:
        return make()
    answer: list[tuple[T | None, Exception | None]] = [(None, None)]
    if rank() == 0:
        try:
            answer = [(make(), None)]
        except Exception as error:  # handed to every rank, and raised there
            answer = [(None, _portable(error))]
    dist.broadcast_object_list(answer, src=0, group=_cpu_group())
    value, failure = answer[0]
    if failure is not None:
        raise failure
    return value  # type: ignore[return-value]


def dealt(parts: Sequence[Tensor] | None, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """One tensor for each rank, of those that rank 0 has; all are of this shape and type, and on the CPU."""
    if world() == 1:
        assert parts is not None
        return parts[0]
    out = torch.empty(*shape, dtype=dtype)
    dist.scatter(out, None if parts is None else [part.contiguous() for part in parts], src=0, group=_cpu_group())
    return out


def together(make: Callable[[], T]) -> T:
    """Call `make` on every rank and return its result; if any rank fails, all raise the error of the lowest one."""
    value, failure = None, None
    try:
        value = make()
    except Exception as error:  # handed to every rank, and raised there
        failure = error
    raise_first(failure)
    return value  # type: ignore[return-value]


def raise_first(failure: Exception | None) -> None:
    """If any rank has an error, raise that of the lowest such rank on every rank, with a note naming the rank."""
    for number, error in enumerate(all_ranks(failure and _portable(failure))):
        if error is not None:
            if world() > 1:
                error.add_note(f"rank {number}")
            raise error


def largest(number: int) -> int:
    """The maximum over ranks, on every rank; exchanged between CPUs, so this does not wait for the device."""
    if world() == 1:
        return number
    numbers = torch.tensor([number])
    dist.all_reduce(numbers, dist.ReduceOp.MAX, group=_cpu_group())
    return int(numbers.item())


def barrier() -> None:
    """Wait until every rank is here."""
    if world() > 1:
        dist.barrier(group=_cpu_group())


def close() -> None:
    """Leave the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def sync_batchnorm(module: nn.Module) -> nn.Module:
    """Convert BatchNorm layers to compute their statistics over all ranks."""
    converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(module)  # type: ignore[no-untyped-call]
    return converted


def unmet(error: BaseException) -> bool:
    """True if an error from starting the process group means that some ranks did not arrive."""
    return isinstance(error, dist.DistError)


@torch.no_grad()
def as_on_main(module: nn.Module) -> None:
    """Copy the saved buffers of a module, such as BatchNorm's statistics, from rank 0 to every rank."""
    if world() == 1:
        return
    saved = module.state_dict(keep_vars=True)
    for name, buffer in module.named_buffers():
        if name in saved:
            dist.broadcast(buffer, src=0)


class Lost(UserError):
    """The connection to another rank is lost; the message names the rank."""

    one_ranks = at_once = True


def leave(cause: str) -> None:
    """Record why this rank exits, for the error messages of the others."""
    if world() > 1:
        with contextlib.suppress(Exception):  # the store may have gone with its host
            _store().set(f"{_LEFT}/{rank()}", cause)


def lost(error: BaseException) -> Lost | None:
    """Turn a broken connection between ranks into an error that names the lost ranks; None for any other error.

    Every surviving rank reports to the store; ranks that have not reported after a few seconds are the lost ones.
    """
    broken = isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _BROKEN)
    )
    if world() == 1 or not broken:
        return None
    left = dict.fromkeys(range(world()), "")
    with contextlib.suppress(Exception):
        leave(_NOTICED)
        store, until = _store(), time.monotonic() + _POST_MORTEM
        while time.monotonic() < until and not all(left.values()):
            time.sleep(0.2)
            left = {r: store.get(f"{_LEFT}/{r}").decode() if store.check([f"{_LEFT}/{r}"]) else "" for r in left}
    told = [f"rank {r}: {cause}" for r, cause in left.items() if cause not in ("", _NOTICED)]
    silent = [str(r) for r, cause in left.items() if not cause]
    if told:
        return Lost(f"another rank stopped: {'; '.join(told)}")
    if not silent or len(silent) == world():
        return Lost(f"the connection to another rank broke: {error}")
    return Lost(
        f"rank {', '.join(silent)} of {world()} disappeared without an error message: "
        f"killed, out of memory, hung, or its node is down"
    )


@contextlib.contextmanager
def parting() -> Iterator[None]:
    """Record an error that leaves the block for the other ranks; a broken connection is raised as Lost."""
    try:
        yield
    except BaseException as error:
        if (gone := lost(error)) is not None:
            raise gone from error
        leave(f"{type(error).__name__}: {error}")
        raise


_LEFT = "sslcells/left"
_NOTICED = "noticed"
_POST_MORTEM = 5.0
"""seconds to wait for the surviving ranks to report"""
_BROKEN = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "Application timeout",
    "gloo/transport",
)


def _store() -> Any:
    store = dist.distributed_c10d._get_default_store()
    store.set_timeout(timedelta(seconds=_POST_MORTEM))
    return store


_timeout = timedelta(minutes=10)
_cpu_groups: dict[int, dist.ProcessGroup] = {}


def _cpu_group() -> dist.ProcessGroup:
    """A process group for CPU tensors: the default group, or a gloo group if the default is NCCL only."""
    default = dist.group.WORLD
    assert default is not None
    if "cpu:gloo" in dist.get_backend_config(default):
        return default
    if id(default) not in _cpu_groups:
        _cpu_groups.clear()
        group = dist.new_group(backend="gloo", timeout=_timeout)
        assert isinstance(group, dist.ProcessGroup)
        _cpu_groups[id(default)] = group
    return _cpu_groups[id(default)]


def _portable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # an exception that cannot be pickled must still be reported
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
