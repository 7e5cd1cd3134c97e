"""lab.tasks: lm-eval's numbers against a slow, obvious reference, on tasks defined by local files."""

import json
import random
import socket
import sys
from types import SimpleNamespace

import data
import sweep
import train
from lab import tasks
from support.cli import UserError
from support.hf import save_hf
from support.runs import load_run

import pytest
import torch
from conftest import make_model
from test_train import flags

pytest.importorskip("lm_eval")

TEXT = "def main():\n    parser = Parser(__doc__)\n    raise UserError(f'no such file {path}')\n" * 2
PLANS = ["full", "keep:0", "sandwich-top:2"]  # the last one is cyclic


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    """A run of 512 tokens and a context of 32, trained for a moment."""
    out, argv = tmp_path_factory.mktemp("out") / "run", sys.argv
    sys.argv = ["train.py", *flags(corpus, out, max_iters=6)]
    train.main()
    sys.argv = argv
    return out


@pytest.fixture(scope="module")
def questions() -> list[dict]:
    rng, words = random.Random(0), TEXT.split()
    rows = []
    for i in range(8):  # the later ones are longer than the context
        ask = " ".join(rng.choices(words, k=2 + 3 * i))
        rows.append({"ask": ask, "choices": [" ".join(rng.choices(words, k=n)) for n in (1, 2, 3)]})
        rows[-1]["answer"] = rng.randrange(3)
    return rows


@pytest.fixture
def task_dir(tmp_path, questions, monkeypatch):
    """`quiz` (multiple choice) and `write` (generation, which is refused); and no network."""

    def no_network(*args):
        raise AssertionError("a local task needs no network")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "quiz.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    common = f"""
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder / "quiz.jsonl"}}}, cache_dir: {tmp_path / "cache"}}}
test_split: test
"""
    choice = """
output_type: multiple_choice
doc_to_text: "{{ask}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
    write = """
output_type: generate_until
doc_to_text: "{{ask}}"
doc_to_target: "{{choices[0]}}"
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
    for name, text in (("quiz", choice), ("write", write)):
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{common}{text}")
    return folder


def requests(*args):
    return [SimpleNamespace(args=a) for a in args]


@torch.no_grad()
def reference(model, enc, plan: str, context: str, continuation: str) -> tuple[float, bool]:
    ids, asked = enc.encode_ordinary(context + continuation), len(enc.encode_ordinary(context))
    if not context:
        ids, asked = [enc.eot_token] + ids, 1
    n = len(ids) - asked
    ids = ids[-model.config.block_size - 1 :]
    logp = model.logits(torch.tensor([ids[:-1]]), plan=plan)[0].log_softmax(-1)
    steps = [(logp[t - 1], ids[t]) for t in range(len(ids) - n, len(ids))]
    return sum(float(p[i]) for p, i in steps), all(int(p.argmax()) == i for p, i in steps)


@pytest.mark.parametrize("plan", PLANS)
def test_log_likelihoods_of_choices(run, questions, plan):
    enc = data.load_tokenizer(run)
    model = make_model(vocab_size=512)
    pairs = [(q["ask"], " " + choice) for q in questions for choice in q["choices"]]
    pairs += [("", "def"), ("  ", "x"), *[("The answer:", f" {x}") for x in "ABCD"]]
    whole = [pair if pair[0].strip() else ("", "".join(pair)) for pair in pairs]
    expected = [reference(model, enc, plan, *pair) for pair in whole]
    for batch_size in (4, 64):
        lm = tasks.task_model(model, enc, model.resolve(plan), batch_size)
        values, greedy = zip(*lm.loglikelihood(requests(*pairs)))
        assert values == pytest.approx([value for value, _ in expected], rel=1e-4, abs=1e-4)
        assert greedy == tuple(best for _, best in expected)
    best = model.generate(torch.tensor([[1, 2]]), 5, temperature=0, plan=plan, exact_prefill=True)[0].tolist()
    pairs = [(best[:2], best[2:]), (best[:2], [*best[2:6], (best[6] + 1) % 512])]
    assert [x for _, x in tasks.continuations(model, model.resolve(plan), pairs, 4)] == [True, False]
    with pytest.raises(UserError, match="a continuation of .* scores 1 to 32"):
        lm.loglikelihood(requests(("def", TEXT)))


def test_one_input_answers_all_choices_of_one_token(monkeypatch):
    model, rows = make_model(), []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda idx, *a, **kw: rows.extend(idx) or hidden(idx, *a, **kw))
    tasks.continuations(model, model.plan, [([1, 2, 3], [i]) for i in range(4)], batch_size=16)
    assert len(rows) == 1


def test_tasks_of_local_files_score_runs_and_folders(run, questions, task_dir, tmp_path, script):
    """The whole command: a run, and the same as a Hugging Face folder, against the reference."""
    pytest.importorskip("safetensors")
    assert script("support/hf.py", run, tmp_path / "folder")[0] == 0
    names = ("--tasks", "quiz", "--task_dir", task_dir)
    command = ("lab/tasks.py", "--out_dir", run, f"hf:{tmp_path / 'folder'}", *names, "--save_dir", tmp_path)
    status, out, err = script(*command, "--plans", "full", "keep:0", "--batch_size", 5, "--device", "cpu")
    assert status == 0, err
    rows = [json.loads(line) for line in (tmp_path / "tasks.jsonl").read_text().splitlines()]
    assert {tuple(row) for row in rows} == {
        ("run", "plan", "cache_ratio", "task", "metric", "value", "stderr", "n")
    }
    values = {(r["run"], r["plan"], r["task"], r["metric"]): r["value"] for r in rows}
    assert len(values) == len(rows) == 2 * 2 * 2 and {r["n"] for r in rows} == {8}
    model, enc = load_run(run)[0], data.load_tokenizer(run)
    for plan in ("full", "keep:0"):
        right = []
        for q in questions:
            scores = [reference(model, enc, plan, q["ask"], " " + c)[0] for c in q["choices"]]
            right.append(scores.index(max(scores)) == q["answer"])
        assert values["run", plan, "quiz", "acc"] == sum(right) / 8
        for task, metric in (("quiz", "acc"), ("quiz", "acc_norm")):
            assert values["folder", plan, task, metric] == pytest.approx(values["run", plan, task, metric])
        line = next(x for x in out.splitlines() if x.startswith("run ") and f" {plan} " in x and " acc " in x)
        assert line.split()[5] == f"{sum(right) / 8:.4f}" and ("+-" in line)
        assert len(line.split()) == (8 if plan == "full" else 9)  # with the difference to full


def test_limits_searched_plans_and_default_plans(run, task_dir, script):
    (run / "search.jsonl").write_text(
        '{"plan": "cla:2", "cache_ratio": 0.5, "calibration_loss": 3.0}\n'
        '{"plan": "keep:0", "cache_ratio": 0.25, "calibration_loss": 2.0}\n'
    )
    command = ("lab/tasks.py", "--out_dir", run, "--tasks", "quiz", "--task_dir", task_dir, "--limit", 3)
    assert script(*command, "--plans", "auto:0.5")[0] == 0
    rows = [json.loads(line) for line in (run / "tasks.jsonl").read_text().splitlines()]
    assert {r["plan"] for r in rows} == {"full", "keep:0"} and {r["n"] for r in rows} == {3}
    assert script(*command)[0] == 0
    rows = [json.loads(line) for line in (run / "tasks.jsonl").read_text().splitlines()]
    assert list(dict.fromkeys(r["plan"] for r in rows)) == sweep.ladder(make_model(n_layer=4))


def test_groups_show_their_mean_and_keep_their_parts(run, task_dir, script):
    (task_dir / "all.yaml").write_text("group: both\ntask: [quiz]\naggregate_metric_list: [{metric: acc}]\n")
    status, out, err = script("lab/tasks.py", "--out_dir", run, "--tasks", "both", "--task_dir", task_dir)
    assert status == 0 and " both " in out and " quiz " not in out, err
    rows = [json.loads(line) for line in (run / "tasks.jsonl").read_text().splitlines()]
    assert {r["task"] for r in rows} == {"both", "quiz"}


@torch.no_grad()
def test_a_folder_with_a_tokenizer_json(run, tmp_path, refused):
    """Its tokenizer may begin every text with a token of its own, as Llama's does."""
    tokenizers = pytest.importorskip("tokenizers")
    pytest.importorskip("safetensors")
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([TEXT], vocab_size=280, special_tokens=["<|endoftext|>", "<s>"])
    tmp_path /= "folder"
    save_hf(make_model(vocab_size=300), tmp_path)
    for first in ("", "<s> "):
        tokenizer._tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{first}$A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        runs, encs = tasks.load_with_tokenizers([str(run), f"hf:{tmp_path}"], "cpu")
        assert list(runs) == ["run", tmp_path.name]
        model = runs[tmp_path.name]
        lm = tasks.task_model(model, encs[tmp_path.name], model.plan, 4)
        pairs = [("def main", " Parser"), ("", "def main"), (TEXT[:150], " = x")]
        for (context, continuation), (value, _) in zip(pairs, lm.loglikelihood(requests(*pairs))):
            ids, asked = tokenizer.encode(context + continuation).ids, tokenizer.encode(context).ids
            if not asked:
                ids, asked = [tokenizer.token_to_id("<|endoftext|>"), *ids], [0]
            targets, ids = ids[len(asked) :], ids[-33:]
            logp = model.logits(torch.tensor([ids[:-1]]))[0].log_softmax(-1)[-len(targets) :]
            assert value == pytest.approx(sum(float(p[i]) for p, i in zip(logp, targets)), rel=1e-4)
    small = tmp_path.with_name("small")
    save_hf(make_model(vocab_size=61), small, tokenizer=tmp_path)
    line = refused("lab/tasks.py", "--out_dir", f"hf:{small}", "--tasks", "quiz", "--save_dir", small)
    assert "more tokens than its model" in line
    twice = ("--out_dir", run, f"hf:{run}", "--save_dir", small)
    assert "names two runs" in refused("lab/tasks.py", *twice, "--tasks", "quiz")


def test_mistakes_get_one_line(run, task_dir, tmp_path, refused, monkeypatch):
    monkeypatch.setattr(
        "lm_eval.tasks.manager.__file__", str(tmp_path / "none" / "x.py")
    )  # 14,000 yaml files
    command = ("lab/tasks.py", "--out_dir", run, "--task_dir", task_dir, "--tasks")
    assert "no task 'quizz'; did you mean quiz?" in refused(*command, "quizz")
    text = (task_dir / "quiz.yaml").read_text()
    (task_dir / "lost.yaml").write_text(text.replace("quiz", "lost"))
    assert "--tasks lost: " in refused(*command, "lost")
    assert "is not a folder" in refused(*command[:3], "--task_dir", tmp_path / "no", "--tasks", "quiz")
    assert "it must be 1 or more" in refused(*command, "quiz", "--limit", 0)
    assert "scores log-likelihoods only" in refused(*command, "write")
    assert "no such plan" in refused(*command, "quiz", "--plans", "nope")
    assert "required: --tasks" in refused("lab/tasks.py", "--out_dir", run)
    none = ("lab/tasks.py", "--out_dir", f"hf:{run / 'none'}", "--save_dir", run)
    line = refused(*none, *command[3:], "quiz")
    assert "is no folder here; download it first" in line
    for name in ("lm_eval", "lm_eval.tasks"):
        monkeypatch.setitem(sys.modules, name, None)
    assert "pip install lm-eval" in refused(*command, "quiz")
