"""Score checkpoints under many sharing plans on the same held-out windows; draw cache size against loss.

python sweep.py --out_dir out/normal out/stochastic out/fusedkv
python sweep.py --out_dir out/stochastic --plans full cla:2 keep:0,1,6 fusedkv-lite
python sweep.py --out_dir out/normal --search
"""

import heapq
import io
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np

import data
from cli import Parser, Progress, UserError, first_line, replace_file, run, sealed
from kv_router import Plan, PlanError, costs, human
from model import GPT
from train import bits_per_byte, load_run, pick_device, window_losses


def ladder(n_layer: int) -> list[str]:
    """The plans that show how loss depends on cache size: evenly spread kept layers from all to one, and the
    two half-cache plans that store the lower half."""
    kept = dict.fromkeys(max(1, round(n_layer * share)) for share in (1, 0.75, 0.5, 0.25, 0.125))
    specs = [f"lasagna-bottom:{n}" for n in kept] + (["yoco", "fusedkv-lite"] if n_layer > 1 else [])
    return list(dict.fromkeys(Plan.parse(spec, n_layer).spec for spec in specs))


def search(model: GPT, tokens: data.Tokens, windows: int, batch_size: int) -> list[tuple[Plan, float]]:
    """A good plan for every cache size, and its loss on windows of `tokens`: start from all caches, again and
    again drop the K or the V whose loss hurts least, and let the best of the stored layers below stand in.

    What a drop cost before mostly bounds what it costs now from below, so only drops whose old cost is still
    the lowest are looked at again: a few evaluations a step, not one per stored tensor."""

    def loss(plan: Plan) -> float:
        return float(window_losses(model, tokens, windows, batch_size, plan).mean())

    def stored_below(plan: Plan, kind: str, layer: int) -> list[int]:
        return [j for j in (plan.k_layers if kind == "k" else plan.v_layers) if j < layer]

    def drop(plan: Plan, kind: str, layer: int, source: int) -> Plan:
        """All readers of this layer's K (or V) read `source`'s."""
        moved = (replace(r, **{kind: (source,)}) if getattr(r, kind) == (layer,) else r for r in plan.routes)
        return Plan(tuple(moved))

    path = [(model.plan, loss(model.plan))]
    queue = [(0.0, 0, kind, layer) for kind in "kv" for layer in range(1, len(model.plan))]
    progress = Progress("searching", len(queue))
    while queue:
        plan = path[-1][0]
        cost, known_at, kind, layer = heapq.heappop(queue)
        below = stored_below(plan, kind, layer)
        if known_at < len(path):
            heapq.heappush(queue, (loss(drop(plan, kind, layer, below[-1])), len(path), kind, layer))
            continue
        others = [(loss(p), p) for p in (drop(plan, kind, layer, j) for j in below[:-1])]
        best = min([(cost, drop(plan, kind, layer, below[-1])), *others], key=lambda pair: pair[0])
        path.append((best[1], best[0]))
        progress(len(path) - 1, f"{best[1].cache_ratio:.1%} of the cache")
    return path


def auto_plan(spec: str, out_dir: str) -> str:
    """'auto:0.5' -> the best plan that `sweep.py --search` found for that run within half the cache; any
    other spec stays as it is."""
    name, _, share = spec.partition(":")
    if name != "auto":
        return spec
    try:
        limit = float(share)
    except ValueError as e:
        raise UserError(
            f"plan {spec!r}: {share!r} is not a share of the full cache, for example auto:0.5"
        ) from e
    path, again = Path(out_dir) / "search.jsonl", f"python sweep.py --out_dir {out_dir} --search"
    if not path.exists():
        raise UserError(f"plan {spec!r}: none were searched for this run; {again}")
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        checksums = {row.pop("checksum", None) for row in rows}
        if checksums not in ({None}, {sealed({"rows": rows})["checksum"]}):
            raise ValueError("rows are missing or changed")
        found = [(float(r["calibration_loss"]), float(r["cache_ratio"]), str(r["plan"])) for r in rows]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise UserError(f"{path} is damaged ({first_line(e)}); {again}") from e
    fits = [row for row in found if row[1] <= limit]
    if not fits:
        smallest = min(ratio for _, ratio, _ in found)
        raise UserError(
            f"plan {spec!r}: the smallest cache found is {smallest:.4g} of the full one; ask for more"
        )
    return min(fits)[2]


def score(
    runs: dict[str, GPT],
    tokens: data.Tokens,
    specs: list[str] | None,
    windows: int,
    batch_size: int,
    found: dict[str, list[Plan]],
) -> list[dict]:
    """One row per run and plan: by default the ladder for a model that computes every layer's KV, and for one
    built for a plan that plan. `delta` is the loss above `full` on the same windows, of the same run or,
    where a run has no full cache, of the first that has; `delta_stderr` its paired standard error. `found`:
    further plans of single runs."""
    todo, lacking = [], []
    for name, model in runs.items():
        n_layer, built = model.config.n_layer, model.plan.spec
        default = ladder(n_layer) if built == "full" else [built]
        plans = [Plan.parse(spec, n_layer) for spec in (specs or default)]
        if built == "full":
            plans = [model.plan] + [p for p in plans if p != model.plan]  # the reference of `delta`
        for plan in dict.fromkeys(plans + found.get(name, [])):
            try:
                todo.append((name, model.resolve(plan)))
            except PlanError as e:
                lacking.append(e)
    if lacking and (len(runs) == 1 or len(lacking) == len(runs) * len(specs)):
        raise lacking[0]
    for e in lacking:
        print(f"left out: {e}")
    progress = Progress("scoring", len(todo))
    losses, rows = {}, []
    for name, plan in todo:
        progress(len(losses), f"{name} {plan.spec}")
        losses[name, plan.spec] = window_losses(runs[name], tokens, windows, batch_size, plan)
    progress(len(todo))
    first_full = next((key for key in losses if key[1] == "full"), None)
    for name, plan in todo:
        model, own = runs[name], losses[name, plan.spec]
        cost = costs(plan, model.config, bytes_per_value=model.embed.weight.itemsize)
        loss = float(own.mean())
        row = {
            "run": name, "plan": plan.spec, "cache_ratio": plan.cache_ratio,
            "cache_bytes_per_token": cost.cache_bytes_per_token,
            "loss": loss, "loss_stderr": stderr(own), "bpb": bits_per_byte(loss, tokens),
            "tokens": own.size * tokens.block_size,
        }  # fmt: skip
        reference = (name, "full") if (name, "full") in losses else first_full
        if reference:
            paired = own - losses[reference]
            row |= {
                "delta": float(paired.mean()),
                "delta_stderr": stderr(paired),
                "delta_to": " ".join(reference),
            }
        rows.append(row)
    return rows


def stderr(x: np.ndarray) -> float:
    return float(x.std(ddof=1) / len(x) ** 0.5) if len(x) > 1 else float("nan")


def table(rows: list[dict]) -> str:
    a, b = (max(len(key), *(len(r[key]) for r in rows)) for key in ("run", "plan"))
    lines = [
        f"{'run':{a}}  {'plan':{b}}  {'cache':>6} {'B/token':>8} {'loss':>7} {'bits/byte':>10}  above full"
    ]
    for r in rows:
        line = f"{r['run']:{a}}  {r['plan']:{b}}  {r['cache_ratio']:6.1%} "
        line += f"{human(r['cache_bytes_per_token']):>8} {r['loss']:7.4f} {r['bpb']:10.4f}"
        if "delta" in r and r["delta_to"] != f"{r['run']} {r['plan']}":
            line += f"  {r['delta']:+.4f} +- {r['delta_stderr']:.4f}"
            line += "" if r["delta_to"].startswith(r["run"] + " ") else f" ({r['delta_to']})"
        lines.append(line)
    return "\n".join(lines)


def pareto(rows: list[dict]) -> list[dict]:
    """The rows that no other beats in both cache size and loss, by ascending cache size."""
    front = []
    for r in sorted(rows, key=lambda r: (r["cache_bytes_per_token"], r["loss"])):
        if not front or r["loss"] < front[-1]["loss"]:
            front.append(r)
    return front


# Lines differ by marker and dash as well as by colour, so that a grey print reads too.
LOOKS = [
    ("o", "-", "#1b5e9b"),
    ("s", "--", "#d1601f"),
    ("D", "-.", "#2b8a4b"),
    ("^", ":", "#7b3fa0"),
    ("v", (0, (5, 1)), "#8c6d1f"),
    ("P", (0, (3, 1, 1, 1)), "#b0305c"),
    ("X", (0, (1, 1)), "#444444"),
]


def draw(rows: list[dict], path: Path) -> None:
    """One line per run along its own Pareto front, hollow marks for its other plans, rings for the front of
    all runs together."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    full = max(r["cache_bytes_per_token"] / r["cache_ratio"] for r in rows)
    fig, ax = plt.subplots(figsize=(8, 5), dpi=150)
    for i, name in enumerate(dict.fromkeys(r["run"] for r in rows)):
        marker, dash, colour = LOOKS[i % len(LOOKS)]
        own = [r for r in rows if r["run"] == name]
        front = pareto(own)
        x, y = ([r[k] for r in front] for k in ("cache_bytes_per_token", "loss"))
        ax.plot(
            x,
            y,
            marker=marker,
            linestyle=dash,
            color=colour,
            label=name,
            linewidth=1.8,
            markersize=6,
            zorder=3,
        )
        for r in own:
            point = (r["cache_bytes_per_token"], r["loss"])
            if r not in front:
                ax.plot(
                    *point, marker=marker, mfc="white", mec=colour, markersize=6, linestyle="none", zorder=2
                )
            if r.get("delta_stderr"):
                ax.errorbar(*point, yerr=r["delta_stderr"], color=colour, capsize=2, linewidth=1, zorder=2)
    front = pareto(rows)
    x, y = ([r[k] for r in front] for k in ("cache_bytes_per_token", "loss"))
    ax.plot(x, y, "o", ms=13, mfc="none", mec="black", mew=1, zorder=4, label="best for its cache size")
    ax.set_xlim(0, full * 1.05)
    ticks = [0.125, 0.25, 0.5, 0.75, 1.0]
    ax.set_xticks([full * t for t in ticks], [f"{100 * t:.4g}%" for t in ticks])
    ax.set_xlabel("KV cache, percent of a full one")
    ax.set_ylabel("held-out loss, nats per token")
    top = ax.secondary_xaxis("top")
    top.set_xticks([full * t for t in ticks], [f"{full * t:,.0f}" for t in ticks])
    top.set_xlabel("KV cache, bytes per token")
    ax.grid(alpha=0.25)
    ax.legend(frameon=False)
    fig.tight_layout()
    content = io.BytesIO()
    fig.savefig(content, format="png")
    replace_file(path, content.getbuffer())
    plt.close(fig)


def write_lines(rows: list[dict], path: Path) -> None:
    replace_file(path, "".join(json.dumps(r) + "\n" for r in rows).encode())


def load_runs(
    folders: list[str], device: str, data_dir: str | None = None
) -> tuple[dict[str, GPT], data.Tokens]:
    """The models, named by their folders, and the held-out text that all of them were trained beside."""
    runs, tokens = {}, None
    for folder in folders:
        model, config = load_run(folder, device)
        name = os.path.basename(os.path.abspath(folder))
        if name in runs:
            raise UserError(f"--out_dir names two runs {name!r}; rename a folder to tell them apart")
        corpus = Path(data_dir or config.data_dir) / config.dataset
        found = data.Tokens(corpus, "val", model.config.block_size)
        if data.read_meta(Path(folder)).get("val") != found.meta["val"]:
            raise UserError(
                f"{corpus} is not the corpus that {folder} was trained on; make that again: python data.py"
            )
        if tokens and (found.meta["val"], found.block_size) != (tokens.meta["val"], tokens.block_size):
            raise UserError(
                f"{folder} differs from {folders[0]} in corpus or block_size, so their losses do not "
                "compare; sweep it apart"
            )
        runs[name], tokens = model, tokens or found
    return runs, tokens


def main():
    parser = Parser(__doc__)
    parser.add_argument("--out_dir", nargs="+", required=True, metavar="RUN", help="the runs to compare")
    parser.add_argument(
        "--plans",
        nargs="+",
        metavar="SPEC",
        help="plans to score [kept layers from all to one, yoco, fusedkv-lite]",
    )
    parser.add_argument(
        "--windows", type=int, default=128, help="held-out windows of the context length [128]"
    )
    parser.add_argument("--batch_size", type=int, default=16, help="windows at a time [16]")
    parser.add_argument(
        "--save_dir", help="where sweep.jsonl and the picture go [the run's folder, or that around several]"
    )
    parser.add_argument(
        "--search", action="store_true", help="find good plans for every cache size on training text"
    )
    parser.add_argument("--data_dir", help="where tokenized corpora live [as in training]")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... [auto]")
    args = parser.parse_args()
    if min(args.windows, args.batch_size) < 1:
        raise UserError("--windows and --batch_size must be 1 or more")
    runs, tokens = load_runs(args.out_dir, pick_device(args.device), args.data_dir)
    around = os.path.commonpath([os.path.abspath(path) for path in args.out_dir])
    folder = Path(args.save_dir or os.path.relpath(around))
    found = {}
    for path, (name, model) in zip(args.out_dir, runs.items()) if args.search else ():
        if model.plan.spec != "full":
            raise UserError(f"--search starts from all caches, and {path} was built for {model.plan.spec!r}")
        train = data.Tokens(tokens.path.parent, "train", model.config.block_size)  # not what is scored
        plans = search(model, train, args.windows // 4 or 1, args.batch_size)
        rows = [{"plan": p.spec, "cache_ratio": p.cache_ratio, "calibration_loss": loss} for p, loss in plans]
        checksum = sealed({"rows": rows})["checksum"]  # in every row, so that a lost one is missed
        write_lines([row | {"checksum": checksum} for row in rows], Path(path) / "search.jsonl")
        found[name] = [plan for plan, _ in plans]
    rows = score(runs, tokens, args.plans, args.windows, args.batch_size, found)
    print(table(rows))
    folder.mkdir(parents=True, exist_ok=True)
    write_lines(rows, folder / "sweep.jsonl")
    draw(rows, folder / "cache_vs_loss.png")
    print(f"wrote {folder / 'sweep.jsonl'} and {folder / 'cache_vs_loss.png'}")


if __name__ == "__main__":
    run(main)
