"""The GPU path without a GPU: fake CUDA tensors, which have shapes, types and a device but no values. They
find what was left on the CPU, what mixes devices, and where the host would have to wait for a value."""

import ctypes
import subprocess

import kernels
from kv_router import StochasticRouter
from model import GPT, GPTConfig, KVCache
from support.convert import convert
from support.devices import CudaGraph
from train import TrainConfig, make_optimizers

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

PLANS = ["full", "cla:2", "fusedkv", "fusedkv-lite", "shared-v", "0_1_k1v0+1_k0+1v0"]
CYCLIC = "sandwich-top:2"
SIZES = {"vocab_size": 512, "n_layer": 4, "n_embd": 64, "n_head": 4, "n_kv_head": 2, "block_size": 300}


@pytest.fixture(scope="module", autouse=True)
def device_guard(tmp_path_factory):
    """A CPU build of torch has no guard for CUDA devices, which fake tensors ask for: one that does
    nothing."""
    if torch.version.cuda:
        return
    from torch.utils.cpp_extension import include_paths

    folder = tmp_path_factory.mktemp("guard")
    (folder / "guard.cpp").write_text(
        "#include <c10/core/impl/DeviceGuardImplInterface.h>\n"
        "C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>)\n"
    )
    library = f"{torch.__path__[0]}/lib"
    command = [
        "g++",
        "-std=c++20",
        "-shared",
        "-fPIC",
        "guard.cpp",
        "-o",
        "guard.so",
        f"-L{library}",
        "-lc10",
    ]
    command += [f"-I{path}" for path in include_paths()]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("needs a C++ compiler")
    assert done.returncode == 0, done.stderr
    ctypes.CDLL(str(folder / "guard.so"))


@pytest.fixture
def fake(monkeypatch):
    """Everything in the test is fake; the plain mask stands for a subclass of tensors that cannot be."""
    causal = lambda T, S: torch.ones(T, S, dtype=torch.bool, device="cuda").tril(S - T)  # noqa: E731
    monkeypatch.setattr(kernels, "causal_lower_right", causal)
    with FakeTensorMode():
        yield


def cuda_model(plan: str) -> GPT:
    model = GPT(GPTConfig(plan=plan, **SIZES))
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = torch.nn.Parameter(torch.empty_like(p, device="cuda:0"))
    model.lm_head.weight = model.embed.weight
    return model


def token_ids(B: int, T: int) -> torch.Tensor:
    return torch.randint(512, (B, T), device="cuda")


def all_on_cuda(*tensors: torch.Tensor) -> bool:
    return all(t.device.type == "cuda" for t in tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("plan", [*PLANS, CYCLIC])
def test_training_stays_on_the_device(plan, dtype, fake, monkeypatch):
    """The loss under the model's plan and under drawn ones, gradient clipping, Muon and AdamW. A CPU build
    has no engine for CUDA's backward pass, so gradients are put in place."""
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda *args: True)
    model, idx = cuda_model(plan), token_ids(2, 64)
    seen = []
    model.blocks[0].mlp.down_proj.register_forward_hook(lambda _, x, y: seen.append(y.dtype))
    draws = [StochasticRouter(4, 0.5, base=plan).plan(step) for step in range(3)] if plan == "full" else []
    for drawn in (None, *draws):
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            _, loss = model(idx, idx, plan=drawn)
        assert all_on_cuda(loss) and loss.shape == () and seen[-1] == dtype
    for name in ("adamw", "muon"):
        optimizers = make_optimizers(model, TrainConfig(optimizer=name), dtype)
        for p in model.parameters():
            p.grad = torch.empty_like(p)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        states = [state for optimizer in optimizers for state in optimizer.state.values()]
        moments = [t for state in states for key, t in state.items() if key != "step"]
        assert moments and all_on_cuda(norm, *moments)


@torch.no_grad()
@pytest.mark.parametrize("plan", [*PLANS, CYCLIC])
def test_generation_stays_on_the_device(plan, fake):
    """A prompt, steps as they are recorded in a graph, and sampling. A cyclic prompt looks at how much its
    passes change, and only there a value is needed."""
    model = cuda_model(plan)
    cache = KVCache(model.config, model.plan, 2, 300, device="cuda")
    prompt = token_ids(2, 200)
    if plan == CYCLIC:
        with pytest.raises(DataDependentOutputException):
            model(prompt, cache=cache)
        cache.length = 200
    else:
        assert all_on_cuda(model(prompt, cache=cache)[0], *cache.k.values(), *cache.v.values())
        for column in model.stream(prompt, 3, temperature=0.7, top_k=20, seed=None, n_vocab=500):
            assert all_on_cuda(column) and column.shape == (2, 1)
    for cache.fixed in (False, True):
        assert all_on_cuda(model.decode(token_ids(2, 1), cache))


@torch.no_grad()
@pytest.mark.parametrize("plan", PLANS)
def test_evaluation_stays_on_the_device(plan, fake):
    model, idx = cuda_model(plan), token_ids(2, 64)
    assert all_on_cuda(model.losses(idx, idx), model.logits(idx))


@torch.no_grad()
def test_conversion_stays_on_the_device(fake, monkeypatch):
    monkeypatch.setattr(
        GPT, "to", lambda self, like: cuda_model(self.config.plan)
    )  # modules cannot swap fakes
    monkeypatch.setattr(GPT, "load_state_dict", lambda self, state: None)
    new = convert(cuda_model("full"), "fusedkv")
    assert all_on_cuda(new.blocks[3].attn.k_gate, new.blocks[3].attn.v_gate)


class Allocations(TorchDispatchMode):
    """Counts the tensors that operations make, apart from views."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **kwargs or {})
        memory = {t.untyped_storage()._cdata for t in args if isinstance(t, torch.Tensor)}
        if isinstance(out, torch.Tensor) and out.untyped_storage()._cdata not in memory:
            self.made.append(op)
        return out


@torch.no_grad()
def test_a_recorded_step_allocates_nothing(fake):
    """Between two replays the host only writes into memory that is there: the token and the position."""
    model, idx = cuda_model("fusedkv"), token_ids(2, 1)
    cache = KVCache(model.config, model.plan, 2, 300, device="cuda")
    graph = CudaGraph.__new__(CudaGraph)  # as recording leaves it
    graph.idx, graph.logits = idx.clone(), torch.empty(2, 1, 512, device="cuda")
    graph.graph = type("Recorded", (), {"replay": lambda self: None})()
    cache.graph = graph
    with Allocations() as allocations:
        for _ in range(3):
            assert model.decode(idx, cache) is graph.logits
    assert cache.length == 3 and not allocations.made
    cache.graph = None
    with Allocations() as allocations:  # and the mode would have noticed
        model.decode(idx, cache)
    assert allocations.made
