"""Score checkpoints under many sharing plans on the same held-out windows; draw cache size against loss.

python sweep.py --out_dir out/normal out/stochastic out/fusedkv
python sweep.py --out_dir out/stochastic --plans full cla:2 keep:0,1,6 fusedkv-lite
python sweep.py --out_dir out/normal --search
python sweep.py --out_dir out/normal hf:FOLDER --plans full auto:0.5 --tasks arc_easy hellaswag

--tasks scores benchmarks in place of held-out text, through the package lm-eval.
"""

import heapq
import io
import json
import logging
import os
import random
import sys
from collections import defaultdict
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

import data
import kernels
from cli import Parser, Progress, UserError, first_line, replace_file, run, sealed, suggest
from hf import load_hf
from kv_router import Plan, PlanError, costs, human
from model import GPT
from train import bits_per_byte, load_run, pick_device, window_losses


def ladder(built: Plan) -> list[str]:
    """The plans that show how loss depends on cache size, for a model built for one: where every layer has
    its own K, evenly spread kept layers from all to one (another follows the nearest kept one below), and for
    `full` the two half-cache plans that store the lower half."""
    n_layer = len(built)
    if any(route.k != (i,) for i, route in enumerate(built.routes)):
        return [built.spec]
    kept = dict.fromkeys(max(1, round(n_layer * share)) for share in (1, 0.75, 0.5, 0.25, 0.125))
    sources = [[r.k[0] for r in Plan.parse(f"lasagna-bottom:{n}", n_layer).routes] for n in kept]
    specs = [Plan(tuple(built[j] for j in layers)).spec for layers in sources]
    specs += ["yoco", "fusedkv-lite"] if built.spec == "full" and n_layer > 1 else []
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


def choose(
    runs: dict[str, GPT], specs: list[str] | None, found: dict[str, list[Plan]]
) -> list[tuple[str, Plan]]:
    """The runs and plans to score: by default the ladder for a model that computes every layer's KV, and for
    one built for a plan that plan; always `full` where a run has it, to compare with. `found`: further plans
    of single runs. A plan that a run cannot have is left out with a line, or raises its PlanError where no
    other run has it."""
    todo, lacking = [], []
    for name, model in runs.items():
        n_layer, built = model.config.n_layer, model.plan.spec
        plans = [Plan.parse(spec, n_layer) for spec in (ladder(model.plan) if specs is None else specs)]
        if built == "full":
            plans = [model.plan] + [p for p in plans if p != model.plan]
        for plan in dict.fromkeys(plans + found.get(name, [])):
            try:
                todo.append((name, model.resolve(plan)))
            except PlanError as e:
                lacking.append(e)
    if lacking and (len(runs) == 1 or len(lacking) == len(runs) * len(specs)):
        raise lacking[0]
    for e in lacking:
        print(f"left out: {e}")
    return todo


def score(
    runs: dict[str, GPT],
    tokens: data.Tokens,
    todo: list[tuple[str, Plan]],
    windows: int,
    batch_size: int,
) -> list[dict]:
    """One row per run and plan. `delta` is the loss above `full` on the same windows, of the same run or,
    where a run has no full cache, of the first that has; `delta_stderr` its paired standard error."""
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


def run_name(folder: str, others: dict) -> str:
    name = os.path.basename(os.path.abspath(folder.removeprefix("hf:")))
    if name in others:
        raise UserError(f"--out_dir names two runs {name!r}; rename a folder to tell them apart")
    return name


def load_runs(
    folders: list[str], device: str, data_dir: str | None = None
) -> tuple[dict[str, GPT], data.Tokens]:
    """The models, named by their folders, and the held-out text that all of them were trained beside."""
    runs, tokens = {}, None
    for folder in folders:
        model, config = load_run(folder, device)
        name = run_name(folder, runs)
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


# --- benchmarks through lm-eval ---------------------------------------------------------------------------


def load_tasks(names: list[str], task_dir: str | None = None) -> dict:
    """lm-eval's tasks of these names, with the groups they form: from the yaml files below `task_dir` if all
    are there, else beside its own. UserError (one line) without lm-eval, for an unknown name and for a task
    whose data cannot be had."""
    try:
        import datasets
        import lm_eval.api.task
        from lm_eval.tasks import TaskManager
    except ImportError as e:
        raise UserError("--tasks needs the package lm-eval: pip install lm-eval") from e
    datasets.disable_progress_bars()
    lm_eval.api.task.tqdm = lambda docs, **_: docs  # a bar for every plan and task
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every default it takes
    if task_dir and not Path(task_dir).is_dir():
        raise UserError(f"--task_dir {task_dir} is not a folder")
    for builtin in (False, True) if task_dir else (True,):  # reading thousands of its own takes seconds
        manager = TaskManager(include_path=task_dir, include_defaults=builtin)
        unknown = [name for name in names if name not in manager.task_index]
        if not unknown:
            break
    if unknown:
        close = suggest(unknown[0], manager.all_tasks)
        raise UserError(f"--tasks: lm-eval has no task {unknown[0]!r}{close} (lm-eval ls tasks lists all)")
    try:
        return manager.load(names)
    except Exception as e:  # no network, no such file, a package that only this task needs
        raise UserError(f"--tasks {' '.join(names)}: {first_line(e)}") from e


def load_beside_tokenizers(folders: list[str], device: str) -> tuple[dict[str, GPT], dict]:
    """The models and their tokenizers, both named by their folders: runs, or as hf:FOLDER Hugging Face
    folders."""
    runs, encs = {}, {}
    for folder in folders:
        name, path = run_name(folder, runs), Path(folder.removeprefix("hf:"))
        if not folder.startswith("hf:"):
            model, enc = load_run(path, device)[0], data.load_tokenizer(path)
        else:
            model, own = load_hf(path).to(device), path / "tokenizer.tiktoken"  # hf.py copies a run's own
            if own.exists():
                enc = data.encoding(own.name, data.read_ranks(own))
            else:
                enc = data.JsonTokenizer(path / "tokenizer.json")
        if enc.n_vocab > model.config.vocab_size:
            raise UserError(f"the tokenizer in {path} has more tokens than its model; copy the right one")
        runs[name], encs[name] = model, enc
    return runs, encs


@torch.no_grad()
def continuations(
    model: GPT,
    plan: Plan,
    pairs: list[tuple[list[int], list[int]]],
    batch_size: int,
    tell: Callable[[float], None] = lambda share: None,
) -> list[tuple[float, bool]]:
    """For every pair of a context and a continuation, token ids, at least one each: the continuation's
    log-likelihood in nats, and whether greedy decoding would give it. Contexts are cut from the left to fit
    block_size; a continuation that does not fit raises UserError. Cyclic plans iterate until exact.

    Sequences of similar length run together, padded on the right, which causal attention never sees; the
    (B, T, vocab) logits never exist, only some continuation positions' at a time."""
    room, device = model.config.block_size, model.embed.weight.device
    rows = defaultdict(list)  # input -> the pairs that it answers: choices of one token share theirs
    for i, (context, continuation) in enumerate(pairs):
        if not 0 < len(continuation) <= room:
            raise UserError(
                f"a task has a continuation of {len(continuation)} tokens, and this model scores 1 to {room}"
            )
        rows[tuple((context + continuation)[-room - 1 : -1])].append(i)
    inputs, results = sorted(rows, key=len, reverse=True), [None] * len(pairs)
    for start in range(0, len(inputs), batch_size):
        tell(start / len(inputs))
        batch = inputs[start : start + batch_size]
        idx = pad_sequence([torch.tensor(row) for row in batch], batch_first=True).to(device)  # (B, T)
        x = model.hidden(idx, plan, passes=idx.size(1))  # (B, T, C)
        asked = [(i, len(row), h) for row, h in zip(batch, x) for i in rows[row]]
        sizes = [len(pairs[i][1]) for i, _, _ in asked]
        x = torch.cat([h[end - n : end] for n, (_, end, h) in zip(sizes, asked)])  # (N, C)
        targets = torch.tensor([token for i, _, _ in asked for token in pairs[i][1]], device=device)  # (N,)
        losses, hits, some = [], [], kernels.rows_at_once(model.embed.weight)
        for h, target in zip(x.split(some), targets.split(some)):
            logits = model.lm_head(model.norm(h)).float()
            losses.append(F.cross_entropy(logits, target, reduction="none"))
            hits.append(logits.argmax(-1) == target)
        losses, hits = torch.cat(losses).cpu().split(sizes), torch.cat(hits).cpu().split(sizes)
        for (i, _, _), loss, hit in zip(asked, losses, hits):
            results[i] = -float(loss.sum()), bool(hit.all())
    return results


def task_model(
    model: GPT, enc, plan: Plan, batch_size: int, tell: Callable[[float], None] = lambda share: None
):
    """`model` with its tokenizer under `plan`, as lm-eval wants models. `tell` hears what share of a kind of
    requests is done."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    room, eot = model.config.block_size, enc.eot_token
    start = enc.tokenizer.encode("").ids[:1] if isinstance(enc, data.JsonTokenizer) else []  # Llama's BOS
    before = start or [eot]  # what stands before a text without context

    class TaskModel(TemplateLM):
        eot_token_id, prefix_token_id = eot, before[0]

        def tok_encode(self, string, add_special_tokens=True, **_):
            return (start if add_special_tokens else []) + enc.encode_ordinary(string)

        def loglikelihood(self, requests, disable_tqdm=True):
            return super().loglikelihood(requests, disable_tqdm)

        def _loglikelihood_tokens(self, requests, **_):
            pairs = [(context or before, continuation) for _, context, continuation in requests]
            return continuations(model, plan, pairs, batch_size, tell)

        def loglikelihood_rolling(self, requests, disable_tqdm=True):
            """Every token of a text is predicted once, the first from `before`, in windows of block_size; as
            lm-eval defines it, the last window reaches back for a full context."""
            pairs, owners, totals = [], [], [0.0] * len(requests)
            for i, request in enumerate(requests):
                ids = enc.encode_ordinary(request.args[0])
                for window in get_rolling_token_windows(ids, before[0], room, 1):
                    pairs.append(make_disjoint_window(window))
                    owners.append(i)
            for i, (value, _) in zip(owners, continuations(model, plan, pairs, batch_size, tell)):
                totals[i] += value
            return totals

        def generate_until(self, requests, disable_tqdm=True):
            """Greedy, to the first of the stop strings, the end of text, or max_gen_toks; these take half the
            context at most, and what remains is the prompt's end."""
            texts = []
            for done, (prompt, options) in enumerate(request.args for request in requests):
                tell(done / len(requests))
                if options.get("do_sample"):
                    raise UserError("a task asks for sampled text (do_sample), and --tasks decodes greedily")
                stops = options.get("until") or []
                stops = [stop for stop in ([stops] if isinstance(stops, str) else stops) if stop]
                n = min(options.get("max_gen_toks", 256), room // 2)
                idx = torch.tensor([self.tok_encode(prompt)[n - room :] or before])
                idx, raw, text = idx.to(model.embed.weight.device), b"", ""
                for token in model.stream(idx, n, temperature=0, plan=plan, exact_prefill=plan.cyclic):
                    if token.item() == eot:
                        break
                    raw += data.token_bytes(enc, token.item())
                    text = raw.decode(errors="replace")
                    if any(stop in text for stop in stops):
                        break
                texts.append(min((text.split(stop)[0] for stop in stops), key=len, default=text))
            return texts

    return TaskModel()


def score_tasks(
    runs: dict[str, GPT],
    encs: dict,
    tasks: dict,
    todo: list[tuple[str, Plan]],
    batch_size: int,
    limit: int | None = None,
) -> list[dict]:
    """One row per run, plan, task (or group of tasks) and metric. Every plan sees the same documents, the
    first `limit` of each task, and the same few-shot examples."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
    from lm_eval.evaluator import evaluate

    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # its bootstrap would fork this process
    progress, rows = Progress("scoring", len(todo)), []
    for done, (name, plan) in enumerate(todo):

        def tell(share: float, done=done, note=f"{name} {plan.spec}"):
            progress(done + share, note)

        random.seed(DEFAULT_RANDOM_SEED)
        np.random.seed(DEFAULT_OTHER_SEED)
        for task in tasks["tasks"].values():
            task.set_fewshot_seed(DEFAULT_OTHER_SEED)
        lm = task_model(runs[name], encs[name], plan, batch_size, tell)
        with redirect_stdout(sys.stderr):
            found = evaluate(lm, tasks, limit=limit, bootstrap_iters=1000, log_samples=False)["results"]
        for task, values in found.items():
            for key, value in values.items():
                metric, _, way = key.partition(",")  # "acc,none": a metric, and how answers are read
                if not way or metric.endswith("_stderr") or not isinstance(value, int | float | np.number):
                    continue
                error = values.get(f"{metric}_stderr,{way}")
                rows.append({
                    "run": name, "plan": plan.spec, "cache_ratio": plan.cache_ratio,
                    "task": task, "metric": metric if way == "none" else key, "value": float(value),
                    "stderr": float(error) if isinstance(error, float | np.number) else None,
                    "n": values["sample_len"],
                })  # fmt: skip
    progress(len(todo))
    return rows


def task_table(rows: list[dict]) -> str:
    keys = ("run", "plan", "task", "metric")
    a, b, c, d = (max(len(key), *(len(r[key]) for r in rows)) for key in keys)
    full = {(r["run"], r["task"], r["metric"]): r["value"] for r in rows if r["plan"] == "full"}
    lines = [
        f"{'run':{a}}  {'plan':{b}}  {'cache':>6}  {'task':{c}}  {'metric':{d}}  {'value':17}  above full"
    ]
    for r in rows:
        line = (
            f"{r['run']:{a}}  {r['plan']:{b}}  {r['cache_ratio']:6.1%}  {r['task']:{c}}  {r['metric']:{d}}  "
        )
        value = f"{r['value']:.4f}" + ("" if r["stderr"] is None else f" +- {r['stderr']:.4f}")
        reference = full.get((r["run"], r["task"], r["metric"]))
        above = "" if reference is None or r["plan"] == "full" else f"{r['value'] - reference:+.4f}"
        lines.append(f"{line}{value:17}  {above}".rstrip())
    return "\n".join(lines)


def main():
    parser = Parser(__doc__)
    parser.add_argument(
        "--out_dir",
        nargs="+",
        required=True,
        metavar="RUN",
        help="the runs to compare; with --tasks also hf:FOLDER, a Hugging Face folder with its tokenizer",
    )
    parser.add_argument(
        "--plans",
        nargs="+",
        metavar="SPEC",
        help="plans to score; auto:0.5 is the best that --search found within half the cache "
        "[kept layers from all to one, yoco, fusedkv-lite]",
    )
    parser.add_argument(
        "--windows", type=int, default=128, help="held-out windows of the context length [128]"
    )
    parser.add_argument("--batch_size", type=int, default=16, help="windows at a time [16]")
    parser.add_argument(
        "--save_dir",
        help="where sweep.jsonl and the picture or tasks.jsonl go [the run's folder, or that around several]",
    )
    parser.add_argument(
        "--search", action="store_true", help="find good plans for every cache size on training text"
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        metavar="NAME",
        help="lm-eval's tasks to score on, for example arc_easy hellaswag",
    )
    parser.add_argument("--task_dir", help="a folder of yaml files that define further tasks for --tasks")
    parser.add_argument("--limit", type=int, help="only the first documents of each task, so many [all]")
    parser.add_argument("--data_dir", help="where tokenized corpora live [as in training]")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... [auto]")
    args = parser.parse_args()
    if min(args.windows, args.batch_size) < 1:
        raise UserError("--windows and --batch_size must be 1 or more")
    if args.tasks and args.search:
        raise UserError(
            "--search and --tasks exclude each other; search first, then --plans auto:0.5 --tasks"
        )
    if not args.tasks and (args.task_dir or args.limit is not None):
        raise UserError("--task_dir and --limit need --tasks")
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit {args.limit} is not valid; it must be 1 or more")
    if not args.tasks and any(path.startswith("hf:") for path in args.out_dir):
        raise UserError("hf: folders have no held-out text to score; give --tasks")
    device, paths = pick_device(args.device), [path.removeprefix("hf:") for path in args.out_dir]
    if args.tasks:
        runs, encs = load_beside_tokenizers(args.out_dir, device)
    else:
        runs, tokens = load_runs(args.out_dir, device, args.data_dir)
    around = os.path.commonpath([os.path.abspath(path) for path in paths])
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
    autos = [spec for spec in args.plans or () if spec.partition(":")[0] == "auto"]
    specs = args.plans and [spec for spec in args.plans if spec not in autos]
    for path, (name, model) in zip(paths, runs.items()):
        plans = [Plan.parse(auto_plan(spec, path), model.config.n_layer) for spec in autos]
        found[name] = found.get(name, []) + plans
    todo = choose(runs, specs, found)
    if args.tasks:
        tasks = load_tasks(args.tasks, args.task_dir)
        rows = score_tasks(runs, encs, tasks, todo, args.batch_size, args.limit)
        scored = {row["task"] for row in rows}
        parts = {part for group, names in tasks["group_map"].items() if group in scored for part in names}
        print(task_table([row for row in rows if row["task"] not in parts - set(args.tasks)]))
        folder.mkdir(parents=True, exist_ok=True)
        write_lines(rows, folder / "tasks.jsonl")
        print(f"wrote {folder / 'tasks.jsonl'}")
        return
    rows = score(runs, tokens, todo, args.windows, args.batch_size)
    print(table(rows))
    folder.mkdir(parents=True, exist_ok=True)
    write_lines(rows, folder / "sweep.jsonl")
    draw(rows, folder / "cache_vs_loss.png")
    print(f"wrote {folder / 'sweep.jsonl'} and {folder / 'cache_vs_loss.png'}")


if __name__ == "__main__":
    run(main)
