"""Windows count every token of a text once, and know how many bytes of text they count."""

import math
import pickle

import pytest
import torch
from texts import ready, stories
from torch import nn
from torch.utils.data import DataLoader

from pipeline.data.text import shards
from pipeline.data.text.shards import write_shards
from pipeline.tasks import Language
from pipeline.tasks.language import IGNORED

TEXTS = stories()


def whole(windows):
    return windows.__getitems__(range(len(windows)))


@pytest.fixture(params=[2**25, 300], ids=["one shard", "many shards"])
def shard(request, monkeypatch):
    monkeypatch.setattr(write_shards, "__defaults__", (request.param,))


@pytest.mark.usefixtures("shard")
@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
@pytest.mark.parametrize("context", [2, 16, 61, 10_000])
def test_every_token_of_a_text_is_counted_once(tmp_path, tokenizer, context):
    """Those alone are not counted that nothing in their window tells of: the first of a window and of a document."""
    options = {"context": 16, "tokenizer": tokenizer, "vocabulary": 300 if tokenizer == "bpe" else None}
    part = ready(tmp_path, **options).val_data.part
    windows = type(ready(tmp_path, **options).val_data)(part, context, padding=0)
    documents = [part.tokens[torch.arange(*span).numpy()] for span in zip(part.starts, part.ends, strict=True)]
    text = [(*token, not place) for ids, sizes in documents for place, token in enumerate(zip(ids, sizes, strict=True))]
    text = text[:-1] if len(text) % context == 1 else text  # a last token alone has no window
    told = [(i, size) for place, (i, size, first) in enumerate(text) if not first and place % context]
    batch = whole(windows)
    labels = batch["labels"]
    assert labels[labels != IGNORED].tolist() == [i for i, _ in told]
    assert int(batch["bytes"].sum()) == sum(size for _, size in told)
    assert batch["input_ids"].flatten()[: len(text)].tolist() == [i for i, _, _ in text]
    assert (batch["input_ids"] == labels)[labels != IGNORED].all()
    assert windows.tokens == len(text)


def test_bytes_of_a_part_are_those_of_its_text(tmp_path):
    data = ready(tmp_path, test_fraction=0.5)
    assert data.test_data.part.size == data.test_data.tokens
    text = data.tokenizer.decode(data.test_data.part.tokens[positions(data.test_data.part)][0])
    left_out = int((whole(data.test_data)["labels"] == IGNORED).sum())
    filled = len(data.test_data) * data.context - data.test_data.tokens
    # Bytes are tokens here; of each document's end nothing is text.
    ends = len(data.test_data.part.starts)
    counted_ends = int((whole(data.test_data)["labels"] == data.tokenizer.end).sum())
    total = len(text.encode()) + ends - (left_out - filled)
    assert int(whole(data.test_data)["bytes"].sum()) == total - counted_ends


def positions(part):
    return torch.cat([torch.arange(*span) for span in zip(part.starts, part.ends, strict=True)]).numpy()


def test_batches_are_what_the_task_counts(tmp_path):
    """A network that knows nothing takes log2(vocabulary) bits for each counted token."""
    data = ready(tmp_path, test_fraction=0.3)
    task, batches = Language(), list(data.test_dataloader())
    counted = sum(int((batch["labels"] != IGNORED).sum()) for batch in batches)
    lengths = sum(int(batch["bytes"].sum()) for batch in batches)
    found = task.values(sum(task.totals(torch.zeros(*batch["labels"].shape, 257), batch) for batch in batches))
    assert found["perplexity"] == pytest.approx(257, rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(counted * math.log2(257) / lengths, rel=1e-5)
    assert list(task.inputs(batches[0])) == ["input_ids"], "no mask reaches the network"


def test_what_fills_up_the_last_window_changes_nothing(tmp_path):
    data = ready(tmp_path, test_fraction=0.3)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(257, 8), Causal(), nn.Linear(8, 257)).eval()
    last = data.test_data[len(data.test_data) - 1]
    batch = {key: value[None] for key, value in last.items()}
    short = data.test_data.tokens % data.context
    assert 1 < short < data.context, "the last window of this text is filled up"
    cut = {key: value[:, :short] if value.dim() == 2 else value for key, value in batch.items()}
    totals = [Language().totals(net(some["input_ids"]), some) for some in (batch, cut)]
    torch.testing.assert_close(*totals)


class Causal(nn.Module):
    def forward(self, x):
        return x.cumsum(1)


def test_only_evaluation_fills_up_its_last_window(tmp_path):
    data = ready(tmp_path)
    assert len(data.train_data) == data.train_data.part.size // data.context
    assert len(data.test_data) == -(-data.test_data.part.size // data.context)


def test_subsets_batches_and_single_windows_agree(tmp_path):
    windows = ready(tmp_path).train_data
    rows = [5, 0, 7, 7]
    batch = windows.__getitems__(rows)
    some = windows.subset(rows)
    assert len(some) == 4
    for key, value in batch.items():
        assert torch.equal(value, whole(some)[key])
        assert torch.equal(value, torch.stack([windows[row][key] for row in rows]))
        assert value.dtype == torch.int64
    assert torch.equal(whole(some.subset([2]))["input_ids"][0], windows[7]["input_ids"])
    assert [value.shape for value in batch.values()] == [(4, 16), (4, 16), (4,)]
    (loaded,) = DataLoader(some, 4, collate_fn=some.collate)
    assert torch.equal(loaded["labels"], batch["labels"])


def test_a_pickle_holds_no_copy_of_the_tokens(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "AT_ONCE", 1)
    windows = ready(tmp_path).train_data
    before = whole(windows)["input_ids"]
    assert len(pickle.dumps(windows.part.tokens)) < windows.part.size
    assert torch.equal(whole(pickle.loads(pickle.dumps(windows)))["input_ids"], before)
