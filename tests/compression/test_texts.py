"""Texts that a language model gives: drawn from its own predictions, the same for one seed, whatever keeps its keys."""

import pytest
import torch
from test_blocks import Language, language, texts
from torch import nn
from toy_nets import randomise_, relative_error

from pipeline.compression import compress
from pipeline.compression.calibrate.texts import unigram_texts, written_texts
from pipeline.compression.compress import compressions
from pipeline.tables import UserError


class Bigram(nn.Module):
    """Each token's row of probabilities for the next one."""

    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(table.log())

    def forward(self, ids):
        return self.table[ids]


CHAIN = torch.tensor([[0.1, 0.6, 0.3], [0.5, 0.1, 0.4], [0.2, 0.7, 0.1]])


def frequencies(ids, size):
    return torch.bincount(ids.flatten(), minlength=size) / ids.numel()


def test_tokens_are_drawn_from_the_softmax():
    """Pairs of tokens come as often as the chain says; n = 40,000, so a frequency is off by .01 in one of 10^4 runs."""
    ids = written_texts(Bigram(CHAIN), torch.zeros(1, 401, dtype=torch.long), count=100)
    assert ids.shape == (100, 401)
    assert (ids[:, 0] == 0).all()
    for token in range(3):
        after = ids[:, 1:][ids[:, :-1] == token]
        assert (frequencies(after, 3) - CHAIN[token]).abs().max() < 0.02


def test_a_low_temperature_takes_the_likeliest_token():
    ids = written_texts(Bigram(CHAIN), torch.zeros(1, 50, dtype=torch.long), count=3, temperature=0.01)
    assert torch.equal(ids[0, :5], torch.tensor([0, 1, 0, 1, 0]))


def test_the_seed_decides_and_the_model_and_torch_s_state_stay():
    model, state = language(torch.float32).train(), torch.get_rng_state()
    first, again, other = (written_texts(model, texts(1), count=5, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_unigram_texts_come_as_often_as_the_model_uses_each_token():
    values, vectors = torch.linalg.eig(CHAIN.T)
    stationary = vectors[:, values.real.argmax()].real
    ids = unigram_texts(Bigram(CHAIN), torch.zeros(1, 400, dtype=torch.long), count=100)
    assert (frequencies(ids[:, 1:], 3) - stationary / stationary.sum()).abs().max() < 0.04
    after = ids[:, 1:][ids[:, :-1] == 1]  # what came before has no say
    assert (frequencies(after, 3) - frequencies(ids, 3)).abs().max() < 0.03


def test_keys_that_are_kept_change_nothing():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, use_cache=False, bos_token_id=7,
    )  # fmt: skip
    net = transformers.LlamaForCausalLM(config).eval()

    class Again(nn.Module):
        """The same network without its own way to write."""

        def __init__(self):
            super().__init__()
            self.net, self.config = [net], config

        def forward(self, ids):
            return net(ids).logits

    example = torch.zeros(1, 12, dtype=torch.long)
    kept, again = (written_texts(model, example, count=4) for model in (net, Again()))
    assert torch.equal(kept, again)
    assert (kept[:, 0] == 7).all()


@pytest.mark.parametrize("method", ["obs+self", "fold+unigram", "mix+self+temperature=0.8"])
def test_a_recipe_writes_its_own_texts(method):
    """It serves the language of the model: other texts that it writes."""
    model = language(torch.float32)
    ids = written_texts(model, texts(1), count=40, seed=9)
    smaller = next(compressions(model, ids[:1], method, [0.5]))
    raw = compress(model, ids[:1], method.partition("+")[0], 0.5)
    with torch.no_grad():
        assert relative_error(model(ids), smaller.model(ids)) < relative_error(model(ids), raw.model(ids))


def test_networks_of_pictures_write_nothing():
    model = randomise_(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)))
    with pytest.raises(UserError, match=r"texts come from networks of token ids \(N, T\)"):
        next(compressions(model, torch.zeros(1, 3, 4, 4), "fold+self", [0.5]))


def test_sizes_follow_the_rise_of_the_loss():
    """A block whose output hardly matters loses more than one that decides; the budget holds."""
    torch.manual_seed(0)
    model, ids = language(torch.float32), texts()
    with torch.no_grad():
        model.blocks[1].down.weight.mul_(1e-3)
    logits = {"answers": lambda output: output.flatten(0, 1)}
    smaller = next(compressions(model, ids[:1], "obs+self+params", [0.5], **logits))
    left = [row.after for row in smaller.report.groups]
    assert left[1] < min(left[0], left[2])
    even = next(compressions(model, ids[:1], "obs+self", [0.5]))
    assert smaller.report.params_after <= even.report.params_after
    assert isinstance(smaller.model, Language)
