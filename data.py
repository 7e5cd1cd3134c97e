"""Text in, tokens out: tokenizers, `train.bin` and `val.bin`, and the batches that training reads.

python data.py                                       the default corpus: this Python's standard library
python data.py --dataset shakespeare                 downloads 1 MB
python data.py --input FILE_OR_FOLDER --name NAME    your own UTF-8 text; --glob '*.txt' takes some files
python data.py --hf NAME [--split S --column C]      a Hugging Face dataset, or a local .jsonl or .parquet
"""

import base64
import hashlib
import heapq
import http.client
import itertools
import json
import math
import os
import random
import re
import shutil
import sysconfig
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from support import cli
from support.cli import (
    Parser,
    Progress,
    UserError,
    first_line,
    new_folder,
    one_line,
    read_json,
    read_text,
    user_path,
)

import numpy as np
import tiktoken
import torch

# --- tokenizers -------------------------------------------------------------------------------------------

# How text is cut before byte pairs are merged: words with their leading space, numbers of up to three digits,
# punctuation, line ends, indentation. Written so that Python's re and tiktoken's regex engine both read it.
PATTERN = r" ?[^\W\d_]+|\d{1,3}| ?(?:[^\s\w]|_)+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
END_OF_TEXT = "<|endoftext|>"
LONGEST_WORD = 32  # characters: merges are learned from pieces of longer ones, which text without spaces has
BPE_SAMPLE = 100_000_000  # characters: enough text to learn merges from; more changes little and takes memory


def train_bpe(texts: Iterable[str], vocab_size: int) -> dict[bytes, int]:
    """Learn a byte-level BPE of `vocab_size` tokens, one of them END_OF_TEXT. Returns token bytes -> rank.

    Start from the 256 bytes; again and again, make the most frequent adjacent pair a token. Two things make
    it fast: every distinct pre-token is handled once, with its count, and a merge updates the counts of only
    those pairs that stand in a word it changes.

    >>> sorted(train_bpe(["aaab aaab"], 259).items(), key=lambda x: x[1])[256:]   # 'aa', then 'ab'
    [(b'aa', 256), (b'ab', 257)]
    """
    seen = Counter()
    for text in texts:
        for piece in pieces(text):
            for word in re.findall(PATTERN, piece):
                seen.update(word[i : i + LONGEST_WORD] for i in range(0, len(word), LONGEST_WORD))
    # Every distinct word is handled once, however often it occurs.
    words = [list(word.encode()) for word in seen]
    freq = list(seen.values())

    count = Counter()  # pair of token ids -> occurrences in the corpus
    where = defaultdict(set)  # pair -> words in which it stands (or once stood)
    for w, word in enumerate(words):
        for pair in zip(word, word[1:]):
            count[pair] += freq[w]
            where[pair].add(w)
    queue = [(-n, pair) for pair, n in count.items()]  # heap entries may be outdated; trust `count`
    heapq.heapify(queue)

    tokens = [bytes([b]) for b in range(256)]
    progress = Progress("learning merges", vocab_size - 257)
    while queue and len(tokens) < vocab_size - 1:
        progress(len(tokens) - 256)
        # The most frequent pair. Its entry is outdated where a merge has changed its count since.
        n, pair = heapq.heappop(queue)
        if -n != count[pair]:
            continue
        if -n < 2:
            break
        new, changed = len(tokens), set()
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
        # Only the words that hold the pair change, and with them the counts of their other pairs.
        for w in where.pop(pair):
            for old, made in _merge(words[w], pair, new):
                count[old] -= freq[w]
                count[made] += freq[w]
                where[made].add(w)
                changed |= {old, made}
        count[pair] = 0
        for p in changed:
            if count[p] > 0:
                heapq.heappush(queue, (-count[p], p))
    progress.close()
    ranks = {}
    for token in tokens:  # two merges can spell the same bytes; the first one counts
        ranks.setdefault(token, len(ranks))
    return ranks


def _merge(word: list[int], pair: tuple[int, int], new: int) -> Iterator[tuple[tuple, tuple]]:
    """Put `new` in place of every `pair` in a word, from the left. Yields the pairs next to it and what they
    become: the others stay, so a long word costs hardly more than short ones."""
    left, right = pair
    i = 0
    while left in word[i:-1]:
        i = word.index(left, i)
        if word[i + 1] == right:
            word[i : i + 2] = [new]
            if i > 0:
                yield (word[i - 1], left), (word[i - 1], new)
            if i + 1 < len(word):
                yield (right, word[i + 1]), (new, word[i + 1])
        i += 1


def encoding(name: str, ranks: dict[bytes, int]) -> tiktoken.Encoding:
    """tiktoken's fast encoder over our ranks, with END_OF_TEXT as the last token."""
    return tiktoken.Encoding(
        name, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: max(ranks.values()) + 1}
    )


def read_ranks(path: Path) -> dict[bytes, int]:
    """A .tiktoken file: a line per token, its bytes in base64 and its rank."""
    try:
        pairs = [line.split() for line in path.read_bytes().splitlines() if line.strip()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except ValueError as e:
        raise UserError(
            f"{path} is not a .tiktoken file: a line is not a token in base64 and its rank ({e})"
        ) from e
    if sorted(ranks.values()) != list(range(len(pairs))) or not all(bytes([b]) in ranks for b in range(256)):
        raise UserError(
            f"{path} is not a byte-level tokenizer: it needs the ranks 0, 1, 2 ... and all 256 single bytes"
        )
    return ranks


def load_tokenizer(folder: str | Path) -> "tiktoken.Encoding | JsonTokenizer":
    """The tokenizer of a tokenized corpus (data/NAME) or of a run that was trained on one."""
    return open_tokenizer(read_meta(Path(folder))["tokenizer"], Path(folder))


def open_tokenizer(name: str, folder: Path) -> "tiktoken.Encoding | JsonTokenizer":
    """The tokenizer that --tokenizer calls `name`, with its file in `folder` where it has one."""
    if name == "bytes":
        return encoding("bytes", {bytes([b]): b for b in range(256)})
    if name.endswith(".json"):
        return JsonTokenizer(folder / "tokenizer.json")
    if name != "gpt2":
        return encoding(name, read_ranks(folder / "tokenizer.tiktoken"))
    try:
        return tiktoken.get_encoding("gpt2")
    except OSError as e:
        raise UserError(
            "tokenizer gpt2 is downloaded at first use and could not be reached; go online once, or use "
            "--tokenizer bpe:4096 or bytes"
        ) from e


class JsonTokenizer:
    """A Hugging Face tokenizer.json, with the few methods of tiktoken.Encoding that this project uses."""

    def __init__(self, path: Path):
        try:
            from tokenizers import Tokenizer
        except ImportError as e:
            raise UserError("tokenizer.json needs the package tokenizers: pip install tokenizers") from e
        raw = path.read_bytes()
        try:
            self.tokenizer = Tokenizer.from_buffer(raw)
            vocabulary = self.tokenizer.get_vocab(with_added_tokens=True)
            self.n_vocab = max(vocabulary.values()) + 1
        except Exception as e:  # the package raises plain Exception
            raise UserError(f"{path} is not a Hugging Face tokenizer ({first_line(e)})") from e
        # What else a file can store must not touch the text: only its ids are wanted.
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = True  # what spells a special token is ordinary text
        if hasattr(self.tokenizer.model, "dropout"):
            self.tokenizer.model.dropout = None
        ends = ("<|end_of_text|>", "<|endoftext|>", "<|im_end|>", "</s>", "<eos>", "<s>")
        named = end_of_text(path.parent, self.tokenizer.id_to_token)
        self.eot = next((end for end in (*named, *ends) if end in vocabulary), None)
        if self.eot is None:
            raise UserError(
                f"{path} has none of the end-of-text tokens {', '.join(ends)}; name its own as eos_token in "
                "tokenizer_config.json"
            )
        self.eot_token = vocabulary[self.eot]
        # What the tokenizer itself puts in front of every text: the BOS of Llama's.
        plain, full = self.encode_ordinary("a"), self.tokenizer.encode("a").ids
        starts = [n for n in range(len(full)) if full[n : n + len(plain)] == plain]
        self.start = full[: starts[0]] if starts else []

    def encode_ordinary(self, text: str) -> list[int]:
        """The ids of a text, and no others. UserError where the tokenizer has none for some of it."""
        try:
            return self.tokenizer.encode(text, add_special_tokens=False).ids
        except Exception as e:  # the package raises plain Exception, where there is no token for unknown text
            raise UserError(f"this tokenizer.json cannot encode the text ({first_line(e)})") from e

    def decode(self, ids: list[int]) -> str:
        """The text of ids, special tokens spelled out."""
        return self.tokenizer.decode(ids, skip_special_tokens=False)


def end_of_text(folder: Path, token: Callable[[int], str]) -> list[str]:
    """The end of a text as the folder's tokenizer_config.json and config.json name it."""
    configs = {"tokenizer_config.json": "eos_token", "config.json": "eos_token_id"}
    there = {folder / name: key for name, key in configs.items() if (folder / name).exists()}
    found = [read_json(path, "fix or remove it").get(key) for path, key in there.items()]
    found = [end.get("content") if isinstance(end, dict) else end for end in found]
    return [token(end) if type(end) is int else end for end in found if isinstance(end, int | str)]


def prompt(enc: "tiktoken.Encoding | JsonTokenizer", text: str) -> list[int]:
    """The tokens of a text that is to be continued, after what its tokenizer puts in front of every text. An
    empty one begins as a document does: after the end of the one before."""
    text = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")  # a shell can give any bytes
    start = getattr(enc, "start", [])
    ids = [token for piece in pieces(text) for token in enc.encode_ordinary(piece)]
    return start + ids or [enc.eot_token]


class TextStream:
    """The text of tokens that arrive one by one. What a token adds depends on those before it, and a
    character may take several tokens: it is emitted once its bytes are complete."""

    def __init__(self, enc: "tiktoken.Encoding | JsonTokenizer"):
        self.enc = enc
        self.before: list[int] = []  # the tokens emitted last, as context
        self.waiting: list[int] = []

    def __call__(self, token: int) -> str:
        """The text that is whole with this token."""
        self.waiting.append(token)
        text = self.text()
        if text.endswith("\ufffd"):
            return ""
        self.before, self.waiting = self.waiting, []
        return text

    def text(self) -> str:
        known = self.enc.decode(self.before)
        return self.enc.decode(self.before + self.waiting)[len(known) :]

    def rest(self) -> str:
        """What is still waiting, whole or not."""
        text = self.text()
        self.before, self.waiting = [], []
        return text


MAKE_AGAIN = "make the corpus again: python data.py (--help says how)"
MAX_VOCAB = 1 << 20  # a damaged file must not make us allocate without bound
SPLITS = ("train", "val")
TOKENIZER_FILES = ("tokenizer.tiktoken", "tokenizer.json", "tokenizer_config.json")


def is_corpus(folder: Path) -> bool:
    """Whether a folder holds what `prepare` writes, and nothing else."""
    names = {path.name for path in folder.iterdir()}
    return "meta.json" in names and names <= {"meta.json", "train.bin", "val.bin", *TOKENIZER_FILES}


def read_meta(folder: Path) -> dict:
    """What meta.json says of a corpus. UserError where it is missing, or is not what `prepare` writes."""
    path = folder / "meta.json"
    if not path.exists():
        make = "python data.py --help says how to make one, --data_dir where others are"
        raise UserError(f"no tokenized corpus in {folder}; {make}")
    meta = read_json(path, MAKE_AGAIN)
    try:
        texts = [meta["tokenizer"], *(meta[split]["sha256"] for split in SPLITS)]
        counts = [meta["vocab_size"], *(meta[split]["bytes"] for split in SPLITS)]
        right = all(type(text) is str for text in texts) and all(type(n) is int and n > 0 for n in counts)
        right = right and meta["dtype"] in ("uint16", "uint32") and meta["vocab_size"] < MAX_VOCAB
    except (KeyError, TypeError):
        right = False
    if not right:
        raise UserError(f"{path} is not that of a tokenized corpus; {MAKE_AGAIN}")
    return meta


# --- text -------------------------------------------------------------------------------------------------


def files_below(folder: Path, pattern: str, left_out: Iterable[str] = ()) -> tuple[list[Path], list[str]]:
    """Files in a fixed order that mixes folders, so that a held-out share of them is a fair sample; and what
    else was met: links to folders, and folders that cannot be read. Hidden ones (.git) and those named in
    `left_out` are skipped."""
    paths, met = [], []
    for parent, folders, files in os.walk(folder, onerror=lambda e: met.append(str(e))):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in left_out)
        met.extend(f"{parent}/{name}: a link" for name in folders if os.path.islink(f"{parent}/{name}"))
        found = [Path(parent, name) for name in sorted(files) if not name.startswith(".")]
        paths += [path for path in found if path.match(pattern) and path.is_file()]
    # The order must not depend on the file system.
    paths.sort()
    random.Random(0).shuffle(paths)
    return paths, met


def text_files(folder: Path, pattern: str) -> list[Path]:
    """The files below a folder that match the pattern and hold UTF-8 text. Says what was left out, and raises
    UserError where nothing matches or most files are something else."""
    paths, left_out = files_below(folder, pattern)
    if not paths:
        met = "".join(f"; {what}" for what in left_out[:3])
        raise UserError(f"no file below {folder} matches --glob {pattern!r}; hidden ones are left out{met}")
    texts = []
    for path in paths:
        try:
            read_text(path)
            texts.append(path)
        except (UserError, OSError) as e:
            left_out.append(first_line(e))
    if left_out:
        found = f"{len(left_out)} below {folder}: " + "; ".join(left_out[:3]) + "; ..." * (len(left_out) > 3)
        if len(left_out) > len(texts):
            raise UserError(f"most cannot be used, {found}; choose the text files, as --glob '*.txt'")
        print(f"left out: {found}")
    return texts


def python_corpus() -> list[Path]:
    """The .py files of this Python's standard library without its tests, about 11 MB."""
    folder = Path(sysconfig.get_path("stdlib"))
    left_out = ("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__")
    return files_below(folder, "*.py", left_out)[0]


def download(url: str, size: int) -> str:
    """The text at `url`, which is known to be `size` bytes long (a portal's login page is not)."""
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            raw = response.read()
        if len(raw) != size:
            raise OSError(f"{len(raw):,} bytes in place of {size:,}")
        return raw.decode()
    except (OSError, http.client.HTTPException) as e:
        raise UserError(
            f"could not download {url} ({e}); go online, or fetch the file elsewhere and use "
            "--input FILE --name shakespeare"
        ) from e


def hugging_face(name: str, config: str | None, split: str, column: str) -> Callable[[], Iterator[str]]:
    """Stream the texts of a Hugging Face dataset, of one of its configurations, or of a local file."""
    try:
        import datasets
    except ImportError as e:
        raise UserError("--hf needs the package datasets: pip install datasets") from e
    where = {"path": name, "name": config, "split": split, "streaming": "[" not in split}
    # A file of this name is meant; the Hub would be asked for a dataset of the name otherwise.
    if Path(name).is_file():
        kind = Path(name.removesuffix(".gz")).suffix
        where |= {"path": {".jsonl": "json", ".txt": "text"}.get(kind, kind[1:]), "data_files": name}

    def texts() -> Iterator[str]:
        try:
            for row in datasets.load_dataset(**where):
                if not isinstance(row.get(column), str | None) or column not in row:
                    raise UserError(f"no text in a column {column!r}; it has {', '.join(row)}: use --column")
                yield row[column] or ""
        except Exception as e:  # the package raises many kinds: no network, no such dataset or split
            raise UserError(f"--hf {name}: {one_line(str(e))}") from e

    return texts


# --- corpus -> data/NAME ----------------------------------------------------------------------------------


def split_documents(documents: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(text, 'train' or 'val') pairs: of many documents every 20th is held out, of few each one's last 5%."""
    documents = iter(documents)
    head = list(itertools.islice(documents, 20))
    # Whole documents are a fairer test than the ends of documents that were trained on.
    if len(head) == 20:
        for i, text in enumerate(itertools.chain(head, documents)):
            yield text, "val" if i % 20 == 19 else "train"
    else:
        for text in head:
            low, cut = int(len(text) * 0.9), int(len(text) * 0.95)
            cut = text.rfind("\n", low, cut) + 1 or cut  # at a line's end where one is near
            yield text[:cut], "train"
            yield text[cut:], "val"


def pieces(text: str, size: int = 1 << 18) -> Iterator[str]:
    """Cut a long text at line ends into about `size` characters, to tokenize it in bounded memory."""
    start = 0
    while start < len(text):
        end = len(text)
        if end - start > size:
            end = text.rfind("\n", start, start + size) + 1 or start + size
        yield text[start:end]
        start = end


def make_tokenizer(name: str, documents: Callable[[], Iterable[str]], folder: Path) -> None:
    """Check --tokenizer and write what `load_tokenizer` will need into `folder`."""
    path = folder / "tokenizer.tiktoken"
    if m := re.fullmatch(r"bpe:([0-9]{1,7})", name):
        if not 257 <= int(m[1]) <= 1_000_000:
            raise UserError(
                f"--tokenizer {name}: valid are bpe:257 (the bytes and the end of text) to bpe:1000000"
            )
        ranks = train_bpe(_sample(documents), int(m[1]))
        path.write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % r for t, r in ranks.items()))
    elif name.endswith(".tiktoken"):
        read_ranks(Path(name))
        shutil.copyfile(name, path)
    elif name.endswith(".json"):
        eot = JsonTokenizer(Path(name)).eot
        shutil.copyfile(name, folder / "tokenizer.json")
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eot}), encoding="utf-8")
    elif name not in ("bytes", "gpt2"):
        raise UserError(
            f"--tokenizer {name}: valid are bpe:SIZE (for example bpe:4096), gpt2, bytes, a .tiktoken file, "
            "or a tokenizer.json"
        )


def _sample(documents: Callable[[], Iterable[str]]) -> Iterator[str]:
    """The training text from its start, up to BPE_SAMPLE characters: held-out text teaches no merges."""
    room = BPE_SAMPLE
    for text, split in split_documents(documents()):
        if split == "train":
            yield text
            room -= len(text)
            if room <= 0:
                return


def prepare(
    folder: Path,
    documents: Callable[[], Iterable[str]],
    tokenizer: str,
    source: str,
    n_bytes: int | None = None,
) -> dict:
    """Tokenize `documents()` (called once or twice) into folder/train.bin, val.bin and meta.json. The folder
    appears whole or not at all. `n_bytes`, where known, is for the time left. Returns the meta data."""
    with new_folder(folder, replace=is_corpus) as work:
        print(f"{folder}: tokenizer {tokenizer}", flush=True)
        make_tokenizer(tokenizer, documents, work)
        enc = open_tokenizer(tokenizer, work)
        meta = {"tokenizer": tokenizer, "source": source} | write_tokens(work, documents, enc, n_bytes)
        for split in SPLITS:
            if meta[split]["tokens"] < 2:
                raise UserError(
                    f"{source} is too short: its {split} part has no text; give 1,000 characters or more"
                )
        (work / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
    # Bytes per token say how well the tokenizer fits the text.
    t, v = meta["train"], meta["val"]
    ratio = (t["bytes"] + v["bytes"]) / (t["tokens"] + v["tokens"])
    print(
        f"{folder}: {t['tokens']:,} train and {v['tokens']:,} val tokens, vocabulary {meta['vocab_size']:,}, "
        f"{ratio:.2f} bytes/token"
    )
    return meta


def write_tokens(folder: Path, documents: Callable[[], Iterable[str]], enc, n_bytes: int | None) -> dict:
    """Write train.bin and val.bin. Returns what meta.json says of them."""
    dtype = np.dtype("<u2" if enc.n_vocab <= 1 << 16 else "<u4")
    files = {split: open(folder / f"{split}.bin", "wb") for split in SPLITS}
    counts = {split: {"tokens": 0, "bytes": 0} for split in files}
    progress = Progress("tokenizing", n_bytes)

    def add(split: str, ids: list[int], text: str = "") -> None:
        files[split].write(np.array(ids, dtype=dtype).tobytes())
        counts[split]["tokens"] += len(ids)
        counts[split]["bytes"] += len(text.encode())

    for text, split in split_documents(documents()):
        if text:
            add(split, getattr(enc, "start", []))  # what its tokenizer puts in front of every text
            for piece in pieces(text):
                add(split, enc.encode_ordinary(piece), piece)
            add(split, [enc.eot_token])
            n_tokens, done = (sum(count[key] for count in counts.values()) for key in ("tokens", "bytes"))
            progress(done, f"{n_tokens:,} tokens")
    progress.close()
    for split, file in files.items():
        file.close()
        counts[split]["sha256"] = sha256(folder / f"{split}.bin")
    return {"vocab_size": enc.n_vocab, "dtype": dtype.name} | counts


def sha256(path: Path) -> str:
    """About a second per GB."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def prepare_dataset(name: str, folder: Path, tokenizer: str = "bpe:4096") -> dict:
    """Make one of the built-in corpora."""
    if name == "python":
        paths = python_corpus()
        size = sum(p.stat().st_size for p in paths)
        source = f"standard library of Python {sysconfig.get_python_version()}"
        return prepare(folder, lambda: map(read_text, paths), tokenizer, source, size)
    if name == "shakespeare":
        url = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
        text = download(url, 1_115_394)
        return prepare(folder, lambda: [text], tokenizer, url, len(text))
    raise UserError(
        f"no corpus {name!r} in {folder.parent}; built in are python and shakespeare, for others see "
        "python data.py --help"
    )


# --- data/NAME -> batches ---------------------------------------------------------------------------------


class Tokens:
    """One split of a tokenized corpus, cut into windows of `block_size` tokens and the next one. UserError
    where the file is not the one that meta.json describes, or is too short for a window."""

    def __init__(self, folder: str | Path, split: str, block_size: int):
        self.meta = read_meta(Path(folder))
        self.path, self.block_size = Path(folder) / f"{split}.bin", block_size
        about = self.meta[split]
        if not self.path.exists() or sha256(self.path) != about["sha256"]:
            raise UserError(f"{self.path} is missing or its sha256 is not that in meta.json; {MAKE_AGAIN}")
        # Windows are read from the file, not from a memory map, where a file cut short kills the process.
        self.file, self.dtype = open(self.path, "rb", buffering=0), np.dtype(self.meta["dtype"])
        self.n_tokens = self.path.stat().st_size // self.dtype.itemsize
        self.bytes_per_token = about["bytes"] / self.n_tokens
        self.n_windows = (self.n_tokens - 1) // block_size
        if self.n_windows < 1:
            raise UserError(
                f"{self.path} has {self.n_tokens:,} tokens, too few for a window of block_size {block_size} "
                "and the token after it; lower --block_size or bring more text"
            )

    def bits_per_byte(self, nats_per_token: float) -> float:
        """A loss that does not depend on the tokenizer."""
        return nats_per_token / math.log(2) / self.bytes_per_token

    def windows(self, starts: Iterable[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets (one token on), each (B, block_size) int64."""
        rows = []
        for start in starts:
            self.file.seek(int(start) * self.dtype.itemsize)
            rows.append(np.fromfile(self.file, self.dtype, self.block_size + 1))
            if len(rows[-1]) <= self.block_size:
                raise UserError(f"{self.path} was cut short while it was read; {MAKE_AGAIN}")
        rows = torch.from_numpy(np.stack(rows).astype(np.int64))
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def batch(self, i: int, batch_size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The i-th training batch, a pure function of its arguments: every epoch visits all windows once in
        an order of its own, so a resumed run needs to know nothing but the step."""
        return self.windows(self._start(n, seed) for n in range(i * batch_size, (i + 1) * batch_size))

    def _start(self, n: int, seed: int) -> int:
        """Where the n-th window begins. Every epoch has a permutation of the windows and a shift of its
        own."""
        # No state but a cache of the current epoch's order.
        epoch, k = divmod(n, self.n_windows)
        if getattr(self, "_epoch", None) != (epoch, seed):
            rng = np.random.default_rng((seed, epoch))
            self._epoch, self._order = (epoch, seed), rng.permutation(self.n_windows)
            self._shift = rng.integers((self.n_tokens - 1) % self.block_size + 1)
        return self._shift + int(self._order[k]) * self.block_size

    def held_out(self, n: int, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The same (at most) n windows at every call, disjoint and evenly spread, in batches."""
        # Spread over the whole file, because neighbouring windows are alike.
        picks = np.linspace(0, self.n_windows - 1, min(n, self.n_windows)).round().astype(int)
        for i in range(0, len(picks), batch_size):
            yield self.windows(picks[i : i + batch_size] * self.block_size)


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group().add_argument
    source("--dataset", choices=("python", "shakespeare"), help="a built-in corpus (the default: python)")
    source("--input", type=user_path, metavar="PATH", help="a UTF-8 file, or a folder of them; needs --name")
    source("--hf", type=user_path, metavar="NAME", help="a dataset of Hugging Face, or a local .jsonl, ...")
    add("--glob", default="*", help="with --input FOLDER: the files to take [*, all]")
    add("--config", metavar="NAME", help="with --hf: which configuration of the dataset")
    add("--split", default="train", help="with --hf: the split to read [train]")
    add("--column", default="text", help="with --hf: the column that holds the text [text]")
    add("--name", help="the folder below --data_dir to write [the dataset's name]")
    kinds = "bpe:SIZE, gpt2, bytes, a .tiktoken file or a tokenizer.json"
    add("--tokenizer", type=user_path, default="bpe:4096", help=f"{kinds} [bpe:4096]")
    add("--data_dir", type=user_path, default="data", help="where tokenized corpora live [data]")
    args = parser.parse_args()
    if "" in (args.input, args.hf, args.glob):
        raise UserError("--input, --hf and --glob must not be empty")
    if args.input and not args.name:
        raise UserError("--input needs --name NAME, the folder below --data_dir to write")
    name = args.name or (Path(args.hf).stem if args.hf else args.dataset or "python")
    if not re.fullmatch(r"[\w][\w.-]*", name):
        raise UserError(f"--name {name!r} is not a plain folder name; use letters, digits, '-', '_' and '.'")
    folder = Path(args.data_dir) / name
    if args.input:
        given = Path(args.input)
        if given.is_dir():
            paths = text_files(given, args.glob)
            size = sum(p.stat().st_size for p in paths)
            prepare(folder, lambda: map(read_text, paths), args.tokenizer, given.resolve().name, size)
        else:
            text = read_text(given)  # once, because a pipe can be read only once
            prepare(folder, lambda: [text], args.tokenizer, given.name, len(text))
    elif args.hf:
        texts = hugging_face(args.hf, args.config, args.split, args.column)
        prepare(folder, texts, args.tokenizer, args.hf)
    else:
        prepare_dataset(args.dataset or "python", folder, args.tokenizer)


if __name__ == "__main__":
    cli.run(main)
