"""Tokenizers: bytes, a byte-pair encoding trained on the spot, or one of Hugging Face."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pipeline.tables import UserError, first_line, optional

END = "<|endoftext|>"
# How the end of a document, or else the start of one, is called where a tokenizer.json comes alone.
USUAL_ENDS = (END, "</s>", "<|end_of_text|>", "<eos>", "[SEP]", "<s>", "<bos>", "[CLS]")
TOKENIZER = "tokenizer.json"
PIECE = 2**20  # characters tokenised at once
Encoded = tuple[np.ndarray, np.ndarray]


class Tokenizer(Protocol):
    """vocabulary: ids are below it; end: id behind every document, None: none; identity: changes when the ids do"""

    vocabulary: int
    end: int | None
    identity: str

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """For each text (n,) int64 ids, and (n,) int64 how many bytes of the text each stands for; sums are exact."""

    def decode(self, ids: Iterable[int]) -> str: ...


@dataclass(frozen=True)
class Bytes:
    """The 256 bytes of UTF-8, and 256 for the end of a document."""

    vocabulary: int = 257
    end: int | None = 256
    identity: str = "bytes"

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        found = (np.frombuffer(text.encode(), np.uint8).astype(np.int64) for text in texts)
        return [(ids, np.ones_like(ids)) for ids in found]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in map(int, ids) if i < 256).decode(errors="replace")


class Fast:
    """A tokenizer of Hugging Face `tokenizers`. Special tokens that a text spells out are encoded as plain text."""

    def __init__(self, backend: Any, end: int | None) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.backend, self.end = backend, end
        self.vocabulary = max(self.words().values()) + 1  # ids may have gaps
        self.identity = hashlib.sha256(f"{backend.to_str()} {end}".encode()).hexdigest()

    def words(self) -> dict[str, int]:
        """{token, as the tokenizer spells it: its id}"""
        return self.backend.get_vocab(with_added_tokens=True)

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        self.backend.encode_special_tokens = True  # not kept by pickle and by tokenizer.json
        parts = [list(pieces(text)) for text in texts]
        encoded = iter(self.backend.encode_batch([piece for part in parts for piece in part], add_special_tokens=False))
        return [joined([measured(piece, next(encoded)) for piece in part]) for part in parts]

    def decode(self, ids: Iterable[int]) -> str:
        return self.backend.decode([int(i) for i in ids])


def pieces(text: str, size: int = PIECE) -> Iterable[str]:
    """The text in pieces, cut before a line end: offsets of all tokens of a long text would fill the memory."""
    start = 0
    while len(text) - start > size:
        line = text.rfind("\n", start + 1, start + size)
        stop = line if line > start else start + size
        yield text[start:stop]
        start = stop
    yield text[start:]


def measured(text: str, encoding: Any) -> Encoded:
    """Ids and their bytes: what lies between the ends of two tokens belongs to the second one, and what is behind the
    last token, such as white space that a tokenizer drops, to the last one."""
    ids = np.array(encoding.ids, np.int64)
    if not len(ids):
        return ids, ids
    ends = np.maximum.accumulate(np.array(encoding.offsets, np.int64)[:, 1])
    ends[-1] = len(text)
    return ids, np.diff(byte_ends(text)[ends], prepend=0)


def byte_ends(text: str) -> np.ndarray:
    """(len + 1,) how many bytes the first 0, 1, ... characters take in UTF-8."""
    if text.isascii():
        return np.arange(len(text) + 1)
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    sizes = 1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000)
    return np.concatenate([[0], np.cumsum(sizes)])


def joined(parts: list[Encoded]) -> Encoded:
    ids, sizes = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return ids, sizes


def check_bpe(vocabulary: int | None) -> int:
    """The size of a BPE. UserError where there is none, or no room for bytes and the end of a document."""
    if vocabulary is None or vocabulary < 257:
        raise UserError(
            f"vocabulary {vocabulary} must be at least 257 for tokenizer 'bpe': 256 bytes and the end of a document"
        )
    return vocabulary


def train_bpe(texts: Iterable[str], vocabulary: int) -> Fast:
    """A byte-level BPE (arXiv:1508.07909, as in GPT-2) of at most `vocabulary` ids; little text gives fewer."""
    library = optional("tokenizer 'bpe'", "tokenizers", "text")
    backend = library.Tokenizer(library.models.BPE())
    backend.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((piece for text in texts for piece in pieces(text)), trainer)
    return Fast(backend, backend.token_to_id(END))


def load_tokenizer(name: str) -> Tokenizer:
    """`bytes`, a tokenizer.json or a folder with one, that of a GGUF file, or a name of the hub.

    Code that comes with one is never run.
    """
    if name == "bytes":
        return Bytes()
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        return from_transformers(name, path.parent, gguf_file=path.name)
    if path.is_file():
        return from_file(path)
    if path.is_dir() and (path / TOKENIZER).is_file() and not (path / "tokenizer_config.json").is_file():
        return from_file(path / TOKENIZER)
    return from_transformers(name, path)


def from_file(path: Path) -> Fast:
    """A tokenizer.json alone; config.json beside it may say the end of a document, else its usual names do."""
    library = optional(f"tokenizer {path}", "tokenizers", "text")
    try:
        backend = library.Tokenizer.from_file(str(path))
        config = path.with_name("config.json")
        told = json.loads(config.read_text()) if config.is_file() else {}
    except Exception as error:  # `tokenizers` raises bare Exceptions
        raise UserError(f"{path} is no tokenizer of Hugging Face ({first_line(error)}); copy it again") from error
    ids = [told.get("eos_token_id"), *map(backend.token_to_id, USUAL_ENDS), told.get("bos_token_id")]
    ids = [i[0] if isinstance(i, list) and i else i for i in ids]
    return Fast(backend, next((i for i in ids if isinstance(i, int)), None))


def from_transformers(name: str, path: Path, **options: str) -> Fast:
    transformers = optional(f"tokenizer {name!r}", "transformers", "text")
    source = path if path.is_dir() else name
    load = partial(transformers.AutoTokenizer.from_pretrained, source, trust_remote_code=False, **options)
    try:
        try:
            found = load(local_files_only=True)  # without a network, asking the hub first takes 20 s
        except Exception:
            if path.is_dir():
                raise
            found = load()
    # transformers passes on errors of the hub, of network libraries and of the conversion of old files.
    except Exception as error:
        fix = (
            f"put its {TOKENIZER} there"
            if path.is_dir()
            else "give bytes, bpe, a folder with tokenizer.json, or, with a network, a name of the hub"
        )
        raise UserError(f"no tokenizer {name!r} ({first_line(error)}); {fix}") from error
    if not getattr(found, "is_fast", False):
        raise UserError(f"tokenizer {name!r} has no {TOKENIZER}, so bytes of its tokens are unknown; convert it first")
    end = found.bos_token_id if found.eos_token_id is None else found.eos_token_id
    return Fast(found.backend_tokenizer, end)
