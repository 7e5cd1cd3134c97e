"""Text in, tokens out: tokenizers, `train.bin` and `val.bin`, and the batches that training reads.

python data.py                                        the default corpus: this Python's standard library
python data.py --dataset shakespeare                  downloads 1 MB
python data.py --input FILE_OR_FOLDER --name NAME     your own UTF-8 text
python data.py --hf NAME [--split S --column C]       a Hugging Face dataset, or a local .jsonl or .parquet
"""

import base64
import hashlib
import heapq
import http.client
import itertools
import json
import os
import random
import re
import shutil
import sysconfig
import tempfile
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import tiktoken
import torch

from cli import Parser, Progress, UserError, first_line, read_json, run, sealed, sha256

# --- tokenizers -------------------------------------------------------------------------------------------

# How text is cut before byte pairs are merged: words with their leading space, numbers of up to three digits,
# punctuation, line ends, indentation. Written so that Python's re and tiktoken's regex engine both read it.
PATTERN = r" ?[^\W\d_]+|\d{1,3}| ?(?:[^\s\w]|_)+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
END_OF_TEXT = "<|endoftext|>"
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
        seen.update(re.findall(PATTERN, text))
    words = [list(word.encode()) for word in seen]
    freq = list(seen.values())

    count = Counter()  # pair of token ids -> occurrences in the corpus
    where = defaultdict(set)  # pair -> words in which it stands (or once stood)
    for w, word in enumerate(words):
        for pair in zip(word, word[1:]):
            count[pair] += freq[w]
            where[pair].add(w)
    queue = [(-n, pair) for pair, n in count.items()]  # entries go stale; the counter has the last word
    heapq.heapify(queue)

    tokens = [bytes([b]) for b in range(256)]
    progress = Progress("learning merges", vocab_size - 257)
    while queue and len(tokens) < vocab_size - 1:
        progress(len(tokens) - 256)
        n, pair = heapq.heappop(queue)
        if -n != count[pair]:
            continue
        if -n < 2:
            break
        new = len(tokens)
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
        changed = set()
        for w in where.pop(pair):
            word, merged = words[w], _merge(words[w], pair, new)
            if len(merged) == len(word):
                continue
            for old in zip(word, word[1:]):
                count[old] -= freq[w]
                changed.add(old)
            for p in zip(merged, merged[1:]):
                count[p] += freq[w]
                where[p].add(w)
                changed.add(p)
            words[w] = merged
        for p in changed:
            if count[p] > 0:
                heapq.heappush(queue, (-count[p], p))
    progress.close()
    ranks = {}
    for token in tokens:  # two merges can spell the same bytes; the first one counts
        ranks.setdefault(token, len(ranks))
    return ranks


def _merge(word: list[int], pair: tuple[int, int], new: int) -> list[int]:
    out, i = [], 0
    while i < len(word):
        if i + 1 < len(word) and (word[i], word[i + 1]) == pair:
            out.append(new)
            i += 2
        else:
            out.append(word[i])
            i += 1
    return out


def encoding(name: str, ranks: dict[bytes, int]) -> tiktoken.Encoding:
    return tiktoken.Encoding(
        name, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: max(ranks.values()) + 1}
    )


def read_ranks(path: Path) -> dict[bytes, int]:
    """A .tiktoken file: a line per token, its bytes in base64 and its rank."""
    try:
        pairs = [line.split() for line in path.read_bytes().splitlines() if line.strip()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except OSError as e:
        raise UserError(f"cannot read the tokenizer {path}: {e.strerror}") from e
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
    """The tokenizer of a tokenized corpus (data/NAME) or of a run made from one."""
    folder = Path(folder)
    meta = read_meta(folder)
    name = meta["tokenizer"]
    path = folder / ("tokenizer.json" if name.endswith(".json") else "tokenizer.tiktoken")
    if path.exists() and meta.get("tokenizer_sha256", sha256(path)) != sha256(path):
        raise UserError(f"{path} is damaged or not the one that {folder} was made with; {MAKE_AGAIN}")
    if name == "bytes":
        enc = encoding("bytes", {bytes([b]): b for b in range(256)})
    elif name == "gpt2":
        try:
            enc = tiktoken.get_encoding("gpt2")
        except OSError as e:
            raise UserError(
                "tokenizer gpt2 is downloaded at first use and could not be reached; go online once, or use "
                "--tokenizer bpe:4096 or bytes"
            ) from e
    else:
        enc = JsonTokenizer(path) if name.endswith(".json") else encoding(name, read_ranks(path))
    if not enc.n_vocab == meta.get("vocab_size", enc.n_vocab) <= MAX_VOCAB:
        raise UserError(
            f"{folder}: its tokenizer has {enc.n_vocab:,} tokens and meta.json says "
            f"{meta.get('vocab_size')}, at most {MAX_VOCAB:,}; {MAKE_AGAIN}"
        )
    return enc


def token_bytes(enc: "tiktoken.Encoding | JsonTokenizer", i: int) -> bytes:
    """The bytes of token `i`; a replacement character where a model has more tokens than its tokenizer."""
    try:
        return enc.decode_single_token_bytes(i)
    except KeyError:
        return "\ufffd".encode()


class JsonTokenizer:
    """A Hugging Face tokenizer.json, with the few methods of tiktoken.Encoding that this project uses."""

    def __init__(self, path: Path):
        try:
            from tokenizers import Tokenizer
        except ImportError as e:
            raise UserError("tokenizer.json needs the package tokenizers: pip install tokenizers") from e
        try:
            text = path.read_text()
            self.tokenizer = Tokenizer.from_str(text)
            vocabulary = self.tokenizer.get_vocab(with_added_tokens=True)
            self.n_vocab = max(vocabulary.values()) + 1
        except OSError as e:
            raise UserError(f"cannot read the tokenizer {path}: {e.strerror}") from e
        except Exception as e:  # the package raises plain Exception
            raise UserError(f"{path} is not a Hugging Face tokenizer ({first_line(e)})") from e
        ends = ("<|end_of_text|>", "<|endoftext|>", "<|im_end|>", "</s>", "<eos>", "<s>")
        self.eot_token = next((vocabulary[end] for end in ends if end in vocabulary), None)
        if self.eot_token is None:
            raise UserError(f"{path} has none of the end-of-text tokens {', '.join(ends)}")
        added = json.loads(text).get("added_tokens") or []
        self._added = {token["id"] for token in added}
        # byte-level tokenizers write every byte as one printable character, after GPT-2
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        rest = [b for b in range(256) if b not in printable]
        self._byte = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}
        self._byte_level = "ByteLevel" in json.dumps(json.loads(text).get("decoder"))

    def encode_ordinary(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return b"".join(map(self.decode_single_token_bytes, ids)).decode(errors="replace")

    def decode_single_token_bytes(self, i: int) -> bytes:
        token = self.tokenizer.id_to_token(i) or ""
        if self._byte_level and i not in self._added:
            return bytes(self._byte[c] for c in token)
        if m := re.fullmatch(r"<0x([0-9A-F]{2})>", token):
            return bytes([int(m[1], 16)])
        return token.replace("\u2581", " ").encode()


MAKE_AGAIN = "make the corpus again: python data.py (--help says how)"
MAX_VOCAB = 1 << 20  # a number in a file must not fill the memory


def read_meta(folder: Path) -> dict:
    if not (folder / "meta.json").exists():
        raise UserError(f"no tokenized corpus in {folder}; python data.py --help says how to make one")
    meta = read_json(folder / "meta.json", MAKE_AGAIN)
    if not isinstance(meta.get("tokenizer"), str):
        raise UserError(f"{folder / 'meta.json'} names no tokenizer; {MAKE_AGAIN}")
    return meta


# --- text -------------------------------------------------------------------------------------------------


def read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise UserError(
            f"{path} is not UTF-8 text (byte {e.start}); convert it, for example with iconv -t UTF-8"
        ) from e


def files_below(folder: Path, pattern: str, left_out: Iterable[str] = ()) -> list[Path]:
    """Files in a fixed order that mixes folders, so that a held-out share of them is a fair sample. Hidden
    ones (.git) and folders named in `left_out` are skipped."""
    paths = []
    for path in sorted(folder.rglob(pattern)):
        parts = path.relative_to(folder).parts
        if path.is_file() and not any(part.startswith(".") or part in left_out for part in parts):
            paths.append(path)
    random.Random(0).shuffle(paths)
    return paths


def python_corpus() -> list[Path]:
    folder = Path(sysconfig.get_path("stdlib"))
    left_out = ("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__")
    return files_below(folder, "*.py", left_out)


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


def hugging_face(name: str, split: str, column: str) -> Callable[[], Iterator[str]]:
    """Stream the texts of a Hugging Face dataset, or of a local .jsonl, .json or .parquet file."""
    try:
        import datasets
    except ImportError as e:
        raise UserError("--hf needs the package datasets: pip install datasets") from e
    kind = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}.get(Path(name).suffix)

    def failed(
        e: Exception,
    ) -> UserError:  # the package raises many kinds: no network, no such dataset or split
        return UserError(f"--hf {name}: {first_line(e)}")

    def texts() -> Iterator[str]:
        try:
            for row in rows:
                yield row[column] or ""
        except Exception as e:
            raise failed(e) from e

    try:
        if kind and Path(name).exists():
            rows = datasets.load_dataset(kind, data_files={split: name}, split=split, streaming=True)
        else:
            rows = datasets.load_dataset(name, split=split, streaming=True)
        first = next(iter(rows), {})
    except Exception as e:
        raise failed(e) from e
    if column not in first or not isinstance(first[column], str | None):
        raise UserError(f"--hf {name} has no text column {column!r}; it has {', '.join(first)}: use --column")
    return texts


# --- corpus -> data/NAME ----------------------------------------------------------------------------------


def split_documents(documents: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(text, 'train' or 'val') pairs: of many documents every 20th is held out, of few each one's last 5%."""
    documents = iter(documents)
    head = list(itertools.islice(documents, 20))
    if len(head) == 20:
        for i, text in enumerate(itertools.chain(head, documents)):
            yield text, "val" if i % 20 == 19 else "train"
    else:
        for text in head:
            low, cut = int(len(text) * 0.9), int(len(text) * 0.95)
            cut = text.rfind("\n", low, cut) + 1 or cut  # at a line's end where one is near
            yield text[:cut], "train"
            yield text[cut:], "val"


def pieces(text: str, size: int = 1 << 20) -> Iterator[str]:
    """Cut a long text at line ends into about `size` characters, to tokenize it in bounded memory."""
    start = 0
    while start < len(text):
        end = (
            len(text)
            if len(text) - start <= size
            else text.rfind("\n", start, start + size) + 1 or start + size
        )
        end = end if end > start else start + size
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
        JsonTokenizer(Path(name))
        shutil.copyfile(name, folder / "tokenizer.json")
    elif name not in ("bytes", "gpt2"):
        raise UserError(
            f"--tokenizer {name}: valid are bpe:SIZE (for example bpe:4096), gpt2, bytes, a .tiktoken file, "
            "or a tokenizer.json"
        )


def _sample(documents: Callable[[], Iterable[str]]) -> Iterator[str]:
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
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    old = work.with_name(work.name + "-replaced")
    try:
        print(f"{folder}: tokenizer {tokenizer}", flush=True)
        make_tokenizer(tokenizer, documents, work)
        meta = {"tokenizer": tokenizer, "source": source}
        for path in work.glob("tokenizer.*"):
            meta["tokenizer_sha256"] = sha256(path)
        (work / "meta.json").write_text(json.dumps(meta))
        enc = load_tokenizer(work)
        dtype = np.dtype("<u2" if enc.n_vocab <= 1 << 16 else "<u4")
        counts = {s: {"tokens": 0, "bytes": 0, "sha256": hashlib.sha256()} for s in ("train", "val")}
        progress = Progress("tokenizing", n_bytes)
        with open(work / "train.bin", "wb") as train, open(work / "val.bin", "wb") as val:
            files = {"train": train, "val": val}
            for text, split in split_documents(documents()):
                c = counts[split]
                for piece in pieces(text):
                    _write(enc.encode_ordinary(piece), dtype, files[split], c)
                    c["bytes"] += len(piece.encode())
                    n_tokens, done = (sum(c[key] for c in counts.values()) for key in ("tokens", "bytes"))
                    progress(done, f"{n_tokens:,} tokens")
                if text:
                    _write([enc.eot_token], dtype, files[split], c)
        progress.close()
        for split, c in counts.items():
            if c["tokens"] < 2:
                raise UserError(
                    f"{source} is too short: its {split} part has no text; give 1,000 characters or more"
                )
            c["sha256"] = c["sha256"].hexdigest()
        meta = sealed(meta | {"vocab_size": enc.n_vocab, "dtype": dtype.name} | counts)
        (work / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
        work.chmod(0o755)  # mkdtemp made it private
        if folder.exists():
            folder.rename(old)
        try:
            work.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    t, v = meta["train"], meta["val"]
    print(
        f"{folder}: {t['tokens']:,} train and {v['tokens']:,} val tokens, vocabulary {meta['vocab_size']:,}, "
        f"{(t['bytes'] + v['bytes']) / (t['tokens'] + v['tokens']):.2f} bytes/token"
    )
    return meta


def _write(ids: list[int], dtype: np.dtype, file, count: dict):
    raw = np.array(ids, dtype=dtype).tobytes()
    file.write(raw)
    count["sha256"].update(raw)
    count["tokens"] += len(ids)


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
    """One split of a tokenized corpus, cut into windows of `block_size` tokens and the next one. The file is
    compared with the size and the sha256 in meta.json, which takes about a second per GB."""

    def __init__(self, folder: str | Path, split: str, block_size: int):
        self.meta = read_meta(Path(folder))
        self.path, self.block_size = Path(folder) / f"{split}.bin", block_size
        try:
            dtype = {"uint16": "<u2", "uint32": "<u4"}[self.meta["dtype"]]
            count, n_bytes = self.meta[split]["tokens"], self.meta[split]["bytes"]
            if not (1 <= self.meta["vocab_size"] <= MAX_VOCAB and 1 <= n_bytes < 1 << 63):
                raise ValueError(f"meta.json says vocab_size {self.meta['vocab_size']}, {n_bytes} bytes")
            self.bytes_per_token = n_bytes / count
            self.ids = np.memmap(self.path, dtype=dtype, mode="r")
            if len(self.ids) != count:
                raise ValueError(f"it holds {len(self.ids):,} tokens and meta.json says {count:,}")
            if sha256(self.path) != self.meta[split]["sha256"]:
                raise ValueError("its sha256 is not the one in meta.json")
        except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as e:
            raise UserError(f"cannot read {self.path} ({e}); {MAKE_AGAIN}") from e
        self.n_windows = (len(self.ids) - 1) // block_size
        if self.n_windows < 1:
            raise UserError(
                f"{self.path} has {len(self.ids):,} tokens, too few for a window of block_size {block_size} "
                "and the token after it; lower --block_size or bring more text"
            )

    def windows(self, starts: Iterable[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets (one token on), each (B, block_size) int64."""
        rows = np.stack([self.ids[s : s + self.block_size + 1] for s in starts]).astype(np.int64)
        if rows.max() >= self.meta["vocab_size"]:
            raise UserError(
                f"{self.path} holds token id {rows.max()} and the vocabulary has "
                f"{self.meta['vocab_size']:,}; {MAKE_AGAIN}"
            )
        rows = torch.from_numpy(rows)
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def batch(self, i: int, batch_size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The i-th training batch, a pure function of its arguments: every epoch visits all windows once in
        an order of its own, so a resumed run needs to know nothing but the step."""
        return self.windows(self._start(n, seed) for n in range(i * batch_size, (i + 1) * batch_size))

    def _start(self, n: int, seed: int) -> int:
        epoch, k = divmod(n, self.n_windows)
        if getattr(self, "_epoch", None) != (epoch, seed):
            rng = np.random.default_rng((seed, epoch))
            self._epoch, self._order = (epoch, seed), rng.permutation(self.n_windows)
            self._shift = rng.integers((len(self.ids) - 1) % self.block_size + 1)
        return self._shift + int(self._order[k]) * self.block_size

    def held_out(self, n: int, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The same (at most) n windows at every call, disjoint and evenly spread, in batches."""
        picks = np.linspace(0, self.n_windows - 1, min(n, self.n_windows)).round().astype(int)
        for i in range(0, len(picks), batch_size):
            yield self.windows(picks[i : i + batch_size] * self.block_size)


def main():
    parser = Parser(__doc__)
    parser.add_argument(
        "--dataset", choices=("python", "shakespeare"), help="a built-in corpus (the default: python)"
    )
    parser.add_argument("--input", metavar="PATH", help="a UTF-8 file, or a folder of them; needs --name")
    parser.add_argument(
        "--hf", metavar="NAME", help="a Hugging Face dataset or a local .jsonl or .parquet file"
    )
    parser.add_argument("--split", default="train", help="with --hf: the split to read [train]")
    parser.add_argument("--column", default="text", help="with --hf: the column that holds the text [text]")
    parser.add_argument("--name", help="the folder below --data_dir to write [the dataset's name]")
    parser.add_argument(
        "--tokenizer",
        default="bpe:4096",
        help="bpe:SIZE, gpt2, bytes, a .tiktoken file or a tokenizer.json [bpe:4096]",
    )
    parser.add_argument("--data_dir", default="data", help="where tokenized corpora live [data]")
    args = parser.parse_args()
    if "" in (args.input, args.hf):
        raise UserError("--input and --hf must not be empty")
    if sum(x is not None for x in (args.dataset, args.input, args.hf)) > 1:
        raise UserError("--dataset, --input and --hf exclude each other; give one")
    if args.input and not args.name:
        raise UserError("--input needs --name NAME, the folder below --data_dir to write")
    name = args.name or (Path(args.hf).stem if args.hf else args.dataset or "python")
    if not re.fullmatch(r"[\w][\w.-]*", name):
        raise UserError(f"--name {name!r} is not a plain folder name; use letters, digits, '-', '_' and '.'")
    folder = Path(args.data_dir) / name
    if args.input:
        path = Path(args.input)
        paths = files_below(path, "*") if path.is_dir() else [path]
        size = sum(p.stat().st_size for p in paths if p.exists())
        prepare(folder, lambda: map(read_text, paths), args.tokenizer, os.path.basename(path.resolve()), size)
    elif args.hf:
        prepare(folder, hugging_face(args.hf, args.split, args.column), args.tokenizer, args.hf)
    else:
        prepare_dataset(args.dataset or "python", folder, args.tokenizer)


if __name__ == "__main__":
    run(main)
