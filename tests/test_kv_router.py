import random
import subprocess
import sys
from collections import Counter
from statistics import NormalDist

from kv_router import Plan, PlanError, Route, StochasticRouter
from model import GPTConfig
from support.costs import costs, draw

import pytest
from conftest import ROOT, acyclic_plans


def sources(spec: str, n_layer: int) -> str:
    """'0 1 3/0': the source of K (and after a slash of V, where it differs) of every layer."""
    text = []
    for route in Plan.parse(spec, n_layer).routes:
        k, v = ("+".join(map(str, s)) for s in (route.k, route.v))
        text.append(k if k == v else f"{k}/{v}")
    return " ".join(text)


@pytest.mark.parametrize(
    "spec, n_layer, expected",
    [
        ("full", 4, "0 1 2 3"),
        ("keep:0,2,5", 8, "0 0 2 2 2 5 5 5"),
        ("cla:2", 5, "0 0 2 2 4"),
        ("cla:3", 8, "0 0 0 3 3 3 6 6"),
        ("yoco", 8, "0 1 2 3 3 3 3 3"),
        ("yoco", 5, "0 1 1 1 1"),
        ("shared-v", 4, "0 1/0 2/0 3/0"),
        ("fusedkv", 8, "0 1 2 3 0+3 0+3 0+3 0+3"),
        ("fusedkv", 7, "0 1 2 0+2 0+2 0+2 0+2"),
        ("fusedkv", 2, "0 0"),  # bottom and middle are one layer: nothing to fuse
        ("fusedkv-lite", 8, "0 1 2 3 3/0 3/0 3/0 3/0"),
        ("pizza-bottom:3", 6, "0 1 2 2 2 2"),
        ("pizza-middle:3", 6, "0 1 3 3 3 3"),
        ("pizza-top:3", 6, "0 1 5 5 5 5"),
        ("sandwich-bottom:4", 8, "0 1 2 2 2 2 2 7"),
        ("sandwich-middle:3", 8, "0 3 3 3 3 3 3 7"),
        ("sandwich-top:3", 8, "0 6 6 6 6 6 6 7"),
        ("lasagna-bottom:2", 6, "0 0 0 3 3 3"),
        ("lasagna-middle:2", 6, "1 1 1 4 4 4"),
        ("lasagna-top:3", 6, "1 1 3 3 5 5"),
        ("0_0_2_2", 4, "0 0 2 2"),
        ("0_1_k1v0_k0+1v0+1", 4, "0 1 1/0 0+1"),
        ("0_k1v1+0", 2, "0 1/0+1"),
    ],
)
def test_notation(spec, n_layer, expected):
    assert sources(spec, n_layer) == expected


def test_identities_of_the_unified_framework():
    for n_layer in (2, 4, 8, 12):
        assert Plan.parse("yoco", n_layer) == Plan.parse(f"pizza-bottom:{n_layer // 2}", n_layer)
        assert Plan.parse("cla:2", n_layer) == Plan.parse(f"lasagna-bottom:{n_layer // 2}", n_layer)
    for shape in ("pizza", "sandwich", "lasagna"):
        for position in ("bottom", "middle", "top"):
            for n_layer in range(1, 13):
                for n_kv in range(1, n_layer + 1):
                    plan = Plan.parse(f"{shape}-{position}:{n_kv}", n_layer)
                    assert plan.cache_ratio == n_kv / n_layer
                    assert plan.cyclic == any(r.k[0] > i for i, r in enumerate(plan.routes))
    assert not Plan.parse("sandwich-bottom:4", 12).cyclic and Plan.parse("sandwich-top:4", 12).cyclic


def test_lasagna_groups_are_as_even_as_possible():
    for n_layer in range(1, 14):
        for n_kv in range(1, n_layer + 1):
            plan = Plan.parse(f"lasagna-bottom:{n_kv}", n_layer)
            sizes = Counter(r.k[0] for r in plan.routes).values()
            assert max(sizes) - min(sizes) <= 1 and len(sizes) == n_kv


def random_plan(rng: random.Random, n_layer: int) -> Plan:
    def pick():
        return tuple(sorted(rng.sample(range(n_layer), rng.randint(1, min(3, n_layer)))))

    return Plan(tuple(Route(pick(), pick()) for _ in range(n_layer)))


def test_spec_is_canonical():
    rng = random.Random(0)
    plans = [random_plan(rng, rng.randint(1, 12)) for _ in range(300)]
    plans += [Plan.parse(spec, n) for n in range(1, 13) for spec in acyclic_plans(n)]
    plans += [StochasticRouter(12, 0.5, seed).plan(0) for seed in range(100)]
    for plan in plans:
        assert Plan.parse(plan.spec, len(plan)) == plan
    for a in plans:
        for b in plans:
            assert (a == b) == (a.spec == b.spec and len(a) == len(b))
    assert Plan.parse("0_0_2_2", 4).spec == Plan.parse("cla:2", 4).spec == "keep:0,2"
    assert hash(Plan.parse("cla:2", 4)) == hash(Plan.parse("0_0_2_2", 4))


@pytest.mark.parametrize("spec", ["yoco", "fusedkv", "fusedkv-lite"])
@pytest.mark.parametrize("n_layer", [2, 3])
def test_a_lower_half_of_one_layer_is_plain_sharing(spec, n_layer):
    plan = Plan.parse(spec, n_layer)
    assert plan.spec == "keep:0" and plan == Plan.parse("keep:0", n_layer)


def test_what_is_stored():
    plan = Plan.parse("fusedkv-lite", 8)
    assert (
        plan.k_layers == plan.v_layers == (0, 1, 2, 3)
        and plan.cache_ratio == 0.5
        and plan.last_full_layer == 3
    )
    plan = Plan.parse("0_0_k1v0_k1v2", 4)  # layer 1 is read only for K, layer 2 only for V
    assert (plan.k_layers, plan.v_layers, plan.cache_ratio) == ((0, 1), (0, 2), 0.5)
    assert Plan.parse("full", 8).last_full_layer == 7 and Plan.parse("keep:0,5", 8).last_full_layer == 5


@pytest.mark.parametrize(
    "spec, part",
    [
        ("nonsense", "no such plan"),
        ("", "no such plan"),
        ("keep:1,2", "layer 0 is not kept"),
        ("kept:0,2", "no such plan; did you mean keep?; valid are full, keep"),
        ("keep:0,4", "layer '4' is not valid; valid are the whole numbers 0 to 3"),
        ("keep:", "layer ''"),
        ("keep:0,-1", "layer '-1'"),
        ("cla:0", "group size '0'"),
        ("cla:two", "group size 'two'"),
        ("pizza-top:5", "number of KV layers '5'"),
        ("sandwich-top:0", "number of KV layers '0'"),
        ("lasagna-side:2", "no such plan"),
        ("0_1_2", "it has 3 entries"),
        ("0_1_2_4", "layer '4'"),
        ("0_1_2_k1", "cannot read 'k1'"),
        ("0_1_2_k1+1v0", "names a layer twice"),
        ("0_1_2_k1+v0", "layer ''"),
        ("full:2", "no such plan"),
    ],
)
def test_bad_specs_say_what_and_how(spec, part):
    with pytest.raises(PlanError) as e:
        Plan.parse(spec, 4)
    assert repr(spec) in str(e.value) and part in str(e.value) and "for example" in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("spaces", [False, True])
@pytest.mark.parametrize(
    "text", ["0_", "k0v0_", "k0+1", "cla:1", "keep:0,", "9", "fusedkv", "x", "ä", "🎉", "\\", "'\"", "\x01"]
)
def test_errors_about_long_specs_are_short(text, spaces):
    text += " " * spaces
    spec = (text * 5000)[:5000]
    with pytest.raises(PlanError) as e:
        Plan.parse(spec, 4)
    message = str(e.value)
    assert len(message) < 400 and "for example" in message and repr(spec[:10])[1:-1] in message


def test_halves_need_two_layers():
    for spec in ("yoco", "fusedkv", "fusedkv-lite"):
        with pytest.raises(PlanError, match="needs 2 layers"):
            Plan.parse(spec, 1)


def test_drawing_marks_every_read():
    rows = draw(Plan.parse("fusedkv-lite", 4)).splitlines()
    assert [row.split()[:6] for row in rows[1:]] == [
        ["3", "v", "k", ".", ".", "-"],
        ["2", "v", "k", ".", ".", "-"],
        ["1", ".", "KV", ".", ".", "KV"],
        ["0", "KV", ".", ".", ".", "KV"],
    ]
    assert "last layer" in rows[3]


def test_router_is_a_pure_function_of_seed_and_step():
    a, b = StochasticRouter(8, 0.5, seed=1), StochasticRouter(8, 0.5, seed=1)
    forwards = [a.plan(step) for step in range(50)]
    assert forwards == [b.plan(step) for step in reversed(range(50))][::-1]
    assert forwards != [StochasticRouter(8, 0.5, seed=2).plan(step) for step in range(50)]
    assert len(set(forwards)) > 40
    code = "from kv_router import *; print(StochasticRouter(8, 0.5, seed=1).plan(7).spec)"
    other = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == forwards[7].spec  # another process, another hash seed


def test_router_draws_among_the_routes_of_its_plan():
    """Every layer follows its own route or that of a lower layer, drawn as with the full plan."""
    full, base = StochasticRouter(8, 0.5, seed=1), Plan.parse("shared-v", 8)
    for step in range(50):
        read = [r.k[0] for r in full.plan(step).routes]
        routed = StochasticRouter(8, 0.5, seed=1, base="shared-v").plan(step)
        assert routed.routes == tuple(base[j] for j in read) and routed.v_layers == (0,)
    for spec in ("fusedkv", "pizza-top:2"):
        with pytest.raises(PlanError, match="iterates or fuses"):
            StochasticRouter(8, 0.5, base=spec)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_router_draws_with_the_papers_frequencies(p):
    """Every cell (layer reads source) and every pair of neighbours keeping their own is a binomial count.
    With the bound below, a right router and a random seed would fail this test once in a million."""
    n_layer, draws = 8, 20_000
    cells, both = Counter(), Counter()
    for step in range(draws):
        plan = StochasticRouter(n_layer, p, seed=3).plan(step)
        assert all(r.k == r.v and len(r.k) == 1 for r in plan.routes) and not plan.cyclic
        read = [r.k[0] for r in plan.routes]
        cells.update(enumerate(read))
        both.update(i for i in range(1, n_layer - 1) if read[i] == i and read[i + 1] == i + 1)
    assert cells[0, 0] == draws
    expected = {(i, j): 1 - p if i == j else p / i for i in range(1, n_layer) for j in range(i + 1)}
    tests = [(cells[key], q) for key, q in expected.items()]
    tests += [(both[i], (1 - p) ** 2) for i in range(1, n_layer - 1)]
    bound = NormalDist().inv_cdf(1 - 1e-6 / 2 / len(tests))
    for count, q in tests:
        assert abs(count - draws * q) < bound * (draws * q * (1 - q)) ** 0.5


def test_router_without_chance():
    assert StochasticRouter(6, 0.0).plan(5).spec == "full"
    assert all(r.k[0] < i for i, r in enumerate(StochasticRouter(6, 1.0).plan(5).routes) if i)
    for p in (-0.1, 1.5):
        with pytest.raises(PlanError, match="not a probability"):
            StochasticRouter(6, p)


def test_the_rule_of_the_router_can_be_replaced():
    def nearest_below(rng, base, p, lowest):
        return [base[i - 1] if i > lowest and rng.random() < p else base[i] for i in range(len(base))]

    always, often = (StochasticRouter(6, p, 1, "shared-v", 1, nearest_below) for p in (1, 0.5))
    assert always.plan(4) == Plan.parse("0_k1v0_k1v0_k2v0_k3v0_k4v0", 6)
    assert often.plan(3) == often.plan(3) and len({often.plan(step) for step in range(20)}) > 5
    reads_above = StochasticRouter(3, 0.5, rule=lambda rng, base, p, lowest: [base[2], base[1], base[2]])
    assert reads_above.plan(0) == Plan.parse("2_1_2", 3)


def test_costs_of_a_plan_worked_by_hand():
    shape = GPTConfig(vocab_size=100, n_layer=4, n_head=2, n_kv_head=1, n_embd=8, n_hidden=16)  # head_dim 4
    full, fused = (costs(Plan.parse(spec, 4), shape, context=10) for spec in ("full", "fusedkv"))
    # 4 layers x (K and V) x 4 features x 2 bytes, and half of them
    assert (full.cache_bytes_per_token, fused.cache_bytes_per_token) == (64, 32)
    layer = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16 + 2 * 8  # q, k and v, o, MLP, two norms
    assert full.params == 4 * layer + 8 + 100 * 8
    assert fused.params == full.params - 2 * (2 * 8 * 4) + 2 * (2 * 2 + 2 * 4)  # projections go, gates come
    # each step reads the weights and, per layer, its sources' 10 positions of 4 features
    assert full.decode_bytes == 2 * (full.params + 4 * 2 * 10 * 4)
    assert fused.decode_bytes == 2 * (fused.params + (2 * 2 + 2 * 4) * 10 * 4)
    # prefill: below the last full layer everything sees all 10 positions; in it only K and V
    kv, rest, attend = 2 * 2 * 8 * 4, 2 * (2 * 8 * 8 + 3 * 8 * 16), 4 * 8
    row = 10 * attend
    assert full.prefill_flops == 3 * (10 * (kv + rest) + 55 * attend) + 10 * kv + rest + row + 2 * 800
    assert (
        fused.prefill_flops
        == (10 * (kv + rest) + 55 * attend) + 10 * kv + rest + row + 2 * (rest + 2 * row) + 2 * 800
    )


def test_importing_plans_needs_no_tensors():
    code = "import sys, kv_router, support.costs; print({'torch', 'numpy'} & set(sys.modules) != set())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def kv_router_cli(*args):
    return subprocess.run([sys.executable, "kv_router.py", *args], cwd=ROOT, capture_output=True, text=True)


def test_command_line_draws_and_costs():
    done = kv_router_cli("fusedkv", "--n_layer", "8")
    assert (
        done.returncode == 0
        and "50.0% of the full cache" in done.stdout
        and "prefill of one prompt" in done.stdout
    )
    assert "cyclic" in kv_router_cli("sandwich-top:3", "--n_layer", "8").stdout


@pytest.mark.parametrize(
    "args", [("nope",), ("full", "--n_layer", "0"), ("full", "--context", "0"), ("full", "--foo"), ()]
)
def test_command_line_refuses_in_one_line(args):
    done = kv_router_cli(*args)
    assert done.returncode == 2 and not done.stdout and len(done.stderr.splitlines()) == 1
