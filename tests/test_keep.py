"""What people meet: nothing of theirs is lost or silently wrong, what is right is not refused, and messages
name what to do."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from contextlib import nullcontext, suppress

import data
from support import cli, devices, hf, parallel, plots, runs
from support.runs import load_checkpoint, load_run
from train import TrainConfig

import pytest
import torch
from conftest import ROOT
from test_faults import at_step, flags

pytestmark = pytest.mark.faults
TEXT = "some words in a row\n" * 300


@pytest.fixture
def run(corpus, tmp_path, script):
    """A run of 8 steps."""
    assert script("train.py", *flags(corpus, tmp_path / "run"))[0] == 0
    return tmp_path / "run"


@pytest.fixture
def prepare(tmp_path):
    """prepare(input, flags ...) -> the command that makes the corpus x of bytes in tmp_path/data"""
    to = ("--name", "x", "--data_dir", tmp_path / "data", "--tokenizer", "bytes")
    return lambda path, *more: ("data.py", "--input", path, *to, *more)


def resume(out, *more) -> tuple:
    return ("train.py", f"--out_dir={out}", "--init_from=resume", "--max_iters=9", *more)


def save_tokenizer(path, end="<|endoftext|>", unknown="?"):
    """A tokenizer.json of words, whose text is cut, padded and may name the end of a text by itself."""
    tokenizers = pytest.importorskip("tokenizers")
    words = ["some", "words", "in", "a", "row", end, *unknown]
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unknown)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([end])
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(path))


# --- nothing of the user's is lost ------------------------------------------------------------------------


def test_a_folder_that_is_no_corpus_of_ours_is_not_replaced(tmp_path, prepare, script, refused):
    mine = tmp_path / "data" / "x"
    mine.mkdir(parents=True)
    (mine / "text.txt").write_text(TEXT)
    assert "holds other things" in refused(*prepare(mine))
    assert (mine / "text.txt").read_text() == TEXT
    shutil.move(mine / "text.txt", tmp_path / "text.txt")
    for _ in range(2):  # an empty one is filled, and a corpus replaced
        assert script(*prepare(tmp_path / "text.txt"))[0] == 0
    shutil.rmtree(mine)
    mine.write_text("a file")
    assert "holds other things" in refused(*prepare(tmp_path / "text.txt")) and mine.read_text() == "a file"


def test_a_tokenizer_file_gives_ids_and_nothing_else(tmp_path):
    save_tokenizer(tmp_path / "tokenizer.json")
    enc = data.JsonTokenizer(tmp_path / "tokenizer.json")
    assert len(enc.encode_ordinary("some words in a row")) == 5
    assert data.prompt(enc, "a row in some words") == [3, 4, 2, 0, 1]
    assert enc.eot_token not in enc.encode_ordinary("words <|endoftext|>")
    byte_pairs = json.loads((tmp_path / "tokenizer.json").read_text())
    byte_pairs["model"] = {"type": "BPE", "dropout": 0.9, "merges": [["a", "b"]]}
    byte_pairs["model"]["vocab"] = {"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 5}
    (tmp_path / "tokenizer.json").write_text(json.dumps(byte_pairs))
    assert data.JsonTokenizer(tmp_path / "tokenizer.json").encode_ordinary("ab " * 50) == [2] * 50


@pytest.mark.parametrize("where", [">/dev/full 2>/dev/full", ">&- 2>&-", "| head -n 1"])
def test_output_that_no_one_reads_stops_nothing(corpus, tmp_path, where):
    line = ["bash", "-o", "pipefail", "-c", f'"$@" {where}', "-", sys.executable, "train.py"]
    line += flags(corpus, tmp_path / "run", log_interval=1)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    assert subprocess.run(line, cwd=ROOT, env=environment, capture_output=True).returncode == 0
    assert load_checkpoint(tmp_path / "run" / "ckpt.pt")["step"] == 8


@pytest.mark.parametrize("ignored", [False, True])
def test_a_lost_terminal_saves_or_is_ignored(corpus, tmp_path, script, ignored):
    out = tmp_path / "run"
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.default_int_handler)
    try:
        with at_step(2, lambda: os.kill(os.getpid(), signal.SIGHUP)):
            status = script("train.py", *flags(corpus, out))[0]
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (status, load_checkpoint(out / "ckpt.pt")["step"]) == ((0, 8) if ignored else (129, 3))


def test_an_export_is_a_new_folder_whole_or_not_at_all(run, tmp_path, refused):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "tokenizer.tiktoken").symlink_to(tmp_path / "elsewhere")
    for place in (folder, run, ROOT):
        assert "holds other things" in refused("support/hf.py", run, place)
    with suppress(KeyboardInterrupt), cli.new_folder(tmp_path / "new") as work:
        (work / "config.json").write_text("half of it")
        raise KeyboardInterrupt
    assert sorted(os.listdir(tmp_path)) == ["folder", "run"] and len(os.listdir(folder)) == 1


def test_a_run_starts_in_a_folder_that_is_new_empty_or_a_runs(corpus, tmp_path, script, refused):
    (tmp_path / "config.json").write_text("mine")
    assert "holds other things than a run" in refused("train.py", *flags(corpus, tmp_path))
    assert "--out_dir '' is empty" in refused("train.py", *flags(corpus, ""))
    assert (tmp_path / "config.json").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert script("train.py", *flags(corpus, tmp_path / "empty"))[0] == 0


@pytest.mark.parametrize("removed", ["folder", "lock"])
def test_a_run_saves_only_into_the_folder_that_it_holds(corpus, tmp_path, refused, removed):
    out = tmp_path / "run"

    def another_starts():
        shutil.rmtree(out) if removed == "folder" else (out / "run.lock").unlink()
        out.mkdir(exist_ok=True)
        (out / "run.lock").touch()
        (out / "ckpt.pt").write_text("another's")

    with at_step(2, another_starts):
        assert "or is another run's now" in refused("train.py", *flags(corpus, out))
    assert (out / "ckpt.pt").read_text() == "another's" and not (out / "best.pt").exists()


def test_a_resume_locks_before_it_reads(run, refused, monkeypatch):
    monkeypatch.setattr(runs, "load_checkpoint", lambda path: pytest.fail("read before it was locked"))
    with cli.lock(run / "run.lock"):
        assert "another run is at work" in refused(*resume(run))


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied", "ckpt.pt"), MemoryError()])
def test_only_damage_falls_back_to_the_best_checkpoint(run, refused, error, monkeypatch):
    def load_all_but_the_newest(path, load=torch.load, **options):
        if path.name == "ckpt.pt":
            raise error
        return load(path, **options)

    monkeypatch.setattr(torch, "load", load_all_but_the_newest)
    before = (run / "ckpt.pt").read_bytes()
    said = f"out of memory (while reading {run / 'ckpt.pt'}, which is not damaged)"
    assert (error.strerror if isinstance(error, OSError) else said) in refused(*resume(run))
    assert (run / "ckpt.pt").read_bytes() == before


RANKS = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize("change", [{}, {"WORLD_SIZE": ""}, {"RANK": ""}, {"RANK": "x"}, {"MASTER_PORT": ""}])
def test_variables_of_another_program_make_no_ranks(change, monkeypatch, refused):
    for name, value in (RANKS | change).items():
        monkeypatch.setenv(name, value)
    assert parallel.ranks() == ((0, 1) if change else (1, 2))
    monkeypatch.setenv("RANK", "")
    assert "--seed -1" in refused("train.py", "--seed=-1")


NORM, EMBED, HEAD = "model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda t: {NORM: t[NORM].int()}, "is torch.int32"),
        (lambda t: {NORM: t[NORM].bool()}, "is torch.bool"),
        (lambda t: {NORM: t[NORM] * torch.nan}, "or not finite"),
        (lambda t: {NORM: t[NORM].double() * 1e300}, "or not finite"),
        (lambda t: {NORM: t[NORM].to(torch.float8_e4m3fn)}, None),
        (lambda t: {HEAD: t.pop(EMBED)}, None),  # tied weights under their other name
        (lambda t: {name.removeprefix("model."): t.pop(name) for name in [*t]}, None),  # a base model
    ],
)
def test_weights_that_are_none_are_refused_and_others_read(run, tmp_path, change, said):
    torch_files = pytest.importorskip("safetensors.torch")
    folder = tmp_path / "folder"
    hf.save_hf(load_run(run)[0], folder)
    file = folder / "model.safetensors"
    tensors = torch_files.load_file(file)
    torch_files.save_file(tensors | change(tensors), file)
    tried = pytest.raises(cli.UserError, match=said) if said else nullcontext()
    with tried:
        hf.load_hf(folder)
    shutil.copy(file, folder / "model-2.safetensors")
    with pytest.raises(cli.UserError, match="in two of its files"):
        hf.load_hf(folder)
    file.write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(cli.UserError, match="a pointer of git-lfs in place of the weights"):
        hf.load_hf(folder)


def test_a_resume_compares_the_held_out_text(corpus, run, tmp_path, refused):
    mine = shutil.copytree(corpus, tmp_path / "data" / corpus.name)
    (mine / "val.bin").write_bytes((mine / "val.bin").read_bytes()[::-1][2:])
    meta = data.read_meta(mine)
    meta["val"]["sha256"] = data.sha256(mine / "val.bin")
    (mine / "meta.json").write_text(json.dumps(meta))
    assert "is not the corpus that" in refused(*resume(run, f"--data_dir={mine.parent}"))


def test_results_are_replaced_only_by_results(run, script, refused, monkeypatch):
    sweep, results = ("sweep.py", "--out_dir", run, "--windows", 2, "--device", "cpu"), run / "sweep.jsonl"
    (run / "sweep.jsonl.tmp").write_text("another sweep's")
    assert script(*sweep)[0] == 0
    before = results.read_bytes()
    assert "plan 'keep:9'" in refused(*sweep, "--plans", "keep:9")

    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert "run/sweep.jsonl: No space left on device" in refused(*sweep)
    assert before == results.read_bytes() and (run / "sweep.jsonl.tmp").read_text() == "another sweep's"


def test_a_command_to_go_on_starts_the_same_program(monkeypatch):
    code = "import train; train.main(rule=print)"
    monkeypatch.setattr(sys, "argv", ["-c", "--out_dir=x"])
    monkeypatch.setattr(sys, "orig_argv", ["python", "-u", "-c", code, "--out_dir=x"])
    assert shlex.split(parallel.launcher()) == ["python", "-c", code]
    monkeypatch.setattr(parallel, "RANKS", 2)
    monkeypatch.setattr(sys, "argv", ["my train.py"])
    assert parallel.launcher() == "torchrun --standalone --nproc_per_node=2 'my train.py'"


def test_what_is_left_out_of_a_corpus_is_said(tmp_path, prepare, script, refused, monkeypatch):
    folder, locked = tmp_path / "texts", tmp_path / "texts" / "locked"
    locked.mkdir(parents=True)
    (folder / "linked").symlink_to(ROOT)
    for name in "abcd":
        (folder / name).write_text(TEXT)

    def unless_locked(act):
        def guarded(path):
            if str(path) in (str(locked), str(folder / "a")):
                raise PermissionError(13, "Permission denied", str(path))
            return act(path)

        return guarded

    monkeypatch.setattr(os, "scandir", unless_locked(os.scandir))
    monkeypatch.setattr(data, "read_text", unless_locked(data.read_text))
    out = script(*prepare(folder))[1]
    assert f"{folder / 'linked'}: a link" in out and "UTF-8" not in out
    assert out.count("Permission denied: ") == 2 and f"'{locked}'" in out
    assert "Permission denied" in refused(*prepare(locked))


def test_a_searched_plan_is_of_these_weights(run, script, refused):
    sample = ("sample.py", "--out_dir", run, "--plan", "auto:0.6", "--max_new_tokens", 2, "--device", "cpu")
    assert script("sweep.py", "--out_dir", run, "--search", "--windows", 2, "--device", "cpu")[0] == 0
    assert script(*sample)[2] == ""
    best = load_checkpoint(run / "best.pt")
    best["model"]["norm.weight"] += 1
    torch.save(best, run / "best.pt")
    assert f"at step {best['step']}, with other weights; search again" in script(*sample)[2]
    for plan, said in (("full", "the smallest cache found is 1 of"), ("0_1_2", "plan '0_1_2' for 2 layers")):
        row = {"plan": plan, "cache_ratio": 0.1, "calibration_loss": 1}
        (run / "search.jsonl").write_text(json.dumps(row))
        assert said in refused(*sample)


# --- what is right goes on --------------------------------------------------------------------------------


def test_a_compiler_is_tried_before_it_is_relied_on(tmp_path, monkeypatch):
    compiler = tmp_path / "g++"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && echo 12 && exit\necho no omp.h >&2\nexit 1\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    torch._dynamo.reset()
    devices.why_not_compile.cache_clear()
    assert devices.pick_compile(None, "cpu", 1e18) == (False, "it fails here: no omp.h")
    with pytest.raises(cli.UserError, match=r"compiling fails here \(no omp.h\); .* leave --compile out"):
        devices.pick_compile(True, "cpu", 1e18)
    devices.why_not_compile.cache_clear()
    torch._dynamo.reset()


def test_a_tilde_is_the_home_folder(corpus, tmp_path, script, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert script("train.py", *flags(corpus, "~/runs/a"))[0] == 0
    assert (tmp_path / "runs" / "a" / "ckpt.pt").exists()
    (tmp_path / "x.toml").write_text('out_dir = "~/b"\ninit_from = "hf:~/c"')
    settings = cli.read_toml(cli.user_path("~/x.toml"), TrainConfig)
    assert settings == {"out_dir": f"{tmp_path}/b", "init_from": f"hf:{tmp_path}/c"}


def test_the_printed_commands_work_as_they_stand(corpus, tmp_path, script, refused):
    out = tmp_path / "my run\u3000\u00a0\U0001f469\u200d\U0001f4bb's"
    status, text, _ = script("train.py", *flags(corpus, out))
    first, second = text.partition("next: ")[2].split(";")
    assert status == 0 and shlex.split(first) == ["python", "sweep.py", "--out_dir", str(out)]
    assert script(*shlex.split(second)[1:])[0] == 0  # also in this context of 16 tokens
    assert "or say --shard=false" in refused(*resume(out, "--shard"))


def test_text_without_spaces_is_learned_in_bounded_time_and_memory():
    text = "ACGTTGCA" * 50_000
    began = time.monotonic()
    assert len(max(data.train_bpe([text], 400), key=len)) <= data.LONGEST_WORD
    tracemalloc.start()
    data.train_bpe([TEXT * 300], 257)
    assert tracemalloc.get_traced_memory()[1] < 9e6 and time.monotonic() - began < 20
    tracemalloc.stop()


def test_datasets_of_files_and_configurations(tmp_path, script, refused, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    rows = datasets.Dataset.from_dict({"text": [f"row number {i}\n" for i in range(400)]})
    rows.to_csv("a.csv")
    rows.to_json("b.jsonl.gz", compression="gzip")
    command = ("data.py", "--tokenizer", "bytes", "--data_dir", tmp_path, "--name", "x", "--hf")
    for name in ("a.csv", "b.jsonl.gz"):
        for split, n in (("train", 400), ("train[:10%]", 40)):
            assert script(*command, name, "--split", split)[0] == 0
            meta = data.read_meta(tmp_path / "x")
            assert sum(meta[part]["bytes"] for part in data.SPLITS) == sum(map(len, rows["text"][:n]))

    def several(path, name, **options):
        raise ValueError(f"no configuration {name}\nPlease pick one among: ['a', 'b']")

    monkeypatch.setattr(datasets, "load_dataset", several)
    assert "no configuration c Please pick one among: ['a', 'b']" in refused(*command, "w", "--config", "c")


@pytest.mark.parametrize(
    "name, config", [("tokenizer_config.json", {"eos_token": "<end>"}), ("config.json", {"eos_token_id": 5})]
)
def test_the_end_of_a_text_under_another_name(tmp_path, name, config):
    path = tmp_path / "tokenizer.json"
    save_tokenizer(path, end="<end>")
    with pytest.raises(cli.UserError, match="name its own as eos_token in tokenizer_config.json"):
        data.JsonTokenizer(path)
    (tmp_path / name).write_text(json.dumps(config))
    assert data.JsonTokenizer(path).eot_token == 5
    data.prepare(tmp_path / "x", lambda: [TEXT], str(path), "a test")
    assert data.load_tokenizer(tmp_path / "x").eot_token == 5


def test_prompts_are_taken_as_they_are(run, tmp_path, script):
    sample = ("sample.py", "--out_dir", run, "--max_new_tokens", 2, "--device", "cpu", "--start")
    assert "\n--my-flag x" in script(*sample, "--my-flag x")[1]
    assert script(*sample, "x\udcff")[0] == 0
    save_tokenizer(tmp_path / "tokenizer.json")
    assert data.prompt(data.JsonTokenizer(tmp_path / "tokenizer.json"), "\udcff words") == [6, 1]
    assert len(data.prompt(data.load_tokenizer(run), " " * 1_100_000)) > 1


def test_every_run_has_its_own_line_and_name_in_a_picture(tmp_path):
    names = ["_a", "$x_$", *"cdefgh"]
    with plots.picture(tmp_path / "x.png") as ax:
        for i, name in enumerate(names):
            plots.line(ax, [1, 2], [i, i], i, name)
    assert [text.get_text().strip() for text in ax.get_legend().get_texts()] == names
    assert len({(line.get_marker(), line.get_linestyle(), line.get_color()) for line in ax.lines}) == 8


@pytest.mark.parametrize("text", [" " * 1_200_000 + "x", "\n" * 1_200_000 + "x", TEXT])
def test_any_text_from_a_pipe(tmp_path, prepare, script, text):
    os.mkfifo(tmp_path / "pipe")
    threading.Thread(target=(tmp_path / "pipe").write_text, args=(text,)).start()
    assert script(*prepare(tmp_path / "pipe"))[0] == 0
    meta = data.read_meta(tmp_path / "data" / "x")
    assert sum(meta[part]["bytes"] for part in data.SPLITS) == len(text)


def test_an_unknown_word_without_a_token_is_named(tmp_path, prepare, refused):
    save_tokenizer(tmp_path / "tokenizer.json", unknown="")
    (tmp_path / "text").write_text("other words")
    line = refused(*prepare(tmp_path / "text", "--tokenizer", tmp_path / "tokenizer.json"))
    assert "cannot encode the text" in line


MODULES = ["train", "sample", "sweep", "data", "support.hf", "lab.bench", "lab.tasks"]


@pytest.mark.parametrize("module", MODULES)
def test_ctrl_c_while_torch_is_imported(tmp_path, module):
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    line = [sys.executable, "-m", module]
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode in (130, -signal.SIGINT) and done.stderr == ""


@pytest.mark.parametrize("cut", [True, False])
def test_a_corpus_that_changes_while_it_is_read(corpus, tmp_path, script, refused, cut):
    mine = shutil.copytree(corpus, tmp_path / "data" / "own")
    given = ("train.py", *flags(mine, tmp_path / "run"))
    if cut:
        with at_step(2, lambda: os.truncate(mine / "train.bin", 100)):
            assert "train.bin was cut short while it was read" in refused(*given)
    else:
        with at_step(2, lambda: data.prepare(mine, lambda: [TEXT], "bytes", "another")):
            assert script(*given)[0] == 0


def test_modes_and_what_a_killed_command_left(tmp_path):
    left = tmp_path / ".x-1.new"
    left.mkdir()
    (left / "lock").touch()
    before = os.umask(0o077)
    data.prepare(tmp_path / "x", lambda: [TEXT], "bytes", "a test")
    os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o700 and os.listdir(tmp_path) == ["x"]
    file = tmp_path / "x" / "meta.json"
    file.chmod(0o640)
    cli.replace_file(file, b"{}")
    assert file.stat().st_mode & 0o777 == 0o640


# --- words ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line, said",
    [
        ("train.py wide.toml", "is UTF-16, not UTF-8 text; convert it"),
        ("train.py whole.toml", "max_iters = 600.0 is not a whole number"),
        ("train.py zero.toml", "batch_size = 0 is not valid"),
        ("lab/bench.py --train --config zero.toml --no_compile --device cpu", "batch_size = 0 is not valid"),
        ("train.py --init_from=hf:A/B", "A/B is no folder here; download it first: hf download NAME"),
        ("train.py --init_from=hf:", "hf: needs a folder, hf:FOLDER"),
        ("train.py --device=meta", "--device meta is not available here"),
        ("train.py --learning_rate=1e308 --min_lr=0", "must be below 1e+30"),
        ("train.py --plan=shared_v", "did you mean shared-v?"),
        ("sample.py run", "did you mean --out_dir run?"),
        ("sweep.py run", "did you mean --out_dir run?"),
        ("data.py x.txt", "did you mean --input x.txt?"),
        ("sample.py --out_dir .", "its runs are run"),
        ("sweep.py --out_dir run --plans full,cla:2", "separate plans by spaces"),
        ("train.py --out_dir=run --init_from=resume --max_iters=9 --data_dir=none", "--data_dir where"),
        ("data.py --input . --name x --glob /abs/*", "no file below . matches"),
        ("data.py --input . --name x --glob=", "must not be empty"),
    ],
)  # fmt: skip
def test_words(run, tmp_path, refused, monkeypatch, line, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wide.toml").write_text("n_layer = 2", encoding="utf-16")
    (tmp_path / "whole.toml").write_text("max_iters = 600.0")
    (tmp_path / "zero.toml").write_text("batch_size = 0")
    assert said in refused(*line.split())


def test_toml_with_a_byte_order_mark(tmp_path):
    (tmp_path / "x.toml").write_text('compile = "auto"', encoding="utf-8-sig")
    assert cli.read_toml(tmp_path / "x.toml", TrainConfig) == {"compile": None}
