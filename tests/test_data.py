import hashlib
import json
import os
import random
import re
from collections import Counter
from pathlib import Path

import data
from support.cli import UserError

import numpy as np
import pytest

TEXTS = [
    "the cat sat on the mat, the cat!\n    def f(x):\n        return x_1 + 123456\n" * 3,
    "äöü → 日本 🎉🎉🎉 the the\r\n\r\n\tx",
]


def slow_bpe(texts, vocab_size):
    """The definition: recount all pairs after every merge; the most frequent first, ties to lower ids."""
    words = [w for text in texts for w in re.findall(data.PATTERN, text)]
    words = [list(w[i : i + 32].encode()) for w in words for i in range(0, len(w), 32)]
    tokens = [bytes([b]) for b in range(256)]
    while len(tokens) < vocab_size - 1:
        pairs = Counter(p for word in words for p in zip(word, word[1:]))
        best = min(pairs, key=lambda p: (-pairs[p], p), default=None)
        if best is None or pairs[best] < 2:
            break
        for w, word in enumerate(words):
            out = []
            for token in word:
                out.append(token)
            i = 0
            while i < len(out) - 1:
                if (out[i], out[i + 1]) == best:
                    out[i : i + 2] = [len(tokens)]
                i += 1
            words[w] = out
        tokens.append(tokens[best[0]] + tokens[best[1]])
    return tokens


@pytest.mark.parametrize("vocab_size", [257, 258, 300, 5000])
def test_bpe_equals_the_slow_definition(vocab_size):
    texts = [*TEXTS, "aaaaaa aaaa aaaaaaa abababab", Path(data.__file__).read_text()[:4000]]
    assert list(data.train_bpe(texts, vocab_size)) == list(dict.fromkeys(slow_bpe(texts, vocab_size)))


def test_bpe_docstring_example():
    ranks = data.train_bpe(["aaab aaab"], 259)
    assert sorted(ranks, key=ranks.get)[256:] == [b"aa", b"ab"]


@pytest.fixture(scope="module")
def enc():
    return data.encoding("test", data.train_bpe(TEXTS, 400))


def test_any_bytes_and_any_text_round_trip(enc):
    rng = random.Random(0)
    for _ in range(300):
        raw = rng.randbytes(rng.randint(0, 60))
        assert b"".join(map(enc.decode_single_token_bytes, enc._encode_bytes(raw))) == raw
        ranges = [(32, 127), (9, 14), (0, 0xD800), (0xE000, 0x110000)]  # all of Unicode but surrogates
        text = "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randint(0, 40)))
        assert enc.decode(enc.encode_ordinary(text)) == text
    assert enc.encode_ordinary(data.END_OF_TEXT) != [enc.eot_token]  # text cannot forge a document's end


def test_bpe_compresses_what_it_was_trained_on(enc):
    text = TEXTS[0]
    assert len(enc.encode_ordinary(text)) < len(text.encode()) / 2.5


def test_documents_are_held_out_whole_or_at_the_end():
    many = [f"document {i}" for i in range(60)]
    split = list(data.split_documents(many))
    assert [text for text, _ in split] == many
    assert [text for text, part in split if part == "val"] == ["document 19", "document 39", "document 59"]
    few = list(data.split_documents(["line\n" * 100, "x" * 1000]))
    assert "".join(text for text, _ in few) == "line\n" * 100 + "x" * 1000
    assert [part for _, part in few] == ["train", "val"] * 2
    assert len(few[1][0]) == 25 and len(few[3][0]) == 50
    title = list(data.split_documents(["Title\n" + "x" * 994]))
    assert len(title[1][0]) == 50  # an early line end does not hold out the whole text


def test_pieces_join_to_the_text():
    for text in ("", "a", "ab\ncd\n" * 7, "x" * 50, "\n" * 9, "日本\n語" * 9):
        for size in (1, 3, 10):
            pieces = list(data.pieces(text, size))
            assert "".join(pieces) == text and all(0 < len(p) <= size for p in pieces)


def test_prepared_files_hold_the_text(tmp_path):
    folder = tmp_path / "data" / "mine"
    for tokenizer in ("bpe:300", "bytes"):
        meta = data.prepare(folder, lambda: TEXTS, tokenizer, "a test")
        enc = data.load_tokenizer(folder)
        assert meta == json.loads((folder / "meta.json").read_text()) and meta["vocab_size"] == enc.n_vocab
        for split in ("train", "val"):
            raw = (folder / f"{split}.bin").read_bytes()
            ids = np.frombuffer(raw, "<u2").tolist()
            assert (
                hashlib.sha256(raw).hexdigest() == meta[split]["sha256"] and len(ids) == meta[split]["tokens"]
            )
            documents = [text for text, part in data.split_documents(TEXTS) if part == split]
            assert enc.decode(ids) == "".join(text + data.END_OF_TEXT for text in documents)
            assert meta[split]["bytes"] == sum(len(text.encode()) for text in documents)
    assert os.listdir(tmp_path / "data") == ["mine"]


def test_large_vocabularies_take_four_bytes(tmp_path):
    ranks = {bytes([b]): b for b in range(256)} | {b"%08d" % i: 256 + i for i in range(70_000)}
    file = tmp_path / "big.tiktoken"
    file.write_bytes(b"".join(data.base64.b64encode(t) + b" %d\n" % r for t, r in ranks.items()))
    meta = data.prepare(tmp_path / "big", lambda: TEXTS, str(file), "a test")
    assert meta["dtype"] == "uint32" and meta["vocab_size"] == 70_257
    x, y = data.Tokens(tmp_path / "big", "train", 8).batch(0, 2, seed=0)
    assert x.shape == (2, 8) and (x[:, 1:] == y[:, :-1]).all()


def test_files_and_folders_from_the_command_line(tmp_path, script):
    folder = tmp_path / "texts"
    (folder / "sub").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / ".git" / "binary").write_bytes(b"\xff\xfe")
    for i in range(25):
        (folder / "sub" / f"{i}.txt").write_text(f"this is file number {i}\n" * 20)
    for path, name in ((folder, "many"), (folder / "sub" / "3.txt", "one")):
        status, out, _ = script(
            "data.py", "--input", path, "--name", name, "--data_dir", tmp_path, "--tokenizer", "bpe:270"
        )
        assert status == 0 and "bytes/token" in out
    assert data.read_meta(tmp_path / "many")["val"]["bytes"] in (460, 480)  # one whole file of 25
    assert data.read_meta(tmp_path / "many")["train"]["bytes"] > 24 * 400


def test_the_default_corpus_is_the_standard_library():
    paths = data.python_corpus()
    names = {p.name for p in paths}
    assert {"argparse.py", "dataclasses.py", "tokenize.py"} <= names and len(paths) > 400
    assert not any(part in ("test", "tests", "site-packages") for p in paths for part in p.parts[-4:])
    assert paths == data.python_corpus() and paths[:20] != sorted(paths)[:20]


def make_corpus(script, folder: Path, *flags) -> tuple[dict, str]:
    """Runs data.py --input FOLDER; returns the meta data of what it has made, and what it has said."""
    to = folder.parent / "data"
    flags = ("--input", folder, "--name", "x", "--data_dir", to, "--tokenizer", "bytes", *flags)
    status, out, _ = script("data.py", *flags)
    assert status == 0
    return data.read_meta(to / "x"), out


def test_a_byte_order_mark_is_no_text(tmp_path):
    text = "first line\nnaïve\n"
    for start in (b"", b"\xef\xbb\xbf"):
        (tmp_path / "a.txt").write_bytes(start + text.encode())
        assert data.read_text(tmp_path / "a.txt") == text
    inside = text + "\ufeff" + text  # elsewhere it is a character like others
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + inside.encode())
    assert data.read_text(tmp_path / "a.txt") == inside


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_is_recognised(encoding, tmp_path, script, refused):
    folder = tmp_path / "texts"
    folder.mkdir()
    mark = "" if encoding == "utf-16" else "\ufeff"  # which Python writes by itself only there
    (folder / "wide.txt").write_bytes((mark + "some text\n" * 99).encode(encoding))
    for path in (folder / "wide.txt", folder):  # alone, and as all that is in a folder
        line = refused("data.py", "--input", path, "--name", "x", "--data_dir", tmp_path / "data")
        assert "wide.txt" in line and "UTF-16" in line and "iconv -f UTF-16 -t UTF-8" in line
    for name in ("a.txt", "b.txt"):
        (folder / name).write_text("some text\n" * 99)
    meta, out = make_corpus(script, folder)
    assert meta["train"]["bytes"] + meta["val"]["bytes"] == 2 * 990
    assert f"left out: 1 below {folder}: {folder / 'wide.txt'} is UTF-16" in out


def test_a_folder_with_pictures_among_the_texts(tmp_path, script, refused):
    folder = tmp_path / "texts"
    (folder / "sub").mkdir(parents=True)
    for i in range(6):
        (folder / "sub" / f"{i}.txt").write_text(f"this is file number {i}\n" * 20)
    for i in range(5):
        (folder / f"photo{i}.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)))
    meta, out = make_corpus(script, folder)
    assert meta["train"]["bytes"] + meta["val"]["bytes"] == 6 * 440
    one = r"\S+photo\d.png is not UTF-8 text .*"
    assert re.search(rf"left out: 5 below {folder}: ({one}; ){{3}}\.\.\.\n", out)
    chosen, out = make_corpus(script, folder, "--glob", "*.txt")
    assert chosen["train"]["bytes"] + chosen["val"]["bytes"] == 6 * 440 and "left out" not in out
    some, out = make_corpus(script, folder, "--glob", "[01]*")
    assert some["train"]["bytes"] + some["val"]["bytes"] == 2 * 440 and "left out" not in out

    for i in (5, 6):
        (folder / f"photo{i}.png").write_bytes(b"\xff\xd8\xff\xe0" + bytes(range(256)))
    flags = ("--input", folder, "--name", "y", "--data_dir", tmp_path / "data")
    line = refused("data.py", *flags)
    assert f"most cannot be used, 7 below {folder}: " in line and "--glob '*.txt'" in line
    assert "no file below" in refused("data.py", *flags, "--glob", "*.md")
    assert "most cannot be used, 7 below" in refused("data.py", *flags, "--glob", "*.png")
    assert sorted(os.listdir(tmp_path / "data")) == ["x"]


def byte_level_tokenizer():
    """Like GPT-2's or Llama 3's, with one byte-pair merge inside a character and one across two."""
    pytest.importorskip("tokenizers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    sun, half = (pre_tokenizers.ByteLevel(False, use_regex=False).pre_tokenize_str(c)[0][0] for c in "日é")
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), (sun[0], sun[1]), (half[1], sun[0])]
    tokens = [*letters, *("".join(pair) for pair in merges), "<|endoftext|>"]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


def sentencepiece_tokenizer():
    """Like those of Llama 2 and Mistral: spaces as ▁, bytes for unknown characters, a BOS in front."""
    pytest.importorskip("tokenizers")
    from tokenizers import Tokenizer, decoders, models, normalizers, processors

    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "▁"), ("▁", "c")]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    tokens += [*"abcdefghijklmnopqrstuvwxyz▁.,é", *("".join(pair) for pair in merges)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    model = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    bos = [("<s>", tokenizer.token_to_id("<s>"))]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=bos)
    return tokenizer


@pytest.fixture(params=["tiktoken", "byte level", "sentencepiece"])
def any_enc(request, enc, tmp_path):
    """A tokenizer of each kind that data.py takes."""
    if request.param == "tiktoken":
        return enc
    make = byte_level_tokenizer if request.param == "byte level" else sentencepiece_tokenizer
    make().save(str(tmp_path / "tokenizer.json"))
    return data.JsonTokenizer(tmp_path / "tokenizer.json")


def streamed(enc, ids: list[int]) -> tuple[list[str], str]:
    """What TextStream gives out for every token, and at the end."""
    stream = data.TextStream(enc)
    return [stream(token) for token in ids], stream.rest()


@pytest.mark.parametrize(
    "text",
    ["the cat, the hat", " the  cat", "  a", "日本é日 the é", "🎉🎉 the 🎉", "a\n\n\tthe\r\n", "é", " ", ""],
)
def test_a_stream_of_tokens_joins_to_the_text(any_enc, text):
    ids = any_enc.encode_ordinary(text)
    pieces, rest = streamed(any_enc, ids)
    assert "".join(pieces) == text == any_enc.decode(ids) and rest == ""
    assert not any("\ufffd" in piece for piece in pieces)
    # Text is given out as soon as it is there: nothing waits but the bytes of an unfinished character.
    for n in range(len(ids)):
        so_far = any_enc.decode(ids[:n])
        if not so_far.endswith("\ufffd"):
            assert "".join(pieces[:n]) == so_far


def test_a_stream_of_any_text_joins_to_it(any_enc):
    rng = random.Random(0)
    for _ in range(200):
        text = "".join(rng.choice(["the", " ", "é", "日", "🎉", "\n", "x", "\ufffd"]) for _ in range(12))
        pieces, rest = streamed(any_enc, any_enc.encode_ordinary(text))
        assert "".join(pieces) + rest == text


def test_a_stream_of_tokens_that_are_no_text(any_enc):
    """Half characters at the end, and ends of a text between words."""
    half = any_enc.encode_ordinary("the 𝄞")[:-1]
    pieces, rest = streamed(any_enc, half)
    assert "".join(pieces) == "the " and set(rest) == {"\ufffd"}
    the, end = any_enc.encode_ordinary("the"), any_enc.eot_token
    pieces, rest = streamed(any_enc, [*the, end, *the])
    assert "".join(pieces) + rest == any_enc.decode([*the, end, *the]) and pieces[0] != ""


def test_what_a_tokenizer_puts_in_front_of_every_text(tmp_path):
    for make, start, end in (
        (byte_level_tokenizer, [], "<|endoftext|>"),
        (sentencepiece_tokenizer, [1], "</s>"),
    ):
        tokenizer, folder = make(), tmp_path / make.__name__
        file = tmp_path / f"{make.__name__}.json"
        tokenizer.save(str(file))
        documents = [f"the cat and the hat, {'abc' * (i % 7)}.\n" for i in range(60)] + [""]
        meta = data.prepare(folder, lambda documents=documents: documents, str(file), "a test")
        enc = data.load_tokenizer(folder)
        assert enc.start == start and enc.n_vocab == meta["vocab_size"]
        expected = {"train": [], "val": []}
        for text, part in data.split_documents(documents):
            if text:
                expected[part] += [*tokenizer.encode(text).ids, tokenizer.token_to_id(end)]
        for part in ("train", "val"):
            ids = np.frombuffer((folder / f"{part}.bin").read_bytes(), "<u2").tolist()
            assert ids == expected[part] and len(ids) == meta[part]["tokens"]
        assert data.prompt(enc, "the hat") == tokenizer.encode("the hat").ids
        assert data.prompt(enc, "") == (start or [enc.eot_token])


def test_prompts_of_our_own_tokenizers(enc):
    assert data.prompt(enc, "the cat") == enc.encode_ordinary("the cat")
    assert data.prompt(enc, "") == [enc.eot_token]


def test_bits_per_byte(tmp_path):
    """Of a model that finds all 256 bytes equally likely: 8, with a token for every byte and one per text."""
    text = "abcdefghij" * 20
    meta = data.prepare(tmp_path / "x", lambda: [text], "bytes", "a test")
    for split in ("train", "val"):
        n, n_bytes = meta[split]["tokens"], meta[split]["bytes"]
        bpb = data.Tokens(tmp_path / "x", split, 4).bits_per_byte(np.log(256))
        assert n == n_bytes + 1 and bpb == pytest.approx(8 * n / n_bytes)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_hugging_face_datasets_from_a_local_file(tmp_path, kind, script, refused):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict(
        {"body": [f"row number {i} of the text\n" for i in range(60)], "n": list(range(60))}
    )
    file = tmp_path / f"rows.{kind}"
    (rows.to_json if kind == "jsonl" else rows.to_parquet)(str(file))
    flags = ("--hf", file, "--data_dir", tmp_path / "data", "--tokenizer", "bytes")
    status, out, _ = script("data.py", *flags, "--column", "body")
    assert status == 0
    meta = data.read_meta(tmp_path / "data" / "rows")
    assert meta["val"]["tokens"] == sum(len(f"row number {i} of the text\n") + 1 for i in (19, 39, 59))
    assert "no text in a column 'text'; it has body, n" in refused("data.py", *flags)
    assert "no text in a column 'n'" in refused("data.py", *flags, "--column", "n")
    assert "--hf" in refused("data.py", *flags, "--split", "nope:")


def test_batches_are_a_pure_function_of_the_step(corpus):
    a, b = (data.Tokens(corpus, "train", 16) for _ in range(2))
    steps = [0, 7, 3, 900, 3]
    for i in steps:
        (x, y), (x2, y2) = a.batch(i, 4, seed=1), b.batch(i, 4, seed=1)
        assert (x == x2).all() and (y == y2).all() and (x[:, 1:] == y[:, :-1]).all()
    assert (a.batch(0, 4, seed=1)[0] != a.batch(0, 4, seed=2)[0]).any()
    assert (a.batch(0, 4, seed=1)[0] != a.batch(1, 4, seed=1)[0]).any()


def test_an_epoch_visits_every_window_once(corpus):
    tokens = data.Tokens(corpus, "train", 16)
    n = tokens.n_windows
    for epoch in range(3):
        starts = [tokens._start(i, seed=5) for i in range(epoch * n, (epoch + 1) * n)]
        assert len(set(s // 16 for s in starts)) == n and len({s % 16 for s in starts}) == 1
        assert 0 <= min(starts) and max(starts) + 16 < tokens.n_tokens
    first, second = ([tokens._start(i, seed=5) for i in range(e * n, e * n + 50)] for e in (0, 1))
    assert first != second


def test_held_out_windows_are_fixed_and_disjoint(corpus):
    tokens = data.Tokens(corpus, "val", 16)
    for n in (1, 7, 10_000):
        x = np.concatenate([x.numpy() for x, _ in tokens.held_out(n, 4)])
        assert len(x) == min(n, tokens.n_windows)
        again = np.concatenate([x.numpy() for x, _ in tokens.held_out(n, 3)])
        assert (x == again).all()
    whole = np.concatenate([y.numpy().ravel() for _, y in tokens.held_out(10_000, 4)])
    assert (whole == np.fromfile(corpus / "val.bin", "<u2")[1 : 1 + len(whole)]).all()


def test_a_corpus_of_one_window(tmp_path):
    data.prepare(tmp_path / "tiny", lambda: ["abcdefghij" * 20], "bytes", "a test")
    n = data.read_meta(tmp_path / "tiny")["val"]["tokens"]
    tokens = data.Tokens(tmp_path / "tiny", "val", n - 1)
    assert tokens.n_windows == 1 and tokens.batch(3, 2, seed=0)[0].shape == (2, n - 1)
    with pytest.raises(UserError, match="too few for a window"):
        data.Tokens(tmp_path / "tiny", "val", n)


def test_damaged_corpora_are_refused(tmp_path):
    folder = tmp_path / "bad"
    data.prepare(folder, lambda: TEXTS * 20, "bpe:300", "a test")
    for split in ("train", "val"):
        file = folder / f"{split}.bin"
        raw = file.read_bytes()
        for bad in (raw[:-10], raw[:100] + b"\x01" + raw[101:], None):  # one has a single wrong byte
            file.write_bytes(bad) if bad else file.unlink()
            with pytest.raises(UserError, match=f"{split}.bin is missing or its sha256 is not that in"):
                data.Tokens(folder, split, 8)
        file.write_bytes(raw)
        data.Tokens(folder, split, 8)
    (folder / "meta.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        data.Tokens(folder, "train", 8)
    for text in ("not a tokenizer", "YQ== x\n", "YQ== 0\n"):
        (tmp_path / "x.tiktoken").write_text(text)
        with pytest.raises(UserError, match="x.tiktoken is not"):
            data.read_ranks(tmp_path / "x.tiktoken")


def test_mistakes_get_one_line_and_leave_nothing(tmp_path, refused, monkeypatch):
    latin, empty, missing, mine = (tmp_path / name for name in ("latin.txt", "empty.txt", "none.txt", "data"))
    latin.write_bytes("naïve".encode("latin-1"))
    empty.write_text("")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there: the same as no network
    to = ("--name", "x", "--data_dir", mine)
    assert "latin.txt is not UTF-8 text (byte 2)" in refused("data.py", "--input", latin, *to)
    assert "too short" in refused("data.py", "--input", empty, *to)
    assert "No such file" in refused("data.py", "--input", missing, *to)
    assert "--name" in refused("data.py", "--input", latin)
    assert "plain folder name" in refused("data.py", "--input", latin, "--name", "../x", "--data_dir", mine)
    assert "not allowed with argument --input" in refused("data.py", "--input", latin, "--dataset", "python")
    assert "valid are bpe:SIZE" in refused("data.py", "--tokenizer", "bpe", "--data_dir", mine)
    assert "bpe:257" in refused("data.py", "--tokenizer", "bpe:100", "--data_dir", mine)
    assert "did you mean --tokenizer" in refused("data.py", "--tokeniser", "bytes")
    assert "go online" in refused("data.py", "--dataset", "shakespeare", "--data_dir", mine)
    assert "go online" in refused("data.py", "--tokenizer", "gpt2", "--data_dir", mine)
    assert not mine.exists() or not list(mine.iterdir())
