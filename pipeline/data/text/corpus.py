"""The prepared tokens of one source under one tokenizer: made once, found again by what they were made of."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from tqdm import tqdm

from pipeline.tables import UserError, first_line

from .cut import chosen, too_few
from .shards import Tokens, read_shards, write_shards
from .source import Source, Stream, digest, whole
from .tokenizers import TOKENIZER, Fast, Tokenizer, check_bpe, from_file, load_tokenizer, train_bpe

VERSION = 1  # of the files; another one finds none of the older files
MANIFEST = "manifest.json"
BPE_TEXT = 2**28  # characters that a BPE is trained on; more text changes few of its merges


@dataclass(frozen=True)
class Corpus:
    """tokens: {"train": Tokens, and "test" where the source has a test part of its own}"""

    tokenizer: Tokenizer
    tokens: dict[str, Tokens]


@dataclass(frozen=True)
class Plan:
    """What a corpus is made of, and where it lies.

    tokenizer: bytes, bpe, a file, a folder or a name of Hugging Face; vocabulary: ids of a BPE
    test_fraction: share of the documents that a BPE does not see, since they are the test part
    """

    name: str
    source: Source
    tokenizer: str
    vocabulary: int | None
    test_fraction: float
    cache: Path

    @property
    def streams(self) -> dict[str, Stream]:
        """The test part first, because a document that it has is left out of training."""
        test = {} if self.source.test is None else {"test": self.source.test}
        return {
            part: cleaned(stream, f"{self.name} {part}")
            for part, stream in {**test, "train": self.source.train}.items()
        }

    def found(self) -> tuple[Path, Tokenizer | None]:
        """(folder of the corpus, its tokenizer, None for a BPE, which is made from the text)"""
        if self.tokenizer == "bpe":
            tokenizer, spelled = None, ["bpe", check_bpe(self.vocabulary), self.test_fraction]
        else:
            tokenizer = load_tokenizer(self.tokenizer)
            spelled = [tokenizer.identity]
        told = json.dumps([VERSION, self.source.identity, spelled], sort_keys=True)
        key = hashlib.sha256(told.encode()).hexdigest()[:16]
        return self.cache.expanduser() / "text" / f"{self.name}-{key}", tokenizer


def cleaned(stream: Stream, name: str) -> Stream:
    """The stream without half characters, and with a bar that shows how far it is, unless nobody sees one."""

    def clean(skip: int) -> Iterator[str]:
        return map(whole, tqdm(stream(skip), name, initial=skip, unit=" documents", leave=False, disable=None))

    return clean


def prepare(plan: Plan) -> None:
    """Tokenise all that is not tokenised yet; another process that prepares the same waits, and finds it done."""
    folder, tokenizer = plan.found()
    if (folder / MANIFEST).is_file():
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not (folder / MANIFEST).is_file():
                make(plan, folder, bpe_of(plan, folder) if tokenizer is None else tokenizer)
    except OSError as error:
        raise UserError(f"cannot write tokens to {folder} ({first_line(error)}); set data.cache") from error


def make(plan: Plan, folder: Path, tokenizer: Tokenizer) -> None:
    seen: set[int] = set()  # a hundred bytes for each document
    made = {part: write_shards(folder / part, stream, tokenizer, seen) for part, stream in plan.streams.items()}
    if not len(made["train"]):
        raise UserError(f"data set {plan.name!r} holds no text; fix data.root or data.separator")
    told = {
        "version": VERSION,
        "source": plan.source.identity,
        "tokenizer": {"name": plan.tokenizer, "identity": tokenizer.identity, "vocabulary": tokenizer.vocabulary},
        "end": tokenizer.end,
        "shards": {part: len(tokens.starts) - 1 for part, tokens in made.items()},
        "tokens": {part: len(tokens) for part, tokens in made.items()},
    }
    written(folder / MANIFEST, json.dumps(told, indent=1))


def written(path: Path, text: str) -> None:
    """A file that is whole as soon as it is there."""
    partly = path.with_name(f"{path.name}.part")
    partly.write_text(text)
    partly.replace(path)


def bpe_of(plan: Plan, folder: Path) -> Fast:
    """The BPE of a corpus, trained on all that is not test: validation, which seeds choose, is among it, so that runs
    of all seeds share one vocabulary."""
    path = folder / TOKENIZER
    if not path.is_file():
        trained = train_bpe(limited(untested(plan), BPE_TEXT), check_bpe(plan.vocabulary))
        written(path, trained.backend.to_str())
    return from_file(path)


def untested(plan: Plan) -> Iterator[str]:
    """The documents that are not in the test part."""
    stream = plan.streams["train"]
    if plan.source.test is not None or plan.test_fraction == 0:
        return stream(0)
    facts = np.array([(digest(text), len(text.encode())) for text in stream(0)], np.uint64).reshape(-1, 2)
    digests, first = np.unique(facts[:, 0], return_index=True)
    if too_few(digests):
        return head(stream(0), float(facts[first, 1].sum()) * (1 - plan.test_fraction))
    tested = set(chosen(digests, plan.test_fraction, seed=0).tolist())
    return (text for text in stream(0) if digest(text) not in tested)


def head(texts: Iterator[str], size: float) -> Iterator[str]:
    """The first `size` bytes of different texts."""
    seen: set[int] = set()
    left = int(size)
    for text in texts:
        if (key := digest(text)) not in seen and left > 0:
            seen.add(key)
            spelled = text.encode()
            yield spelled[:left].decode(errors="ignore")
            left -= len(spelled)


def limited(texts: Iterator[str], size: int) -> Iterator[str]:
    for text in texts:
        yield text
        size -= len(text)
        if size <= 0:
            return


def open_corpus(plan: Plan) -> Corpus:
    """What `prepare` made. UserError where it is not there or damaged."""
    folder, tokenizer = plan.found()
    try:
        told: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        shards = told["shards"]
    except FileNotFoundError as error:
        raise UserError(f"the tokens of {plan.name!r} are not prepared in {folder}; set data.download=true") from error
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder / MANIFEST} is damaged ({first_line(error)}); delete {folder}") from error
    tokenizer = from_file(folder / TOKENIZER) if tokenizer is None else tokenizer
    if told["tokenizer"]["identity"] != tokenizer.identity:
        raise UserError(f"{folder} was made by another tokenizer than its {TOKENIZER}; delete it to make it anew")
    tokens = {part: read_shards(folder / part, limit=count) for part, count in shards.items()}
    return Corpus(tokenizer, tokens)
