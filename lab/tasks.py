"""Score the papers' own benchmarks through the package lm-eval, for runs and Hugging Face folders, under any
plan: tasks that compare log-likelihoods, as ARC, HellaSwag, PIQA, LAMBADA and MMLU do.

python -m lab.tasks --out_dir out/stochastic hf:FOLDER --tasks arc_easy hellaswag --plans full cla:2 auto:0.5
python -m lab.tasks --out_dir out/stochastic --tasks mine --task_dir folder/of/yaml/files

Every plan sees the same documents and the same few-shot examples. Results go to tasks.jsonl.
"""

import logging
import os
import random
import sys
from collections import defaultdict
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

from kv_router import Plan
from model import GPT, KV
from support import cli
from support.cli import (
    Parser,
    Progress,
    UserError,
    at_least,
    first_line,
    suggest,
    table,
    user_path,
    write_lines,
)
from support.devices import pick_device
from support.hf import results_folder, with_tokenizer
from sweep import choose, run_name

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

# --- what lm-eval asks of a model -------------------------------------------------------------------------


@torch.no_grad()
def continuations(
    model: GPT,
    plan: Plan,
    pairs: list[tuple[list[int], list[int]]],
    batch_size: int,
    report: Callable[[float], None] = lambda share: None,
) -> list[tuple[float, bool]]:
    """For every pair of a context and a continuation, token ids, at least one each: the continuation's
    log-likelihood in nats, and whether greedy decoding would give it. Contexts are cut from the left to fit
    block_size; a continuation that does not fit raises UserError. Cyclic plans iterate until exact. `report`
    hears which share is done.

    Sequences of similar length run together, padded on the right, which causal attention never sees. The
    (B, T, vocab) logits never exist, only those of one sequence's continuations at a time."""
    room, device = model.config.block_size, model.embed.weight.device
    by_input = defaultdict(list)  # input -> the pairs that it answers: choices of one token share theirs
    for i, (context, continuation) in enumerate(pairs):
        if not 0 < len(continuation) <= room:
            raise UserError(
                f"a task has a continuation of {len(continuation)} tokens, and this model scores 1 to {room}"
            )
        # The last token is only predicted; of what is longer than the context the beginning goes.
        by_input[tuple((context + continuation)[-room - 1 : -1])].append(i)
    inputs, results = sorted(by_input, key=len, reverse=True), [None] * len(pairs)
    for start in range(0, len(inputs), batch_size):
        report(start / len(inputs))
        batch = inputs[start : start + batch_size]
        idx = pad_sequence([torch.tensor(row) for row in batch], batch_first=True).to(device)  # (B, T)
        x = model.hidden(idx, KV(plan), passes=idx.size(1))  # (B, T, C)
        for row, h in zip(batch, x):
            longest = max(len(pairs[i][1]) for i in by_input[row])
            logits = model.head(h[len(row) - longest : len(row)]).float()  # (longest, vocab)
            for i in by_input[row]:
                target = torch.tensor(pairs[i][1], device=device)
                own = logits[-len(target) :]
                hit = bool((own.argmax(-1) == target).all())
                results[i] = -float(F.cross_entropy(own, target, reduction="sum")), hit
    return results


def task_model(
    model: GPT, enc, plan: Plan, batch_size: int, report: Callable[[float], None] = lambda _: None
):
    """`model` with its tokenizer under `plan`, as lm-eval wants models."""
    from lm_eval.api.model import TemplateLM

    start = getattr(enc, "start", [])  # Llama's BOS, in front of every text
    empty = start or [enc.eot_token]  # the context of a text that has none

    class TaskModel(TemplateLM):
        eot_token_id, prefix_token_id = enc.eot_token, empty[0]

        def tok_encode(self, string, add_special_tokens=True, **_):
            return (start if add_special_tokens else []) + enc.encode_ordinary(string)

        def loglikelihood(self, requests, disable_tqdm=True):
            return super().loglikelihood(requests, disable_tqdm)

        def _loglikelihood_tokens(self, requests, **_):
            pairs = [(context or empty, continuation) for _, context, continuation in requests]
            return continuations(model, plan, pairs, batch_size, report)

        def generate_until(self, requests, disable_tqdm=True):
            raise UserError("a task asks for generated text, and lab.tasks scores log-likelihoods only")

        loglikelihood_rolling = generate_until

    return TaskModel()


# --- tasks ------------------------------------------------------------------------------------------------


def load_tasks(names: list[str], task_dir: str | None = None) -> dict:
    """lm-eval's tasks of these names, with the groups they form: from the yaml files below `task_dir` if all
    are there, otherwise from its own too. UserError (one line) without lm-eval, for an unknown name and for a
    task whose data are not available."""
    try:
        import datasets
        import lm_eval.api.task
        from lm_eval.tasks import TaskManager
    except ImportError as e:
        raise UserError("lab.tasks needs the package lm-eval: pip install lm-eval") from e
    datasets.disable_progress_bars()
    lm_eval.api.task.tqdm = lambda docs, **_: docs  # its bar for every plan and task
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every default that it takes
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


def score_tasks(
    runs: dict[str, GPT],
    encs: dict,
    tasks: dict,
    todo: list[tuple[str, Plan]],
    batch_size: int,
    limit: int | None = None,
) -> list[dict]:
    """One row per run, plan, task (or group of tasks) and metric, over the first `limit` documents of
    each."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
    from lm_eval.evaluator import evaluate

    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # its bootstrap would fork this process
    progress, rows = Progress("scoring", len(todo)), []
    for done, (name, plan) in enumerate(todo):

        def report(share: float, done=done, note=f"{name} {plan.spec}"):
            progress(done + share, note)

        random.seed(DEFAULT_RANDOM_SEED)
        np.random.seed(DEFAULT_OTHER_SEED)
        for task in tasks["tasks"].values():
            task.set_fewshot_seed(DEFAULT_OTHER_SEED)
        lm = task_model(runs[name], encs[name], plan, batch_size, report)
        with redirect_stdout(sys.stderr):
            found = evaluate(lm, tasks, limit=limit, bootstrap_iters=1000, log_samples=False)["results"]
        about = {"run": name, "plan": plan.spec, "cache_ratio": plan.cache_ratio}
        for task, values in found.items():
            rows += [about | {"task": task} | row for row in metrics(values)]
    progress(len(todo))
    return rows


def metrics(values: dict) -> list[dict]:
    """The metrics among lm-eval's results of one task. Its keys are such as "acc,none": a metric, and how
    answers are read."""
    rows = []
    for key, value in values.items():
        metric, _, filtered = key.partition(",")
        if not filtered or metric.endswith("_stderr") or not isinstance(value, int | float | np.number):
            continue
        error = values.get(f"{metric}_stderr,{filtered}")
        error = float(error) if isinstance(error, float | np.number) else None
        name = metric if filtered == "none" else key
        rows.append({"metric": name, "value": float(value), "stderr": error, "n": values["sample_len"]})
    return rows


def task_table(rows: list[dict]) -> str:
    """The scores, and their differences to the full cache of the same run."""
    full = {(r["run"], r["task"], r["metric"]): r["value"] for r in rows if r["plan"] == "full"}
    lines = [["run", "plan", "task", "metric", "cache", "value", "above full"]]
    for r in rows:
        value = f"{r['value']:.4f}" + ("" if r["stderr"] is None else f" +- {r['stderr']:.4f}")
        reference = full.get((r["run"], r["task"], r["metric"]))
        above = "" if reference is None or r["plan"] == "full" else f"{r['value'] - reference:+.4f}"
        lines.append([r["run"], r["plan"], r["task"], r["metric"], f"{r['cache_ratio']:.1%}", value, above])
    return table(lines, left=4)


# --- the command line -------------------------------------------------------------------------------------


def load_with_tokenizers(folders: list[str], device: str) -> tuple[dict[str, GPT], dict]:
    """The models and their tokenizers, both named by their folders: runs, or hf:FOLDER for Hugging Face's."""
    runs, encs = {}, {}
    for folder in folders:
        name = run_name(folder, runs)
        runs[name], encs[name] = with_tokenizer(folder, device)
    return runs, encs


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add(
        "--out_dir",
        type=user_path,
        nargs="+",
        required=True,
        metavar="RUN",
        help="runs, or hf:FOLDER with its tokenizer",
    )
    add("--tasks", nargs="+", required=True, metavar="NAME", help="lm-eval's tasks")
    add("--plans", nargs="+", metavar="SPEC", help="as in sweep.py [kept layers, yoco, ...]")
    add("--task_dir", type=user_path, help="a folder of yaml files that define further tasks")
    add("--limit", type=at_least(1), help="only the first LIMIT documents of each task [all]")
    add("--batch_size", type=at_least(1), default=16, help="sequences at a time [16]")
    add(
        "--save_dir", type=user_path, help="where tasks.jsonl goes [the run's folder, or that around several]"
    )
    add("--device", default="auto", help="cpu, cuda, ... [auto]")
    args = parser.parse_args()
    path = results_folder(args.save_dir, args.out_dir) / "tasks.jsonl"
    runs, encs = load_with_tokenizers(args.out_dir, pick_device(args.device, many_shapes=True))
    todo = choose(runs, args.out_dir, args.plans)
    tasks = load_tasks(args.tasks, args.task_dir)
    rows = score_tasks(runs, encs, tasks, todo, args.batch_size, args.limit)
    # A group's row stands for its parts, unless these were asked for too.
    scored = {row["task"] for row in rows}
    parts = {part for group, names in tasks["group_map"].items() if group in scored for part in names}
    print(task_table([row for row in rows if row["task"] not in parts - set(args.tasks)]))
    write_lines(rows, path)
    print(f"wrote {path}")


if __name__ == "__main__":
    cli.run(main)
