"""Score checkpoints under many sharing plans on the same held-out windows, and draw cache size against loss.

python sweep.py --out_dir out/normal out/stochastic out/fusedkv
python sweep.py --out_dir out/stochastic --plans full cla:2 keep:0,1,6 fusedkv-lite
python sweep.py --out_dir out/normal --search
python sweep.py --out_dir out/normal out/stochastic --curves

--search finds good plans for every cache size, --curves draws the losses that training has logged.
"""

import heapq
import math
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import data
from kv_router import Plan, PlanError
from model import GPT
from support import cli
from support.cli import (
    Parser,
    Progress,
    UserError,
    at_least,
    first_line,
    human,
    quote,
    read_json,
    table,
    user_path,
    write_lines,
)
from support.convert import reading_errors
from support.costs import costs
from support.devices import autocast, pick_device, pick_dtype
from support.hf import check_tokenizer, load, results_folder
from support.plots import label_percentages, line, picture, style
from support.runs import fingerprint, window_losses

import numpy as np
import torch

# --- plans to look at -------------------------------------------------------------------------------------


def spread(n_layer: int, n_kept: int, lowest: int = 0) -> list[int]:
    """Evenly spread layers to keep, layer 0 among them. With `lowest`, all below that layer, which nothing
    above learned to read, and at least one more, even if that makes more than n_kept."""
    others = n_layer - lowest
    kept = max(1, n_kept - lowest)
    return [*range(lowest), *(lowest + group * others // kept for group in range(kept))]


def sharing(base: Plan, kept: list[int]) -> Plan:
    """The plan in which every layer follows the route that the nearest kept layer below has in `base`."""
    return Plan(tuple(base[max(j for j in kept if j <= i)] for i in range(len(base))))


def ladder(model: GPT) -> list[str]:
    """The plans that show how a model's loss depends on cache size. Where every layer has keys of its own:
    evenly spread kept layers, from all to one, the others following the nearest kept layer below; and for
    the plan `full` the two half-cache plans that store the lower half."""
    built, n_layer = model.plan, len(model.plan)
    if any(route.k != (i,) for i, route in enumerate(built.routes)):
        return [built.spec]
    specs = []
    for share in (1, 0.75, 0.5, 0.25, 0.125):
        kept = spread(n_layer, max(1, round(n_layer * share)), model.config.router_lowest)
        specs.append(sharing(built, kept).spec)
    if built.spec == "full" and n_layer > 1:
        specs += [Plan.parse(spec, n_layer).spec for spec in ("yoco", "fusedkv-lite")]
    return list(dict.fromkeys(specs))


def search(start: Plan, loss: Callable[[Plan], float], lowest: int = 0) -> list[tuple[Plan, float]]:
    """A good plan for every cache size, with its loss, from `start` down: again and again drop the K or the V
    whose loss hurts least, and let the best of the stored layers below stand in for it. K of layer `lowest`
    and below stay: no layer learned to do without them.

    Lazy greedy: costs rarely fall as more is dropped, so old ones serve as lower bounds. Drops wait in the
    order of their last known cost, and only as many are evaluated again as it takes to find one that still
    costs least: a few per step, not one per stored tensor."""
    # The same plan is met again and again, from different drops.
    loss = cache(loss)
    path = [(start, loss(start))]
    queue = [(-math.inf, "k", layer) for layer in start.k_layers if layer > max(start.k_layers[0], lowest)]
    queue += [(-math.inf, "v", layer) for layer in start.v_layers if layer > start.v_layers[0]]
    heapq.heapify(queue)
    progress = Progress("searching", len(queue))
    while queue:
        plan = path[-1][0]
        _, kind, layer = heapq.heappop(queue)
        stored = plan.k_layers if kind == "k" else plan.v_layers
        # The nearest stored layer below is most alike, so it is tried first, and alone decides the order.
        *others, nearest = [drop(plan, kind, layer, source) for source in stored if source < layer]
        # Another drop may cost less by now: put this one back with its new cost.
        if queue and loss(nearest) > queue[0][0]:
            heapq.heappush(queue, (loss(nearest), kind, layer))
            continue
        best = min([nearest, *others], key=loss)
        # The cheapest drop: choose the source that serves its readers best.
        path.append((best, loss(best)))
        progress(len(path) - 1, f"{best.cache_ratio:.1%} of the cache")
    return path


def drop(plan: Plan, kind: str, layer: int, source: int) -> Plan:
    """`plan`, but those that read `layer`'s K (kind "k") or V (kind "v") read that of `source`."""
    moved = []
    for route in plan.routes:
        moved.append(replace(route, **{kind: (source,)}) if getattr(route, kind) == (layer,) else route)
    return Plan(tuple(moved))


def auto_plan(spec: str, out_dir: str, model: GPT) -> str:
    """'auto:0.5' -> the best plan that `sweep.py --search` found for that run within half the cache. Any
    other spec stays as it is. UserError where nothing was searched, or nothing fits; a line on standard
    error where the search had other weights."""
    name, _, share = spec.partition(":")
    if name != "auto":
        return spec
    if out_dir.startswith("hf:"):
        raise UserError(f"plan {spec!r} is for runs; take a plan itself, from the search.jsonl of --save_dir")
    path, again = Path(out_dir) / "search.jsonl", f"python sweep.py --out_dir {quote(out_dir)} --search"
    rows = read_json(path, again, lines=True)
    try:
        limit = float(share)
        plans = [Plan.parse(row["plan"], len(model.plan)) for row in rows]
        found = [(float(row["calibration_loss"]), plan, row) for plan, row in zip(plans, rows)]
        fits = [row for row in found if row[1].cache_ratio <= limit and math.isfinite(row[0])]
        if not fits:
            raise ValueError(
                f"the smallest cache found is {min(p.cache_ratio for p in plans):.4g} of the full one"
            )
        loss, plan, row = min(fits, key=lambda fit: fit[0])
    except (ValueError, KeyError, TypeError, OverflowError) as e:
        raise UserError(
            f"plan {spec!r} takes one from {path} ({first_line(e)}); search again: {again}"
        ) from e
    # A plan found for other weights is still a plan: it is used, but not silently.
    if row.get("weights") != fingerprint(model):
        note = f"was searched at step {row.get('step')}, with other weights; search again: {again}"
        print(f"{path}: {plan.spec} {note}", file=sys.stderr)
    return plan.spec


def choose(
    runs: dict[str, GPT],
    folders: list[str],
    specs: list[str] | None,
    found: dict[str, list[Plan]] | None = None,
) -> list[tuple[str, Plan]]:
    """The runs and plans to score: the plans asked for, or the ladder of each run; always `full` where a run
    has it, to compare with; and those `found` for single runs. A plan that a run cannot have is left out with
    a line, or raises its PlanError where no run has it."""
    todo, lacking, had = [], [], set()
    for folder, (name, model) in zip(folders, runs.items()):
        plans = [model.plan] if model.plan.spec == "full" else []
        for spec in ladder(model) if specs is None else specs:
            try:
                plans.append(model.resolve(auto_plan(spec, folder, model)))
                had.add(spec)
            except PlanError as e:
                lacking.append((spec, e))
        # No plan twice, in the order asked for.
        todo += [(name, plan) for plan in dict.fromkeys(plans + (found or {}).get(name, []))]
    for spec, e in lacking:
        if spec not in had:
            raise e
        print(f"left out: {e}")
    return todo


# --- scores -----------------------------------------------------------------------------------------------


def score(
    runs: dict[str, GPT], todo: list[tuple[str, Plan]], tokens: data.Tokens, measure: Callable
) -> list[dict]:
    """One row per run and plan, from measure(model, plan), the losses of windows of `tokens`. `delta` is the
    loss above `full` on the same windows, of the same run or, where that has no full cache, of the first that
    has; `delta_stderr` is its standard error, paired by window."""
    losses, rows = {}, []
    progress = Progress("scoring", len(todo))
    for name, plan in todo:
        progress(len(losses), f"{name} {plan.spec}")
        losses[name, plan.spec] = measure(runs[name], plan)
    progress(len(todo))
    first_full = next((key for key in losses if key[1] == "full"), None)
    for name, plan in todo:
        model, own = runs[name], losses[name, plan.spec]
        cost = costs(plan, model.config, bytes_per_value=model.embed.weight.itemsize)
        loss = float(own.mean())
        row = {
            "run": name, "plan": plan.spec, "cache_ratio": plan.cache_ratio,
            "cache_bytes_per_token": cost.cache_bytes_per_token,
            "loss": loss, "loss_stderr": stderr(own), "bpb": tokens.bits_per_byte(loss),
            "tokens": own.size * tokens.block_size,
        }  # fmt: skip
        reference = (name, "full") if (name, "full") in losses else first_full
        if reference:
            paired = own - losses[reference]
            row |= {"delta": float(paired.mean()), "delta_stderr": stderr(paired)}
            row["delta_to"] = " ".join(reference)
        rows.append(row)
    return rows


def stderr(x: np.ndarray) -> float:
    """The standard error of the mean."""
    return float(x.std(ddof=1) / len(x) ** 0.5) if len(x) > 1 else float("nan")


def score_table(rows: list[dict]) -> str:
    """The rows of sweep.jsonl as a table; in brackets the run that a loss is compared with, if not its
    own."""
    lines = [["run", "plan", "cache", "B/token", "loss", "bits/byte", "above full", ""]]
    for r in rows:
        above = note = ""
        if "delta" in r and r["delta_to"] != f"{r['run']} {r['plan']}":
            above = f"{r['delta']:+.4f} +- {r['delta_stderr']:.4f}"
            note = "" if r["delta_to"].startswith(r["run"] + " ") else f"({r['delta_to']})"
        size = human(r["cache_bytes_per_token"])
        line = [r["run"], r["plan"], f"{r['cache_ratio']:.1%}", size, f"{r['loss']:.4f}", f"{r['bpb']:.4f}"]
        lines.append(line + [above, note])
    return table(lines, left=2)


def pareto(rows: list[dict]) -> list[dict]:
    """The rows that no other beats in both cache size and loss, by ascending cache size."""
    front = []
    for row in sorted(rows, key=lambda row: (row["cache_bytes_per_token"], row["loss"])):
        if not front or row["loss"] < front[-1]["loss"]:
            front.append(row)
    return front


# --- pictures ---------------------------------------------------------------------------------------------


def draw(rows: list[dict], path: Path) -> None:
    """Loss over cache size: a line per run along the best of its plans, hollow marks for its other plans, and
    rings around the best of all runs together."""
    full = max(row["cache_bytes_per_token"] / row["cache_ratio"] for row in rows)
    shares = (0.125, 0.25, 0.5, 0.75, 1.0)

    def points(rows: list[dict]) -> tuple[list, list]:
        return [row["cache_bytes_per_token"] for row in rows], [row["loss"] for row in rows]

    with picture(path, width=7, height=5) as ax:
        for i, name in enumerate(dict.fromkeys(row["run"] for row in rows)):
            own = [row for row in rows if row["run"] == name]
            best = pareto(own)
            line(ax, *points(best), i, name)
            marker, _, colour = style(i)
            others = [row for row in own if row not in best]
            ax.plot(*points(others), marker=marker, mfc="white", mec=colour, linestyle="none", zorder=2)
        ax.plot(*points(pareto(rows)), "o", ms=13, mfc="none", mec="black", label="best for its cache size")
        ax.set_xlim(0, full * 1.05)
        label_percentages(ax, shares, full)
        ax.set(
            xlabel=f"KV cache, percent of {full:,.0f} bytes per token", ylabel="held-out loss, nats per token"
        )


def draw_curves(folders: list[str], path: Path) -> None:
    """The losses that runs have logged, over steps, tokens and time: lines with marks on held-out text, faint
    lines on the training text."""
    scales = {"step": (1, "steps"), "tokens": (1e6, "tokens, millions"), "time": (60, "time, minutes")}
    with picture(path, columns=3, sharey=True) as axes:
        for i, folder in enumerate(folders):
            log = read_json(Path(folder) / "log.jsonl", "--curves takes the folders of runs", lines=True)
            for ax, (key, (scale, label)) in zip(axes, scales.items()):
                for loss in ("train_loss", "val_loss"):
                    rows = [row for row in log if loss in row and row.get("step", 0) > 0]
                    x, y = [row.get(key, 0) / scale for row in rows], [row[loss] for row in rows]
                    if loss == "train_loss":
                        ax.plot(x, y, color=style(i)[2], linewidth=0.8, alpha=0.3)
                    else:
                        line(ax, x, y, i, os.path.basename(os.path.abspath(folder)))
                ax.set_xlabel(label)
        axes[0].set_ylabel("loss, nats per token")


# --- the command line -------------------------------------------------------------------------------------


def run_name(folder: str, others: dict) -> str:
    """What a folder is called in tables: its last part."""
    name = os.path.basename(os.path.abspath(folder.removeprefix("hf:")))
    if name in others:
        raise UserError(f"--out_dir names two runs {name!r}; rename a folder to tell them apart")
    return name


def load_runs(
    folders: list[str],
    device: str,
    data_dir: str | None = None,
    dataset: str | None = None,
    block_size: int | None = None,
) -> tuple[dict[str, GPT], data.Tokens, list[SimpleNamespace]]:
    """The models, named by their folders, the held-out text, which must be the same for all of them, and
    their settings. UserError where the runs differ in corpus or context."""
    runs, tokens, settings = {}, None, []
    for folder in folders:
        model, config = load(folder, device, block_size)
        name = run_name(folder, runs)
        if not (dataset or config.dataset):
            raise UserError(f"{folder} needs --dataset NAME, a corpus of its own tokenizer (python data.py)")
        corpus = Path(data_dir or config.data_dir) / (dataset or config.dataset)
        context = model.config.block_size
        found = data.Tokens(corpus, "val", min(block_size or context, context))
        if folder.startswith("hf:"):
            check_tokenizer(folder[3:], model, corpus)
        elif data.read_meta(Path(folder)).get("val") != found.meta["val"]:
            raise UserError(
                f"{corpus} is not the corpus that {folder} was trained on; make that again: python data.py"
            )
        # Losses over different text, or windows of other lengths, cannot stand in one picture.
        if tokens and (found.meta["val"], found.block_size) != (tokens.meta["val"], tokens.block_size):
            raise UserError(
                f"{folder} differs from {folders[0]} in corpus or block_size, so their losses cannot be "
                "compared; sweep it on its own"
            )
        runs[name], tokens = model, tokens or found
        settings.append(config)
    return runs, tokens, settings


def search_and_save(
    folder: str, model: GPT, step: int, loss: Callable[[Plan], float], path: Path
) -> list[Plan]:
    """The plans found for a run or a Hugging Face folder; they go to `path`, for a run the search.jsonl where
    `auto:` finds them, with the step and the weights that they were found for."""
    if model.plan.cyclic or any(len(route.k + route.v) > 2 for route in model.plan.routes):
        built = f"{folder} was built for {model.plan.spec!r}, which iterates or fuses"
        raise UserError(f"--search moves what layers read from one layer to another, and {built}")
    found = search(model.plan, loss, model.config.router_lowest)
    about = {"step": step, "weights": fingerprint(model)}
    rows = [
        {"plan": p.spec, "cache_ratio": p.cache_ratio, "calibration_loss": loss} | about for p, loss in found
    ]
    write_lines(rows, path)
    return [plan for plan, _ in found]


def by_reading_errors(model: GPT, idx: torch.Tensor) -> Callable[[Plan], float]:
    """A stand-in for the loss of a pretrained model, which would say little before conversion: the sum of
    what every layer gets wrong, see `convert.reading_errors`, for plans without fusion."""
    errors = reading_errors(model, idx)

    def loss(plan: Plan) -> float:
        reads = [(i, kind, getattr(route, kind)[0]) for i, route in enumerate(plan.routes) for kind in "kv"]
        return sum(errors[read] for read in reads if read[0] != read[2])

    return loss


def arguments():
    parser = Parser(__doc__)
    add = parser.add_argument
    what = "runs to compare, or hf:FOLDER"
    add("--out_dir", type=user_path, nargs="+", required=True, metavar="RUN", help=what)
    add(
        "--plans",
        nargs="+",
        metavar="SPEC",
        help="plans to score; auto:0.5 is the best that --search found within half the cache "
        "[kept layers from all to one, yoco, fusedkv-lite]",
    )
    add("--windows", type=at_least(1), default=128, help="held-out windows [128]")
    add("--block_size", type=at_least(1), help="tokens of a window [the context of the models]")
    add("--batch_size", type=at_least(1), default=16, help="windows at a time [16]")
    add("--save_dir", type=user_path, help="where the results go [the run's folder, or that around several]")
    add("--search", action="store_true", help="find good plans for every cache size first")
    add("--curves", action="store_true", help="only draw the losses logged in training")
    add("--dataset", help="a corpus below --data_dir [as in training]")
    add("--data_dir", type=user_path, help="where tokenized corpora live [as in training]")
    add("--device", default="auto", help="cpu, cuda, ... [auto]")
    add("--dtype", choices=("auto", "float32", "bfloat16"), help="of matrix products [as in training]")
    return parser.parse_args()


def main():
    args = arguments()
    folder = results_folder(args.save_dir, args.out_dir)
    if args.curves:
        draw_curves(args.out_dir, folder / "curves.png")
        print(f"wrote {folder / 'curves.png'}")
        return
    # Curves need no model; everything below does.
    device = pick_device(args.device, many_shapes=True)
    runs, tokens, settings = load_runs(args.out_dir, device, args.data_dir, args.dataset, args.block_size)
    dtype, _ = pick_dtype(args.dtype or settings[0].dtype, device)
    measure = partial(window_losses, batch_size=args.batch_size, context=partial(autocast, device, dtype))

    found = {}
    for path, config, (name, model) in zip(args.out_dir, settings, runs.items()):
        if not args.search:
            continue
        text, n = data.Tokens(tokens.path.parent, "train", tokens.block_size), args.windows // 4 or 1
        if path.startswith("hf:"):
            idx = torch.cat([x for x, _ in text.held_out(n, n)]).to(device)
            plans = search_and_save(path, model, 0, by_reading_errors(model, idx), folder / "search.jsonl")
            print(f"wrote {folder / 'search.jsonl'}; for --init_from={quote(path)}:")
            for share in (0.9, 0.75, 0.625, 0.5, 0.375, 0.25):
                plan = next(plan for plan in plans if plan.cache_ratio <= share)
                print(f"{plan.cache_ratio:.1%}  --plan={plan.spec}")
            return
        losses = partial(measure, model, text, n)
        found[name] = search_and_save(
            path,
            model,
            config.step,
            lambda plan, losses=losses: float(losses(plan=plan).mean()),
            Path(path) / "search.jsonl",
        )
    todo = choose(runs, args.out_dir, args.plans, found)
    rows = score(runs, todo, tokens, lambda model, plan: measure(model, tokens, args.windows, plan=plan))
    print(score_table(rows))
    write_lines(rows, folder / "sweep.jsonl")
    draw(rows, folder / "cache_vs_loss.png")
    print(f"wrote {folder / 'sweep.jsonl'} and {folder / 'cache_vs_loss.png'}")


if __name__ == "__main__":
    cli.run(main)
