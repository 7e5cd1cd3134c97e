"""Training on several devices, which `torchrun` starts: data parallel, or sharded with FSDP2 (--shard).

    torchrun --standalone --nproc_per_node=8 train.py config/gpt2.toml

Every rank is a process with a device of its own, and computes its share of each batch. All ranks draw the
same plans, since these are a function of the seed and the step."""

import os
import sys
import warnings
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from cli import UserError

RANK = int(os.environ.get("RANK", 0))
RANKS = int(os.environ.get("WORLD_SIZE", 1))


def join(device: str) -> str:
    """Meet the other ranks. Returns this rank's own device."""
    if RANKS == 1:
        return device
    if not device.startswith("cuda"):
        dist.init_process_group("gloo")
        return device
    local, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local >= there:
        raise UserError(f"torchrun started more processes than the {there} GPUs; lower --nproc_per_node")
    torch.cuda.set_device(local)
    dist.init_process_group("nccl", device_id=torch.device("cuda", local))
    return f"cuda:{local}"


def leave(status: int = 0) -> None:
    """Part from the other ranks: ends the process of a rank, and does nothing where there is only one."""
    if RANKS > 1:
        sys.stdout.flush()
        wait_for_all()  # rank 0 may still be saving; torchrun stops it when another has left with a status
        dist.destroy_process_group()
        # Sharded weights keep gloo's threads alive, and one that still frees a tensor while Python shuts down
        # aborts the process. So a rank ends without that shutdown.
        os._exit(status)


def wait_for_all() -> None:
    if RANKS > 1:
        dist.barrier()


def on_any_rank(flag: bool, device: str) -> bool:
    """Whether `flag` is set on any rank; every rank must ask. On a GPU this waits for all work so far."""
    if RANKS == 1:
        return flag
    raised = torch.tensor(float(flag), device=device)
    dist.all_reduce(raised, dist.ReduceOp.MAX)
    return bool(raised)


def average(x: Tensor) -> Tensor:
    """The mean of all ranks' x."""
    if RANKS > 1:
        dist.all_reduce(x)
        x = x / RANKS
    return x


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Data parallelism by hand: routing leaves the K and V of some layers without gradients, others at every
    step, but the same ones on every rank."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    for work in [dist.all_reduce(gradient, async_op=True) for gradient in gradients]:
        work.wait()
    for gradient in gradients:
        gradient /= RANKS


def shard(model: torch.nn.Module, device: str) -> None:
    """FSDP2: every rank keeps a part of each weight, gradient and moment, and gathers a layer's weights while
    that layer runs. Layers move to the device one by one, so that none ever holds the whole model."""
    mesh = init_device_mesh(device.split(":")[0], (RANKS,))
    warnings.filterwarnings(
        "ignore", ".*returned a view tensor"
    )  # `project` returns views that stay unwritten
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
        register_fsdp_forward_method(block, "project")  # a layer runs in two steps
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "losses")


def whole(tree):
    """A state_dict with whole tensors for sharded ones; every rank must ask."""
    if isinstance(tree, DTensor):
        return tree.full_tensor().cpu()
    if isinstance(tree, dict):
        return {key: whole(value) for key, value in tree.items()}
    return [whole(value) for value in tree] if isinstance(tree, list) else tree


def like(x: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor in the form of `parameter`: this rank's part where that is sharded."""
    if not isinstance(parameter, DTensor):
        return x
    return distribute_tensor(x, parameter.device_mesh, parameter.placements, src_data_rank=None)
