"""The device and the dtype that a script computes with, and why."""

import math
import os
import time
from contextlib import nullcontext
from functools import cache

from support.cli import UserError, first_line, human

import torch
from torch import Tensor


def pick_device(name: str, many_shapes: bool = False) -> str:
    """The device that --device names, after trying it; `auto` takes the fastest there is. `many_shapes`:
    prompts or batches of many lengths are to come."""
    if name == "auto" and torch.cuda.is_available():
        name = "cuda"
    elif name == "auto":
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        # Asking for a value shows more than asking for memory: the meta device has none to give.
        torch.empty(1, device=name).item()
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"--device {name} is not available here ({first_line(e)}); use --device auto") from e
    if name.startswith("cuda"):
        torch.set_float32_matmul_precision("high")  # TF32 for what stays in float32
        torch.backends.cuda.enable_cudnn_sdp(not many_shapes)  # it plans every shape anew, for half a second
        if ":" in name:
            torch.cuda.set_device(name)  # streams and events belong to the current device
    return name


def fast_bfloat16(device: str) -> bool:
    """Whether the device multiplies bfloat16 faster than float32, without emulating it."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device == "cpu" and torch.cpu._is_avx512_bf16_supported()


def pick_dtype(name: str, device: str) -> tuple[torch.dtype, str]:
    """The dtype of matrix products, and the reason for it."""
    if name in ("float32", "bfloat16"):
        slow = name == "bfloat16" and not fast_bfloat16(device)
        return getattr(torch, name), "as asked; float32 is faster here" if slow else "as asked"
    if name != "auto":
        raise UserError(f"dtype {name!r} is not valid; it is auto, float32 or bfloat16")
    what = device_name(device) if device.startswith("cuda") else f"this {device.upper()}"
    if fast_bfloat16(device):
        return torch.bfloat16, f"{what} has it"
    return torch.float32, f"{what} has no fast bfloat16"


@cache
def why_not_compile(device: str) -> str:
    """What keeps this machine from compiling, found by compiling something small, or ''."""
    try:
        torch.compile(lambda x: (2 * x + 1).sum(-1))(torch.ones(8, 8, device=device))
        return ""
    except Exception as e:  # no compiler, or one that fails, no place for what it makes, no triton
        said = str(e).removeprefix("backend='inductor' raised:\n")
        said = said.partition("Output:\n")[2].strip() or said
        return said.partition("\n")[0] or type(e).__name__


def require_compiler(device: str, otherwise: str) -> None:
    """Raises UserError where this machine cannot compile, with what to do otherwise."""
    if reason := why_not_compile(device):
        raise UserError(f"compiling fails here ({reason}); fix that, or {otherwise}")


# What a device computes per second in training, roughly: to tell a long run from a short one before it
# starts.
USUAL_FLOPS = {"cpu": 4e10, "cuda": 5e13}  # per thread, per GPU


def pick_compile(asked: bool | None, device: str, flops: float) -> tuple[bool, str]:
    """Whether to compile a training of so many FLOPs, and the reason. By itself it decides from the FLOPs
    and not from a measurement, so that reruns choose the same. UserError where it was
    asked for and the machine cannot."""
    if asked is False:
        return False, "as asked"
    if asked:
        require_compiler(device, "leave --compile out")
        return True, "as asked"
    kind = device.split(":")[0]
    speed = USUAL_FLOPS.get(kind, math.inf) * (torch.get_num_threads() if kind == "cpu" else 1)
    if flops / speed < 60:  # compiling takes about ten seconds, and saves a fifth or more of the rest
        return False, "pays in runs of a minute or more"
    reason = why_not_compile(device)
    return (False, f"it fails here: {reason}") if reason else (True, "pays in a run of this length")


def device_name(device: str) -> str:
    """What the device calls itself, where it has a name."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def autocast(device: str | torch.device, dtype: torch.dtype):
    """A context in which matrix products are computed in `dtype`."""
    kind = str(device).split(":")[0]
    return nullcontext() if dtype == torch.float32 else torch.autocast(kind, dtype)


def to_device(x: Tensor, device: str) -> Tensor:
    """A copy on the device. On a GPU it is made while the GPU still computes, from memory that stays put."""
    if not device.startswith("cuda"):
        return x.to(device)
    return x.contiguous().pin_memory().to(device, non_blocking=True)


def check_memory(build, bytes_each: int, device: str, n_devices: int = 1) -> None:
    """UserError where what training keeps of each parameter of the model that `build` makes exceeds the
    memory of the devices."""
    with torch.device("meta"):
        n_params = sum(p.numel() for p in build().parameters())
    need, have = bytes_each * n_params, device_memory(device) * n_devices
    if need > have:
        raise UserError(
            f"{human(n_params)} parameters need {human(need, 'B')} to train and {device} has "
            f"{human(have, 'B')}; lower --n_layer or --n_embd"
        )


def device_memory(device: str) -> int:
    """Bytes of memory that the device has in all."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[1]
    if not hasattr(os, "sysconf"):  # Windows
        return 1 << 62
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


# FLOP/s in bfloat16 that data sheets name, by a part of the card's name.
DATA_SHEETS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "RTX 4090": 165e12}


def data_sheet_peak(device: str) -> float | None:
    """FLOP/s in bfloat16 by the data sheet of a GPU, where it is known."""
    name = device_name(device)
    return next((peak for card, peak in DATA_SHEETS.items() if card in name), None)


def matmul_peak(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, the best of a few: what a training step could reach at most."""
    n = 8192 if device.startswith("cuda") else 1024
    repeats = 6 if device != "cpu" or dtype == torch.float32 else 2
    x = torch.randn(n, n, device=device, dtype=dtype)
    best = math.inf
    for _ in range(repeats):
        began = time.perf_counter()
        x[0, 0] = (x @ x)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - began)
    return 2 * n**3 / best


class CudaGraph:
    """The decode step of a model over one cache, recorded once and then replayed, so that the GPU need not
    wait for Python. A recording never changes its sizes: it takes the position from a tensor of the cache
    and reads all of its blocks, of which `kernels.decode_attention` masks those not filled yet. It holds no
    reference to the cache, which holds the graph: in a circle, neither would be freed in time."""

    def __init__(self, step, idx: Tensor, cache):
        """`step` maps idx (B, 1) and the cache to logits (B, 1, vocab), and reads no Python state that
        changes."""
        self.idx = idx.clone()
        cache.fixed = True  # from here on, all blocks are read
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # compiles, and warms up what must not happen while recording
                step(self.idx, cache)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = step(self.idx, cache)
        cache.fixed = False

    def __call__(self, idx: Tensor) -> Tensor:
        """Logits of the cache's current position, which the next call overwrites."""
        self.idx.copy_(idx)
        self.graph.replay()
        return self.logits
