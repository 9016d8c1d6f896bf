"""The LightningDataModule of any text in TEXTS."""

from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader

from pipeline.tables import UserError, call, pick

from ..pictures import collate
from . import TEXTS
from .corpus import Corpus, Plan, open_corpus, prepare
from .cut import everything, parts
from .order import ResumableLoader, Shuffle
from .windows import Windows

CACHE = "~/.cache/foldability"


class TextData(LightningDataModule):
    """Train, validation and test windows of one text.

    After `prepare_data()` and `setup()`, which a Trainer calls:
    train_data, val_data, test_data: Windows; only the last window of val_data and test_data may be filled up
    repair_data: train_data, since nothing is drawn anew
    tokenizer: its `encode` and `decode`; vocabulary: ids that the network has to know
    example: (1, context) int64, real tokens

    `facts`, `preparation`, `told`, `kind` and `unit` are those of PictureData, too, so nothing has to ask which it is.

    name: a row of TEXTS; `options` are those of the row, such as field of 'text'
    root: where the text lies
    tokenizer: bytes, bpe (trained on the text that is not test), a tokenizer.json, a folder or a name of Hugging Face
    vocabulary: ids of a bpe; of any other tokenizer None, or a number to round its own up to
    context: tokens in a window
    val_fraction: share of the documents that are not test held out for validation, 0 <= f < 1; seed chooses them
    test_fraction: share of the documents that are the test part, the same for every seed; a text with a test part of
        its own has that. Fewer than 20 documents are cut into stretches instead
    seed: of the validation part, of the order of training windows, and of train_size and val_size
    workers: processes that fetch training batches; None: none, since memory-mapped tokens need none
    train_size, val_size, test_size: use only so many windows, drawn at random; None: all
    download: tokenise, and fetch, what is not prepared yet
    cache: folder in which tokens are kept, 4 bytes for each, 6 for a vocabulary above 65,536
    """

    kind, unit = "text", "windows"

    def __init__(
        self,
        name: str,
        root: str | Path | None = None,
        tokenizer: str = "bytes",
        vocabulary: int | None = None,
        context: int = 256,
        batch_size: int = 16,
        eval_batch_size: int = 32,
        val_fraction: float = 0.05,
        test_fraction: float = 0.05,
        seed: int = 0,
        workers: int | None = None,
        train_size: int | None = None,
        val_size: int | None = None,
        test_size: int | None = None,
        download: bool = True,
        cache: str | Path = CACHE,
        **options: Any,
    ):
        super().__init__()
        self.source = pick("data set", TEXTS, name)
        check_numbers(batch_size, eval_batch_size, workers, val_fraction=val_fraction, test_fraction=test_fraction)
        if val_fraction + test_fraction >= 1:
            raise UserError(f"val_fraction {val_fraction} and test_fraction {test_fraction} leave nothing to train on")
        if context < 2:
            raise UserError(f"context {context} must be at least 2: a token and the one that it predicts")
        self.name, self.context, self.seed = name, context, seed
        self.batch_size, self.eval_batch_size, self.workers = batch_size, eval_batch_size, workers or 0
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self.sizes = {"train": train_size, "val": val_size, "test": test_size}
        self.tokenizer_name, self.asked_vocabulary = str(tokenizer), vocabulary
        self.download, self.cache = download, Path(cache or CACHE)
        self.place = {} if root is None else {"root": root}
        self.options = options
        self.test_data: Windows | None = None
        self._loader: ResumableLoader | None = None
        self._resumed: dict[str, Any] = {}

    def plan(self) -> Plan:
        source = call(f"data set {self.name!r}", self.source.load, **self.place, **self.options)
        return Plan(
            self.name, source, self.tokenizer_name, self.asked_vocabulary, self.test_fraction, self.cache.expanduser()
        )

    def prepare_data(self) -> None:
        """Tokenise what is not prepared yet (Lightning calls this on one process per machine)."""
        if self.download:
            prepare(self.plan())

    def setup(self, stage: str | None = None) -> None:
        if self.test_data is not None:  # Lightning calls setup before every stage
            return
        corpus = open_corpus(self.plan())
        self.tokenizer = corpus.tokenizer
        self.vocabulary = self.whole_vocabulary()
        documents = corpus.tokens["train"].documents
        self.repeated = int((documents["tokens"] == 0).sum())
        made = self.cut(corpus)
        if not len(made["train"]):
            raise UserError(
                f"the training part of {self.name!r} has {made['train'].part.size} tokens, less than one window of "
                f"context={self.context}; give more text, or a shorter data.context"
            )
        self.train_data, self.val_data, test = (self.sized(key, made[key]) for key in ("train", "val", "test"))
        self.repair_data = self.train_data
        self.example = self.repair_data[0]["input_ids"][None]
        self.test_data = test

    def whole_vocabulary(self) -> int:
        """Ids of the tokenizer, rounded up where the user asks for it."""
        least, asked = self.tokenizer.vocabulary, self.asked_vocabulary
        if asked is None or self.tokenizer_name == "bpe":
            return least
        if asked < least:
            raise UserError(
                f"vocabulary {asked} is smaller than the {least} ids of tokenizer {self.tokenizer_name!r}; "
                "leave data.vocabulary=null"
            )
        return asked

    def cut(self, corpus: Corpus) -> dict[str, Windows]:
        """{"train", "val", "test"}"""
        own_test = corpus.tokens.get("test")
        fraction = 0.0 if own_test is not None else self.test_fraction
        found = parts(corpus.tokens["train"], self.val_fraction, fraction, self.seed)
        if own_test is not None:
            found["test"] = everything(own_test)
        padding = corpus.tokenizer.end or 0
        return {name: Windows(part, self.context, None if name == "train" else padding) for name, part in found.items()}

    def sized(self, name: str, windows: Windows) -> Windows:
        size, seed = self.sizes[name], 0 if name == "test" else self.seed
        if size is None:
            return windows
        if not 0 < size <= len(windows):
            raise UserError(f"{name}_size {size} must be in 1..{len(windows)}, the number of windows")
        drawn = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))[:size]
        return windows.subset(drawn.sort().values)

    def facts(self) -> dict[str, Any]:
        """What a network has to know of the data: arguments of `build_model`."""
        return {"vocabulary": self.vocabulary, "context": self.context}

    def preparation(self) -> dict[str, Any]:
        """How a text is made ready, for use of the network elsewhere."""
        named = {"tokenizer": self.tokenizer_name, "identity": self.tokenizer.identity}
        return {**named, "vocabulary": self.vocabulary, "context": self.context}

    def told(self) -> str:
        """A line that says what is measured, and how the text was made ready for it."""
        left_out = f", {self.repeated:,} repeated documents left out" if self.repeated else ""
        return (
            f"{len(self.test_data):,} windows of {self.context} tokens ({self.tokenizer_name}, vocabulary "
            f"{self.vocabulary:,}){left_out}"
        )

    def train_dataloader(self) -> DataLoader:
        """Batches of one size, in an order that follows from seed and epoch, going on where a checkpoint stands."""
        processes, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        order = Shuffle(self.train_data, processes, rank, seed=self.seed, drop_last=len(self.train_data) >= processes)
        self._loader = ResumableLoader(
            self.train_data,
            self.batch_size,
            sampler=order,
            drop_last=len(order) >= self.batch_size,
            num_workers=self.workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
        )
        if self._resumed:
            self._loader.load_state_dict(self._resumed)
            self._resumed = {}
        return self._loader

    def state_dict(self) -> dict[str, Any]:
        """The place in the training data, and which tokenizer a checkpoint's network reads."""
        return {} if self._loader is None else {**self._loader.state_dict(), "tokenizer": self.tokenizer.identity}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Lightning may make the loader before it restores the states of loaders, but never before this."""
        self._resumed = state_dict

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """No loader where nothing is held out, so that a Trainer skips validation."""
        return self.eval_dataloader(self.val_data) if len(self.val_data) else []

    def test_dataloader(self) -> DataLoader:
        return self.eval_dataloader(self.test_data)

    def eval_dataloader(self, windows: Windows) -> DataLoader:
        """Batches in order. The loader's own generator keeps a pass from drawing on torch's global random state."""
        return DataLoader(
            windows,
            self.eval_batch_size,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),
        )


def check_numbers(batch_size: int, eval_batch_size: int, workers: int | None, **fractions: float) -> None:
    """UserError for the first number of a data module's that makes no sense."""
    for name, fraction in fractions.items():
        if not 0 <= fraction < 1:
            raise UserError(f"{name} {fraction} must be in 0 <= f < 1")
    for key, value in {"batch_size": batch_size, "eval_batch_size": eval_batch_size}.items():
        if value < 1:
            raise UserError(f"{key} {value} must be at least 1")
    if workers is not None and workers < 0:
        raise UserError(f"workers {workers} must be at least 0")
