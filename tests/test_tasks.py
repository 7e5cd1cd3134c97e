"""lab.tasks: lm-eval's numbers against a slow, obvious reference, on tasks defined by local files."""

import json
import random
import socket
import sys
from types import SimpleNamespace

import pytest
import torch
from cli import UserError
from conftest import make_model
from hf import save_hf
from runs import load_run
from test_train import flags

import data
import kernels
import sweep
import train
from lab import tasks

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
    """`quiz` (multiple choice), `prose` (perplexity) and `write` (generation); and no network."""

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
    prose = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{ask}}"
metric_list: [{metric: bits_per_byte}]
"""
    write = """
output_type: generate_until
doc_to_text: "{{ask}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
    for name, text in (("quiz", choice), ("prose", prose), ("write", write)):
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


def greedy_text(model, enc, plan: str, text: str, n: int) -> str:
    idx = torch.tensor([enc.encode_ordinary(text)])
    new = model.generate(idx, n, temperature=0, plan=plan, exact_prefill=True)[0, idx.size(1) :].tolist()
    assert enc.eot_token not in new
    return enc.decode(new)


@pytest.mark.parametrize("plan", PLANS)
def test_log_likelihoods_of_choices(run, questions, plan, monkeypatch):
    enc = data.load_tokenizer(run)
    model = make_model(vocab_size=512)
    pairs = [(q["ask"], " " + choice) for q in questions for choice in q["choices"]]
    pairs += [("", "def"), ("  ", "x"), *[("The answer:", f" {x}") for x in "ABCD"]]
    whole = [pair if pair[0].strip() else ("", "".join(pair)) for pair in pairs]
    expected = [reference(model, enc, plan, *pair) for pair in whole]
    for batch_size, at_once in ((4, 1000), (64, 1 << 24)):
        monkeypatch.setitem(kernels.LOGITS, "cpu", at_once)
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


@torch.no_grad()
@pytest.mark.parametrize("plan", PLANS)
def test_rolling_predicts_every_token_once(run, plan):
    enc, model = data.load_tokenizer(run), make_model(vocab_size=512)
    ids = enc.encode_ordinary(TEXT)
    assert len(ids) > 64 and len(ids) % 32
    short = enc.decode(ids[:20])
    lm = tasks.task_model(model, enc, model.resolve(plan), 3)
    values = lm.loglikelihood_rolling(requests((TEXT,), (short,), ("",)))
    for value, string in zip(values, (TEXT, short, "")):
        ids = enc.encode_ordinary(string)
        text, expected = [enc.eot_token, *ids], 0.0
        for t in range(1, len(text)):
            first = (t - 1) // 32 * 32  # of the window
            if first and first + 32 > len(ids):
                first = len(ids) - 32  # the last window has a full context
            logits = model.logits(torch.tensor([text[first:t]]), plan=plan)[0, -1]
            expected += float(logits.log_softmax(-1)[text[t]])
        assert value == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("plan", PLANS)
def test_generation_stops_where_asked(run, plan):
    enc, model = data.load_tokenizer(run), make_model(vocab_size=512)
    text = greedy_text(model, enc, plan, "def main", 12)
    stop = text[len(text) // 2 :][:2]
    lm = tasks.task_model(model, enc, model.resolve(plan), 4)
    long = enc.decode(enc.encode_ordinary(TEXT)[-28:])  # 4 of its tokens' places are needed
    asked = [
        ("def main", {"max_gen_toks": 12}),
        ("def main", {"max_gen_toks": 12, "until": [stop, "never said", ""]}),
        ("def main", {"max_gen_toks": 3, "until": stop}),
        (TEXT, {"max_gen_toks": 4}),
    ]
    expected = [text, text.split(stop)[0], greedy_text(model, enc, plan, "def main", 3).split(stop)[0]]
    expected.append(greedy_text(model, enc, plan, long, 4))
    assert lm.generate_until(requests(*asked)) == expected
    [half] = lm.generate_until(requests(("def main", {"max_gen_toks": 1000})))
    assert half.startswith(text) and half == greedy_text(model, enc, plan, "def main", 16)
    with pytest.raises(UserError, match="greedily"):
        lm.generate_until(requests(("def", {"do_sample": True})))


def test_tasks_of_local_files_score_runs_and_folders(run, questions, task_dir, tmp_path, script):
    """The whole command: a run, and the same as a Hugging Face folder, against the reference."""
    pytest.importorskip("safetensors")
    assert script("hf.py", run, tmp_path / "folder")[0] == 0
    names = ("--tasks", "quiz", "prose", "write", "--task_dir", task_dir)
    command = ("lab/tasks.py", "--out_dir", run, f"hf:{tmp_path / 'folder'}", *names, "--save_dir", tmp_path)
    status, out, err = script(*command, "--plans", "full", "keep:0", "--batch_size", 5, "--device", "cpu")
    assert status == 0, err
    rows = [json.loads(line) for line in (tmp_path / "tasks.jsonl").read_text().splitlines()]
    assert {tuple(row) for row in rows} == {
        ("run", "plan", "cache_ratio", "task", "metric", "value", "stderr", "n")
    }
    values = {(r["run"], r["plan"], r["task"], r["metric"]): r["value"] for r in rows}
    assert len(values) == len(rows) == 2 * 2 * 4 and {r["n"] for r in rows} == {8}
    model, enc = load_run(run)[0], data.load_tokenizer(run)
    for plan in ("full", "keep:0"):
        right = []
        for q in questions:
            scores = [reference(model, enc, plan, q["ask"], " " + c)[0] for c in q["choices"]]
            right.append(scores.index(max(scores)) == q["answer"])
        assert values["run", plan, "quiz", "acc"] == sum(right) / 8
        for task, metric in (("quiz", "acc"), ("quiz", "acc_norm"), ("prose", "bits_per_byte")):
            assert values["folder", plan, task, metric] == pytest.approx(values["run", plan, task, metric])
        line = next(x for x in out.splitlines() if x.startswith("run ") and f" {plan} " in x and " acc " in x)
        assert line.split()[5] == f"{sum(right) / 8:.4f}" and ("+-" in line)
        assert len(line.split()) == (8 if plan == "full" else 9)  # with the difference to full
    assert (
        values["run", "full", "prose", "bits_per_byte"] != values["run", "keep:0", "prose", "bits_per_byte"]
    )


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
        [text] = lm.generate_until(requests(("def main", {"max_gen_toks": 4})))
        idx = torch.tensor([tokenizer.encode("def main").ids])
        new = model.generate(idx, 4, temperature=0)[0, idx.size(1) :].tolist()
        assert text == encs[tmp_path.name].decode(new)
    save_hf(make_model(vocab_size=61), tmp_path)
    assert "more tokens than its model" in refused(
        "lab/tasks.py", "--out_dir", f"hf:{tmp_path}", "--tasks", "quiz"
    )
    assert "names two runs" in refused("lab/tasks.py", "--out_dir", run, f"hf:{run}", "--tasks", "quiz")


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
    assert "must be 1 or more" in refused(*command, "quiz", "--limit", 0)
    assert "no such plan" in refused(*command, "quiz", "--plans", "nope")
    assert "required: --tasks" in refused("lab/tasks.py", "--out_dir", run)
    assert "cannot read" in refused("lab/tasks.py", "--out_dir", f"hf:{run / 'none'}", *command[3:], "quiz")
    for name in ("lm_eval", "lm_eval.tasks"):
        monkeypatch.setitem(sys.modules, name, None)
    assert "pip install lm-eval" in refused(*command, "quiz")
