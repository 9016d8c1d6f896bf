"""Language models of transformers: the tracer finds their hidden layers, and duplicates in them fold without loss."""

import sys

import pytest
import torch
from tiny_models import LANGUAGE_MODELS, TEXTS, TINY_LLAMA, write_language_model

from pipeline.compressed import load
from pipeline.compression import channel_groups, compress
from pipeline.compression.checkpoint import save_compressed
from pipeline.models import build_model
from pipeline.models.checkpoint import load_into, read_state
from pipeline.tables import UserError

pytest.importorskip("transformers")
IDS = torch.randint(31, (2, 12), generator=torch.Generator().manual_seed(0))


def built(folder, **options):
    return build_model("language_model", **TEXTS, architecture=str(folder), **options).eval()


def double_(net, groups) -> None:
    """Make the second half of every group's channels equal to the first, where they are written and read."""
    state = net.state_dict()
    for group in groups:
        half = group.size // 2
        for axis in (*group.writes, *group.reads):
            weight = state[axis.tensor]
            for start in range(0, weight.shape[axis.axis], group.size):  # gate and up may lie in one tensor
                first = weight.narrow(axis.axis, start, half).clone()
                weight.narrow(axis.axis, start + half, half).copy_(first)


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_duplicated_channels_fold_without_loss(kind, tmp_path):
    """Grouped queries, norms of heads, tied embeddings, and GPT-2's linear layers, which are transposed."""
    net = built(write_language_model(tmp_path, kind)).double()
    hidden = [group for group in channel_groups(net, IDS[:1]) if group.part == "hidden"]
    assert [group.size for group in hidden] == [24, 24], "one for each layer"
    with torch.no_grad():
        double_(net, hidden)
        small = compress(net, IDS[:1], "fold", 0.5, parts=("hidden",))
        assert small.report.params_after < small.report.params_before
        torch.testing.assert_close(small.model(IDS), net(IDS))


def test_the_forward_pass_gives_logits_for_ids_with_and_without_a_mask(tmp_path):
    net = built(write_language_model(tmp_path))
    with torch.no_grad():
        assert net(IDS).shape == (2, 12, 31)
        torch.testing.assert_close(net(input_ids=IDS, attention_mask=torch.ones_like(IDS)), net(IDS))
        torch.testing.assert_close(net(IDS), net.model(input_ids=IDS).logits)


def test_a_folded_model_still_writes_text_with_its_cache():
    torch.manual_seed(0)
    net = build_model("llama", **TEXTS, **TINY_LLAMA).eval()
    small = compress(net, IDS[:1], "fold", 0.5, parts=("hidden",)).model
    assert small.model.config.use_cache
    written = small.generate(IDS[:1, :4], max_new_tokens=4, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        for at in range(4, 8):
            assert written[0, at] == small(written[:, :at])[0, -1].argmax()


@pytest.mark.parametrize("tied", [False, True])
def test_a_folded_llama_reloads_from_its_file_alone(tied, tmp_path):
    options = {**TEXTS, **TINY_LLAMA, "tied": tied, "checkpointing": True}
    net = build_model("llama", **options).eval()
    small = compress(net, IDS[:1], "l2", 0.25, parts=("hidden",))
    save_compressed(small, tmp_path / "small.safetensors", architecture={"name": "llama", **options})
    again, _ = load(tmp_path / "small.safetensors")
    with torch.no_grad():
        assert torch.equal(again(IDS), small.model(IDS))


@pytest.mark.parametrize("kind", ["llama", "smollm3", "gpt2"])
def test_weights_of_a_folder_are_a_checkpoint_of_its_config(kind, tmp_path):
    theirs = built(write_language_model(tmp_path, kind))
    net = built(tmp_path, pretrained=False)
    assert load_into(net, read_state(tmp_path), tmp_path) == []
    with torch.no_grad():
        assert torch.equal(net(IDS), theirs(IDS))


def test_checkpointing_changes_no_gradient():
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        net = build_model("llama", **TEXTS, **TINY_LLAMA, checkpointing=checkpointing)
        net(IDS).square().sum().backward()
        found.append([p.grad for p in net.parameters()])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("language_model", {"vocabulary": 40}, "the tokenizer has 40 tokens and .* knows 31; .*data.tokenizer"),
        ("language_model", {"context": 64}, "data.context 64 is more than the 32 tokens that .* reads"),
        ("language_model", {"wrong": 1}, "has no 'wrong'"),
        ("llama", {"vocab_size": 20}, "the tokenizer has 31 tokens and model knows 20"),
        ("llama", {"classes": 10}, "model 'llama' reads text, the data are pictures; choose .* resnet18"),
        (
            "resnet18",
            {},
            "model 'resnet18' reads pictures, the data are text; .*from: llama, language_model",
        ),
    ],
)
def test_models_that_do_not_fit_the_data_are_refused(name, options, message, tmp_path):
    more = {"llama": TINY_LLAMA, "language_model": {"architecture": str(write_language_model(tmp_path))}}
    with pytest.raises(UserError, match=message):
        build_model(name, **{**TEXTS, **more.get(name, {}), **options})


def test_a_larger_embedding_may_hold_more_tokens_than_the_tokenizer():
    assert build_model("llama", **TEXTS, **TINY_LLAMA, vocab_size=40)(IDS).shape == (2, 12, 40)


def test_missing_libraries_are_named_with_their_extra(tmp_path, monkeypatch):
    (tmp_path / "net.gguf").touch()
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"needs gguf, .*pip install 'foldability\[gguf\]'"):
        built(tmp_path / "net.gguf")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"needs transformers, .*pip install 'foldability\[language\]'"):
        build_model("llama", **TEXTS, **TINY_LLAMA)
