"""Training on several devices, which `torchrun` starts: data parallel, or sharded with FSDP2 (--shard).

    torchrun --standalone --nproc_per_node=8 train.py config/gpt2.toml

Every rank is a process with a device of its own, and computes its share of each batch. All ranks draw the
same plans, since these are a function of the seed and the step."""

import os
import shlex
import sys
import warnings

from support.cli import UserError

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor


def ranks() -> tuple[int, int]:
    """This process's rank and their number, as torchrun sets them. Variables that some other program has left
    are not taken for torchrun's: all of them must be there, and agree."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
    found = [int(text) if (text := os.environ.get(name, "")).isdecimal() else -1 for name in names]
    return (found[0], found[1]) if -1 not in found and found[0] < found[1] else (0, 1)


RANK, RANKS = ranks()


def launcher() -> str:
    """What started this program, for a command that starts it again."""
    script = shlex.quote(os.path.relpath(sys.argv[0]))
    if sys.argv[0] == "-c":  # the code that called train.main, perhaps with a rule of its own
        script = f"-c {shlex.quote(sys.orig_argv[-len(sys.argv)])}"
    return f"torchrun --standalone --nproc_per_node={RANKS} {script}" if RANKS > 1 else f"python {script}"


def join(device: str, batch_size: int, shard: bool) -> str:
    """Meet the other ranks. Returns this rank's own device. UserError for settings that this number of ranks
    cannot have."""
    if batch_size % RANKS:
        raise UserError(f"--batch_size {batch_size} cannot be divided among {RANKS} ranks; give a multiple")
    if shard and RANKS == 1:
        raise UserError(
            "--shard splits a model over several devices; start it with torchrun, or say --shard=false"
        )
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
    """Shut down the process group, and end the process of a rank. Does nothing where there is only one."""
    if RANKS > 1:
        sys.stdout.flush()
        wait_for_all()  # rank 0 may still be saving; torchrun stops it when another has left with a status
        dist.destroy_process_group()
        # Sharded weights keep gloo's threads alive, and one that still frees a tensor while Python shuts down
        # aborts the process. So a rank ends without that shutdown.
        os._exit(status)


def wait_for_all() -> None:
    """Until every rank has come here."""
    if RANKS > 1:
        dist.barrier()


def any_signal(received: int, ask_now: bool, device: str) -> int:
    """The number of a signal that some rank has received, or 0. All ranks must stop at the same step, and
    asking them waits for their devices, so several ranks ask only where `ask_now`."""
    if RANKS == 1:
        return received
    if not ask_now:
        return 0
    highest = torch.tensor(float(received), device=device)
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    return int(highest)


def average(tensors: list[Tensor]) -> None:
    """Replace each tensor by the mean over all ranks. For gradients this is data parallelism by hand: routing
    leaves the K and V of some layers without gradients, others at every step, but the same on every rank."""
    if RANKS == 1:
        return
    for work in [dist.all_reduce(x, async_op=True) for x in tensors]:
        work.wait()
    for x in tensors:
        x /= RANKS


def shard(model: torch.nn.Module, device: str) -> None:
    """FSDP2: every rank keeps a part of each weight, gradient and moment, and gathers a layer's weights while
    that layer runs. Layers move to the device one by one, so that none ever holds the whole model."""
    mesh = init_device_mesh(device.split(":")[0], (RANKS,))
    warnings.filterwarnings("ignore", ".*returned a view tensor")  # views of `project` that stay unwritten
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
        register_fsdp_forward_method(block, "project")  # a layer runs in two steps
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "losses")


def whole(x: Tensor) -> Tensor:
    """The whole of a sharded tensor; every rank must ask."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def gathered(tree: dict) -> dict:
    """A tree of tensors with whole ones on the CPU, one after the other; every rank must ask."""
    return {k: gathered(v) if isinstance(v, dict) else whole(v).cpu() for k, v in tree.items()}


def like(x: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor in the form of `parameter`: this rank's part where that is sharded."""
    if not isinstance(parameter, DTensor):
        return x
    return distribute_tensor(x, parameter.device_mesh, parameter.placements, src_data_rank=None)
