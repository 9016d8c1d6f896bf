"""TextData cuts a text into parts that share nothing, and has the shape of PictureData."""

import pickle
from itertools import chain

import numpy as np
import pytest
import torch
from texts import ready, stories

from pipeline.data import DATASETS, TEXTS
from pipeline.data.module import PictureData, module_of
from pipeline.data.text.module import TextData
from pipeline.tables import UserError

FEW = ["".join(f"{number} " for number in range(2000))]


def documents(windows, tokenizer):
    part = windows.part
    spans = zip(part.starts, part.ends, strict=True)
    return [tokenizer.decode(part.tokens[np.arange(*span)][0]) for span in spans]


def parts(data):
    return [documents(windows, data.tokenizer) for windows in (data.train_data, data.val_data, data.test_data)]


def test_parts_are_disjoint_and_complete(tmp_path):
    train, val, test = parts(ready(tmp_path, val_fraction=0.2, test_fraction=0.1))
    assert sorted(train + val + test) == sorted(stories())
    assert (len(test), len(val)) == (4, 7)


def test_a_repeated_document_is_in_one_part_and_told(tmp_path):
    data = ready(tmp_path, texts=[*stories(), *stories()[:7]], val_fraction=0.3, test_fraction=0.3)
    assert sorted(chain.from_iterable(parts(data))) == sorted(stories())
    assert data.told().endswith("(bytes, vocabulary 257), 7 repeated documents left out")


def test_seed_chooses_the_validation_part_but_never_the_test_part(tmp_path):
    first, again, other = (parts(ready(tmp_path, val_fraction=0.2, test_fraction=0.2, seed=s)) for s in (1, 1, 2))
    assert first == again
    assert first[1] != other[1]
    assert first[2] == other[2]


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_few_documents_are_cut_into_stretches(tmp_path, tokenizer):
    data = ready(tmp_path, FEW, tokenizer=tokenizer, vocabulary=300 if tokenizer == "bpe" else None, test_fraction=0.2)
    train, val, test = (part[0] for part in parts(data))
    assert (train + val + test).replace("<|endoftext|>", "") == FEW[0]
    assert len(test) == pytest.approx(0.2 * len(FEW[0]), rel=0.02)
    assert len(val) == pytest.approx(0.05 * 0.8 * len(FEW[0]), rel=0.05)


def test_nothing_need_be_held_out(tmp_path):
    for texts in (None, FEW):
        data = ready(tmp_path, texts, val_fraction=0.0)
        assert len(data.val_data) == 0
        assert data.val_dataloader() == []
        assert ready(tmp_path, texts, test_fraction=0.0).test_data.part.size == 0


def test_a_test_part_of_its_own_is_all_of_it_and_not_trained_on(tmp_path):
    (tmp_path / "test.txt").write_text("|".join(stories()[5:9]))
    train, val, test = parts(ready(tmp_path, test=tmp_path / "test.txt"))
    assert test == stories()[5:9]
    assert sorted(train + val) == sorted([*stories()[:5], *stories()[9:]])


def test_attributes(tmp_path):
    data = ready(tmp_path)
    assert data.example.shape == (1, 16)
    assert data.example.dtype == torch.int64
    assert torch.equal(data.example[0], data.repair_data[0]["input_ids"])
    assert data.repair_data is data.train_data
    assert data.facts() == {"vocabulary": 257, "context": 16}
    assert data.preparation() == {"tokenizer": "bytes", "identity": "bytes", "vocabulary": 257, "context": 16}
    assert data.told() == f"{len(data.test_data)} windows of 16 tokens (bytes, vocabulary 257)"
    assert (data.kind, data.unit) == ("text", "windows")
    assert len(pickle.loads(pickle.dumps(data)).train_data) == len(data.train_data)


def test_pictures_have_the_same_waist():
    data = PictureData("digits")
    data.setup()
    assert (data.kind, data.unit) == ("pictures", "pictures")
    assert data.facts() == {"classes": 10, "channels": 1}
    assert list(data.preparation()) == ["size", "mean", "std", "classes"]
    assert data.told() == ("360 pictures of 8x8, 10 classes, normalised by mean 0.305 and std 0.376 (data.mean=)")


def test_every_row_has_its_module():
    assert {name: module_of(name).kind for name in DATASETS} == {name: row.kind for name, row in DATASETS.items()}
    assert module_of("pydoc") is TextData
    assert module_of("digits") is PictureData
    with pytest.raises(UserError, match=r"unknown data set 'pydocs' \(did you mean 'pydoc'\?\)"):
        module_of("pydocs")
    with pytest.raises(UserError, match="unknown data set 'pydoc'"):
        PictureData("pydoc")
    with pytest.raises(UserError, match=r"unknown data set 'digits'.*; choose from: c4, pydoc, text"):
        TextData("digits")
    assert sorted(TEXTS) == ["c4", "pydoc", "text"]


def test_pydoc_needs_nothing(tmp_path):
    data = TextData("pydoc", tokenizer="bpe", vocabulary=512, cache=tmp_path, context=64)
    data.prepare_data()
    data.setup()
    assert data.vocabulary == 512
    assert len(data.train_data) > 1000
    assert "statement" in data.tokenizer.decode(np.concatenate([data.test_data[i]["input_ids"] for i in range(90)]))


def test_sizes_are_windows(tmp_path):
    data, small = ready(tmp_path), ready(tmp_path, train_size=20, val_size=2, test_size=3)
    assert [len(w) for w in (small.train_data, small.val_data, small.test_data)] == [20, 2, 3]
    assert set(small.train_data.rows.tolist()) < set(data.train_data.rows.tolist())
    tests = [ready(tmp_path, test_size=3, seed=seed).test_data.rows.tolist() for seed in (0, 1)]
    assert tests[0] == tests[1]


def test_loaders(tmp_path):
    data = ready(tmp_path, eval_batch_size=5)
    shapes = {tuple(batch["input_ids"].shape) for batch in data.train_dataloader()}
    assert shapes == {(4, 16)}, "a smaller last batch would compile a network anew"
    assert sum(len(batch["bytes"]) for batch in data.test_dataloader()) == len(data.test_data)
    before = torch.get_rng_state()
    list(data.val_dataloader())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_vocabulary_is_rounded_up(tmp_path):
    assert ready(tmp_path, vocabulary=320).facts()["vocabulary"] == 320


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 1}, "context 1 must be at least 2"),
        ({"context": 10_000}, r"training part of 'text' has \d+ tokens, less than one window of context=10000"),
        ({"vocabulary": 100}, "vocabulary 100 is smaller than the 257 ids of tokenizer 'bytes'"),
        ({"tokenizer": "bpe"}, "vocabulary None must be at least 257 for tokenizer 'bpe'"),
        ({"tokenizer": "bpe", "vocabulary": 256}, "vocabulary 256 must be at least 257"),
        ({"texts": [" ", "\n"]}, "data set 'text' holds no text"),
        ({"root": None}, "data set 'text' needs root"),
        ({"fild": "text"}, "data set 'text' has no option 'fild'; it takes: root, field, separator, test"),
        ({"val_fraction": 1.0}, r"val_fraction 1.0 must be in 0 <= f < 1"),
        ({"test_fraction": -0.1}, r"test_fraction -0.1 must be in 0 <= f < 1"),
        ({"val_fraction": 0.5, "test_fraction": 0.5}, "leave nothing to train on"),
        ({"train_size": 0}, r"train_size 0 must be in 1..\d+, the number of windows"),
        ({"test_size": 99999}, r"test_size 99999 must be in 1..\d+"),
        ({"batch_size": 0}, "batch_size 0 must be at least 1"),
        ({"workers": -1}, "workers -1 must be at least 0"),
    ],
)
def test_errors_name_the_value_and_the_fix(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        ready(tmp_path, **options)
