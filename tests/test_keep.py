"""Nothing of the user's is lost, and what the program says is true: folders, pipes, signals, tokenizers,
exports, printed commands. One test or more for each kind of fault that people have met."""

import gzip
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import data
import train
from support import cli, parallel, runs
from support.cli import UserError
from support.hf import load_hf, save_hf
from support.plots import STYLES, line, picture, style
from support.runs import load_checkpoint, load_run

import pytest
import torch
from conftest import ROOT
from test_faults import at_step, flags

pytestmark = pytest.mark.faults
TEXT = "the cat sat on the mat\n" * 200


def contents(folder: Path) -> dict:
    """All files below a folder, with their bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory) -> Path:
    """A finished run of four steps."""
    out, argv = tmp_path_factory.mktemp("kept") / "run", sys.argv
    sys.argv = ["train.py", *flags(corpus, out, max_iters=4)]
    train.main()
    sys.argv = argv
    return out


@pytest.fixture
def copy(run, tmp_path) -> Path:
    return shutil.copytree(run, tmp_path / "copy")


@pytest.fixture
def folder(run, tmp_path) -> Path:
    """The run as a Hugging Face folder."""
    pytest.importorskip("safetensors")
    save_hf(load_run(run)[0], tmp_path / "folder", run)
    return tmp_path / "folder"


# --- folders ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mine", "file", "link"])
def test_data_replaces_a_corpus_of_ours_and_nothing_else(name, tmp_path, refused, script):
    """Neither its input, nor what is something else, nor what a link leads to."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "text.txt").write_text(TEXT)
    (tmp_path / "file").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    before = contents(tmp_path)
    into = ("data.py", "--input", tmp_path / "mine", "--data_dir", tmp_path, "--tokenizer", "bytes", "--name")
    assert "is there and holds other things; choose a new name" in refused(*into, name)
    assert contents(tmp_path) == before
    for _ in range(2):  # a new one, and the same again
        assert script(*into, "new")[0] == 0
    # What a killed process has left behind is cleared away, in the folder that one sees.
    (tmp_path / ".new-0.new").mkdir()
    (tmp_path / ".new-0.new" / "lock").write_text("")
    assert script(*into, "new")[0] == 0
    assert sorted(os.listdir(tmp_path)) == ["file", "link", "mine", "new"]


def test_modes_are_the_users(tmp_path, script, copy):
    before = os.umask(0o077)
    try:
        (tmp_path / "text.txt").write_text(TEXT)
        into = ("--name", "new", "--data_dir", tmp_path, "--tokenizer", "bytes")
        assert script("data.py", "--input", tmp_path / "text.txt", *into)[0] == 0
        assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700
    finally:
        os.umask(before)
    (copy / "ckpt.pt").chmod(0o640)
    assert script("train.py", f"--out_dir={copy}", "--init_from=resume", "--max_iters=5")[0] == 0
    assert (copy / "ckpt.pt").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("where", ["folder", "copy", "link", "full"])
def test_an_export_makes_a_new_folder(where, run, copy, folder, tmp_path, refused):
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "generation_config.json").write_text("{}")
    before = contents(tmp_path)
    assert "is there and holds other things" in refused("support/hf.py", run, tmp_path / where)
    assert contents(tmp_path) == before


def test_an_export_appears_whole_or_not_at_all(run, tmp_path, script, monkeypatch):
    pytest.importorskip("safetensors")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)  # config.json, after the weights
        status, _, err = script("support/hf.py", run, tmp_path / "new")
    assert status == 2 and f"cannot read or write {tmp_path / 'new'}: No space left" in err
    assert not list(tmp_path.iterdir())
    assert script("support/hf.py", run, tmp_path / "new")[0] == 0
    names = {"config.json", "model.safetensors", "tokenizer.tiktoken"}
    assert set(os.listdir(tmp_path / "new")) == names


def test_a_run_starts_in_a_folder_that_is_new_empty_or_a_run(corpus, folder, tmp_path, refused, monkeypatch):
    before = contents(tmp_path)
    init = [f for f in flags(corpus, folder, init_from=f"hf:{folder}") if "--n_" not in f]
    assert "holds other things than a run" in refused("train.py", *init)
    monkeypatch.chdir(folder)  # an unset variable: --out_dir=$OUT
    assert "--out_dir '' is empty" in refused("train.py", *flags(corpus, ""))
    assert "holds other things than a run" in refused("train.py", *flags(corpus, "."))
    assert contents(tmp_path) == before


def test_a_run_whose_folder_became_anothers_does_not_save_into_it(corpus, tmp_path, refused):
    out = tmp_path / "run"

    def replace():
        shutil.rmtree(out)
        out.mkdir()
        (out / "run.lock").write_text("")

    with at_step(5, replace):
        assert "is another run's now" in refused("train.py", *flags(corpus, out))
    assert os.listdir(out) == ["run.lock"]


def test_the_lock_comes_before_the_checkpoint(copy, refused):
    held = cli.lock(copy / "run.lock")
    (copy / "ckpt.pt").write_bytes(b"half a checkpoint, which the other run is about to replace")
    assert "another run is at work" in refused("train.py", f"--out_dir={copy}", "--init_from=resume")
    held.close()


DENIED = PermissionError(13, "Permission denied")
ALLOCATION = RuntimeError("can't allocate memory")


@pytest.mark.parametrize(
    "error, said",
    [(DENIED, "Permission denied"), (MemoryError(), "out of memory"), (ALLOCATION, "out of memory")],
)
def test_only_damage_falls_back(error, said, copy, refused, monkeypatch):
    before = contents(copy)

    def load(path, **options):
        error.filename = str(path)
        raise error

    monkeypatch.setattr(torch, "load", load)
    line = refused("train.py", f"--out_dir={copy}", "--init_from=resume", "--max_iters=9")
    assert said in line and "ckpt.pt" in line and "damaged" not in line.replace("which is not damaged", "")
    assert contents(copy) == before


def test_a_run_goes_on_with_the_held_out_text_it_had(corpus, tmp_path, script, refused):
    mine, out = tmp_path / "data" / corpus.name, tmp_path / "run"
    shutil.copytree(corpus, mine)
    settings = {"data_dir": mine.parent, "max_iters": 2}
    assert script("train.py", *flags(corpus, out, **settings))[0] == 0
    (mine / "val.bin").write_bytes((mine / "val.bin").read_bytes()[2:])
    meta = json.loads((mine / "meta.json").read_text())
    meta["val"]["sha256"] = data.sha256(mine / "val.bin")
    (mine / "meta.json").write_text(json.dumps(meta))
    line = refused("train.py", f"--out_dir={out}", "--init_from=resume", "--max_iters=4")
    assert "is not the corpus that" in line


def test_a_corpus_cut_short_while_it_is_read(corpus, tmp_path):
    mine = shutil.copytree(corpus, tmp_path / "mine")
    tokens = data.Tokens(mine, "train", 16)
    os.truncate(mine / "train.bin", 1000)
    with pytest.raises(UserError, match="was cut short while it was read"):
        tokens.batch(0, 64, seed=0)


def test_results_are_replaced_only_by_results(copy, refused, script):
    assert script("sweep.py", "--out_dir", copy, "--windows", 2)[0] == 0
    before = contents(copy)
    assert "has no gates" in refused("sweep.py", "--out_dir", copy, "--plans", "0_k0+1v0+1")
    assert contents(copy) == before


# --- output, signals, ranks -------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", ["left", "full disk"])
def test_output_that_nobody_reads_stops_nothing(reader, corpus, tmp_path, monkeypatch):
    out = tmp_path / "run"
    if reader == "left":
        read, write = os.pipe()
        os.close(read)
        stream = open(write, "w", buffering=1)
    else:
        stream = open("/dev/full", "w", buffering=1)
    monkeypatch.setattr(sys, "argv", ["train.py", *flags(corpus, out)])
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    cli.run(train.main)
    assert load_checkpoint(out / "ckpt.pt")["step"] == 8
    assert json.loads((out / "log.jsonl").read_text().splitlines()[-1])["step"] == 8


def test_closed_output_and_a_signal_that_is_ignored(corpus, tmp_path):
    """`>&- 2>&-` from a shell; files must not take the place of what is closed. And nohup."""
    command = [sys.executable, "train.py", *flags(corpus, tmp_path / "run", max_iters=2)]
    shell = f"trap '' HUP; exec {shlex.join(command)} >&- 2>&-"
    done = subprocess.run(["sh", "-c", shell], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and load_checkpoint(tmp_path / "run" / "ckpt.pt")["step"] == 2


@pytest.mark.parametrize("ignored", [False, True])
def test_hanging_up_saves_unless_it_is_ignored(ignored, corpus, tmp_path, script, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        with at_step(2, lambda: os.kill(os.getpid(), signal.SIGHUP)):
            status, out, _ = script("train.py", *flags(corpus, tmp_path / "run"))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert status == (0 if ignored else 129)
    assert load_checkpoint(tmp_path / "run" / "ckpt.pt")["step"] == (8 if ignored else 3)


def test_ctrl_c_while_torch_is_imported_prints_nothing():
    code = "import support; raise KeyboardInterrupt"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
    assert done.returncode != 0 and done.stderr == b""
    for script in ("train", "sample", "sweep", "data"):  # and that is imported before torch is
        text = (ROOT / f"{script}.py").read_text()
        assert "\nfrom support" in text.partition("\nimport torch")[0].partition("\nimport numpy")[0]


@pytest.mark.parametrize(
    "variables, expected",
    [
        ({}, (0, 1)),
        ({"RANK": "1"}, (0, 1)),
        ({"WORLD_SIZE": "2"}, (0, 1)),
        ({"RANK": "", "WORLD_SIZE": ""}, (0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_PORT": "1"}, (0, 1)),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_PORT": "1"}, (1, 2)),
    ],
)
def test_variables_of_other_programs_are_not_torchruns(variables, expected, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert parallel.ranks() == expected


def test_printed_commands_can_be_pasted(corpus, tmp_path, script, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "my run　👩‍👧"  # with an ideographic space, and an emoji that is joined
    with at_step(2, lambda: os.kill(os.getpid(), signal.SIGINT)):
        status, text, _ = script("train.py", *flags(corpus, out))
    *_, printed = text.strip().splitlines()
    words = shlex.split(printed.partition("go on: ")[2])
    assert words == ["python", "train.py", f"--out_dir={out}", "--init_from=resume"]
    text = script(*words[1:])[1]
    commands = text.strip().splitlines()[-1].removeprefix("next: ").split("; ")
    assert [shlex.split(command)[-1] for command in commands] == [str(out)] * 2
    monkeypatch.setattr(sys, "argv", ["my lab/variant.py"])
    assert parallel.launcher() == "python 'my lab/variant.py'"
    monkeypatch.setattr(parallel, "RANKS", 2)
    assert parallel.launcher().startswith("torchrun --standalone --nproc_per_node=2 ")


def test_home_is_expanded_wherever_a_path_comes_from(corpus, tmp_path, script, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.toml").write_text('out_dir = "~/toml"\n')
    given = [f for f in flags(corpus, "", max_iters=1) if "out_dir" not in f]
    assert script("train.py", "~/x.toml", *given)[0] == 0
    assert script("train.py", *given, "--out_dir=~/flag")[0] == 0
    assert script("support/hf.py", "~/flag", "~/folder")[0] == 0
    sizes = [f for f in given if "--n_" not in f]
    assert script("train.py", *sizes, "--init_from=hf:~/folder", "--out_dir=~/tuned")[0] == 0
    (tmp_path / "prompt").write_text("def")
    sample = ("sample.py", "--out_dir=~/flag", "--start=FILE:~/prompt", "--max_new_tokens=2")
    assert script(*sample)[0] == 0
    names = {"x.toml", "toml", "flag", "folder", "tuned", "prompt"}
    assert set(os.listdir(tmp_path)) == names


# --- texts and tokenizers ---------------------------------------------------------------------------------


@pytest.fixture
def tokenizer():
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator([TEXT], vocab_size=300, special_tokens=["<|endoftext|>", "[STOP]"])
    return made._tokenizer


def test_a_tokenizer_file_gives_ids_and_nothing_else(tokenizer, tmp_path):
    text = "the cat sat <|endoftext|> on the mat " * 50
    tokenizer.save(str(tmp_path / "plain.json"))
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=9)
    tokenizer.model.dropout = 0.9
    tokenizer.save(str(tmp_path / "loaded.json"))
    plain, loaded = (data.JsonTokenizer(tmp_path / f"{name}.json") for name in ("plain", "loaded"))
    ids = loaded.encode_ordinary(text)
    assert ids == plain.encode_ordinary(text) and loaded.decode(ids) == text
    assert loaded.eot_token not in ids  # text that spells a special token is text


@pytest.mark.parametrize("place", ["tokenizer_config.json", "config.json", "an object"])
def test_the_end_of_a_text_is_the_one_that_the_folder_names(place, tokenizer, tmp_path, script):
    end = {"tokenizer_config.json": "[STOP]", "config.json": tokenizer.token_to_id("[STOP]")}
    value = {"content": "[STOP]"} if place == "an object" else end[place]
    name = "config.json" if place == "config.json" else "tokenizer_config.json"
    key = "eos_token_id" if place == "config.json" else "eos_token"
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / name).write_text(json.dumps({key: value}))
    (tmp_path / "text.txt").write_text(TEXT)
    into = ("--name", "new", "--data_dir", tmp_path, "--tokenizer", tmp_path / "tokenizer.json")
    assert script("data.py", "--input", tmp_path / "text.txt", *into)[0] == 0
    assert data.load_tokenizer(tmp_path / "new").eot == "[STOP]"  # copied, so that a run has it too


def test_a_tokenizer_without_an_end_or_an_unknown_token(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="[UNK]"))
    words.save(str(tmp_path / "x.json"))
    with pytest.raises(UserError, match="name its own as eos_token in tokenizer_config.json"):
        data.JsonTokenizer(tmp_path / "x.json")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "a"}')
    with pytest.raises(UserError, match="cannot encode the text"):
        data.JsonTokenizer(tmp_path / "x.json").encode_ordinary("b")


def test_what_is_left_out_of_a_folder_is_said(tmp_path, script, monkeypatch):
    texts = tmp_path / "texts"
    texts.mkdir()
    for name in ("a", "b", "locked"):
        (texts / f"{name}.txt").write_text(TEXT)
    (tmp_path / "elsewhere").mkdir()
    (texts / "linked").symlink_to(tmp_path / "elsewhere")
    read = Path.read_bytes

    def denied(path):
        if path.name == "locked.txt":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", denied)
    into = ("--name", "new", "--data_dir", tmp_path, "--tokenizer", "bytes")
    status, out, _ = script("data.py", "--input", texts, *into)
    assert status == 0 and "left out: 2 below" in out and "linked: a link" in out
    assert "Permission denied" in out and "UTF-8" not in out


def test_text_without_spaces_and_a_million_blanks(tmp_path, script):
    ranks = data.train_bpe(["acgt" * 5000], 400)
    assert max(map(len, ranks)) <= data.LONGEST_WORD
    assert max(len(piece) for piece in data.pieces("x" * 10**6)) < 2**20
    (tmp_path / "blank.txt").write_text(" " * 1_200_000 + TEXT)
    into = ("--name", "new", "--data_dir", tmp_path, "--tokenizer", "bpe:300")
    assert script("data.py", "--input", tmp_path / "blank.txt", *into)[0] == 0


def test_text_from_a_pipe(tmp_path, script):
    read, write = os.pipe()
    os.write(write, TEXT.encode())
    os.close(write)
    into = ("--name", "new", "--data_dir", tmp_path, "--tokenizer", "bytes")
    assert script("data.py", "--input", f"/dev/fd/{read}", *into)[0] == 0


@pytest.mark.parametrize("kind", ["jsonl.gz", "csv", "slice", "config"])
def test_datasets_of_all_kinds(kind, tmp_path, script, refused):
    pytest.importorskip("datasets")
    rows = [f"row {i} of the text" for i in range(40)]
    into = ("--data_dir", tmp_path / "data", "--tokenizer", "bytes", "--name", "new")
    if kind == "jsonl.gz":
        with gzip.open(tmp_path / "x.jsonl.gz", "wt") as file:
            file.writelines(json.dumps({"text": row}) + "\n" for row in rows)
        file = tmp_path / "x.jsonl.gz"
    else:
        file = tmp_path / "x.csv"
        file.write_text("text,n\n" + "".join(f"{row},{i}\n" for i, row in enumerate(rows)))
    more = {"slice": ("--split", "train[:50%]"), "config": ("--column", "n")}.get(kind, ())
    if kind == "config":  # numbers are no text
        assert "no text in a column 'n'; it has text, n" in refused("data.py", "--hf", file, *into, *more)
        return
    assert script("data.py", "--hf", file, *into, *more)[0] == 0
    meta = data.read_meta(tmp_path / "data" / "new")
    taken = rows[:20] if kind == "slice" else rows
    assert meta["train"]["bytes"] + meta["val"]["bytes"] == sum(map(len, taken))


def test_prompts_stay_as_they_are(run, script):
    sample = ("sample.py", "--out_dir", run, "--max_new_tokens", 1, "--start")
    status, text, _ = script(*sample, "--my-flag is")
    assert status == 0 and "\n--my-flag is" in text
    assert script(*sample, "\udcff")[0] == 0
    assert script("sample.py", "--out_dir", run, "--start", "def")[0] == 0  # what fits a context of 16


# --- Hugging Face folders ---------------------------------------------------------------------------------


def test_weights_are_checked_and_every_usual_form_is_read(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    file, good = folder / "model.safetensors", load_hf(folder).state_dict()
    tensors = load_file(file)
    norm, embed = "model.norm.weight", "model.embed_tokens.weight"

    def write(changed: dict, path: Path = file):
        save_file({name: t.clone() for name, t in changed.items()}, path)

    for bad in (tensors[norm].int(), tensors[norm] > 0, tensors[norm] * math.nan):
        write(tensors | {norm: bad})
        with pytest.raises(UserError, match=f"tensor {norm} is .*, or not finite"):
            load_hf(folder)
    base = {name.removeprefix("model."): t for name, t in tensors.items()}
    tied_under_the_other_name = {k: t for k, t in tensors.items() if k != embed}
    tied_under_the_other_name["lm_head.weight"] = tensors[embed]
    for usual in (base, tied_under_the_other_name):
        write(usual)
        assert all(torch.equal(p, good[name]) for name, p in load_hf(folder).state_dict().items())
    write(tensors)
    write({norm: tensors[norm]}, folder / "model-2.safetensors")
    with pytest.raises(UserError, match=f"has {norm} in two of its files"):
        load_hf(folder)
    (folder / "model-2.safetensors").unlink()
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(UserError, match="is a pointer of git-lfs in place of the weights; git lfs pull"):
        load_hf(folder)


# --- plans that were searched, pictures, compilation -------------------------------------------------------


def test_a_searched_plan_names_its_weights(copy, script, refused):
    sample = ("sample.py", "--out_dir", copy, "--plan", "auto:0.5", "--max_new_tokens", 2)
    assert script("sweep.py", "--out_dir", copy, "--search", "--windows", 4)[0] == 0
    assert "other weights" not in script(*sample)[2]
    assert script("train.py", f"--out_dir={copy}", "--init_from=resume", "--max_iters=8")[0] == 0
    status, _, err = script(*sample)
    assert status == 0 and "was searched at step 4, with other weights; search again" in err
    row = {"plan": "full", "cache_ratio": 0.1, "calibration_loss": 1.0}  # which lies about its ratio
    for bad in (row, row | {"plan": "keep:0", "calibration_loss": math.nan}, row | {"plan": "0_1_2"}):
        (copy / "search.jsonl").write_text(json.dumps(bad) + "\n")
        assert "takes one from" in refused(*sample)


def test_runs_of_any_name_have_their_place_in_a_picture(tmp_path):
    names = ["_hidden", "$x_$", *"abcdefgh"]
    with picture(tmp_path / "x.png") as ax:
        for i, name in enumerate(names):
            line(ax, [0, 1], [i, i], i, name)
        assert [label.strip() for label in ax.get_legend_handles_labels()[1]] == names
    assert len({style(i) for i in range(3 * len(STYLES))}) == 3 * len(STYLES)


BROKEN_COMPILER = """#!/bin/sh
case "$*" in *--version*) echo "g++ 12.0.0"; exit 0;; esac
echo "main.cpp:1:10: fatal error: 'omp.h' file not found" >&2
exit 1
"""


def test_compiling_is_tried_before_it_is_relied_on(tmp_path):
    compiler = tmp_path / "bin" / "g++"
    compiler.parent.mkdir()
    compiler.write_text(BROKEN_COMPILER)
    compiler.chmod(0o755)
    path = f"{compiler.parent}{os.pathsep}{os.environ['PATH']}"
    environment = {"PATH": path, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "CXX": "g++"}
    code = "from support.devices import pick_compile; print(pick_compile(None, 'cpu', 1e15))"
    options = {"cwd": ROOT, "env": os.environ | environment, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-c", code], **options)
    assert done.stdout.startswith("(False, \"it fails here: main.cpp:1:10: fatal error: 'omp.h'"), done.stderr


# --- words ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command, said",
    [
        (["train.py", "--init_from=hf:"], "hf: needs a folder, hf:FOLDER"),
        (["train.py", "--init_from=hf:Org/Name"], "is no folder here; download it first: hf download NAME"),
        (["train.py", "--plan=shared_v"], "did you mean shared-v?"),
        (["train.py", "--compile=perhaps"], "'perhaps' is not true, false or auto"),
        (["train.py", "--max_iters=600.0"], "'600.0' is not a whole number"),
        (["train.py", "--device=meta"], "--device meta is not available here"),
        (["train.py", "--learning_rate=1e308", "--min_lr=0"], "must be below 1e+30"),
        (["train.py", "wide.toml"], "wide.toml is UTF-16, not UTF-8 text"),
        (["sample.py", "out/x"], "unknown argument out/x; did you mean --out_dir out/x?"),
        (["sweep.py", "out/x", "--out_dir", "run"], "did you mean --out_dir out/x?"),
        (["data.py", "x.txt"], "did you mean --input x.txt?"),
        (["data.py", "--input", ".", "--name", "x", "--glob", "/abs/*"], "no file below"),
        (["sweep.py", "--out_dir", "run", "--plans", "full,keep:0"], "separate plans by spaces"),
        (["sweep.py", "--out_dir", "."], "no checkpoint in .; its runs are run"),
        (["lab/bench.py", "--train", "--config", "zero.toml"], "batch_size = 0 is not valid"),
    ],
)  # fmt: skip
def test_words(command, said, run, tmp_path, refused, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run, "run")
    Path("wide.toml").write_bytes("n_layer = 3\n".encode("utf-16"))
    Path("zero.toml").write_text("batch_size = 0\n")
    assert said in refused(*command)


def test_a_byte_order_mark_in_toml(tmp_path):
    (tmp_path / "x.toml").write_bytes(b"\xef\xbb\xbf" + b'n_layer = 3\ncompile = "auto"\n')
    assert cli.read_toml(tmp_path / "x.toml", train.TrainConfig) == {"n_layer": 3, "compile": None}


def test_a_full_disk_names_the_file(copy, refused, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    line = refused("train.py", f"--out_dir={copy}", "--init_from=resume", "--max_iters=6")
    assert f"{copy}" in line and "No space left on device" in line


def test_a_resume_from_elsewhere_names_data_dir(copy, refused, monkeypatch, tmp_path):
    checkpoint = load_checkpoint(copy / "ckpt.pt")
    checkpoint["config"]["data_dir"] = "data"
    torch.save(checkpoint, copy / "ckpt.pt")
    monkeypatch.chdir(tmp_path)
    line = refused("train.py", f"--out_dir={copy}", "--init_from=resume", "--max_iters=6")
    assert "no tokenized corpus in data/own; " in line and "--data_dir where others are" in line
    assert runs.find_checkpoint(copy)[1]["step"] == 4
