"""Language models of transformers: LLaMA at any size, and any causal model from a folder, a GGUF file or the hub."""

from typing import Any

from torch import Tensor, nn

from pipeline.models.huggingface_models import Wrapped, auto_model
from pipeline.tables import UserError, optional


class CausalModel(Wrapped):
    """(B, T) token ids to (B, T, vocabulary) logits, those at t for the token at t + 1.

    generate: as the model's own, with its cache of keys and values, which only the forward pass here does without.
    """

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits

    def generate(self, *args: Any, **options: Any) -> Tensor:
        return self.model.generate(*args, **options)


def llama(
    vocabulary: int,
    context: int,
    hidden: int,
    ffn: int,
    layers: int,
    heads: int,
    kv_heads: int | None = None,
    tied: bool = False,
    vocab_size: int | None = None,
    checkpointing: bool = False,
) -> nn.Module:
    """LLaMA (arXiv:2302.13971) with fresh weights.

    vocabulary: tokens of the data; context: the longest sequence
    hidden: channels of the residual stream; ffn: of the gated hidden layers; heads: of each attention
    kv_heads: heads of keys and values (arXiv:2305.13245); None: as many as heads
    tied: the last layer is the embedding
    vocab_size: rows of the embedding, at least the vocabulary; None: as many
    checkpointing: compute activations again in the backward pass rather than keep them (arXiv:1604.06174)
    """
    transformers = optional("this model", "transformers", "language")
    config = transformers.LlamaConfig(
        vocab_size=vocab_size or vocabulary,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=context,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=None,
    )
    check_fits("model", config, vocabulary, context)
    return causal(transformers.LlamaForCausalLM(config), checkpointing)


def language_model(
    vocabulary: int,
    context: int,
    architecture: str,
    pretrained: bool = True,
    checkpointing: bool = False,
    **options: Any,
) -> nn.Module:
    """A causal language model of transformers. Options change its config (attention_dropout, ...).

    vocabulary, context: as for `llama`; the model may know more tokens and longer sequences
    architecture: a folder with config.json and safetensors, a GGUF file, whose weights become float32, or a name on the
        hub; code that comes with a model is never run
    """

    def check(config: Any) -> None:
        check_fits(architecture, config, vocabulary, context)

    return causal(auto_model("AutoModelForCausalLM", architecture, pretrained, check, options), checkpointing)


def causal(model: nn.Module, checkpointing: bool) -> CausalModel:
    if checkpointing:
        # The new name came with later versions of transformers, where the old one warns.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return CausalModel(model)


def check_fits(name: str, config: Any, vocabulary: int, context: int) -> None:
    """UserError where the data have tokens or positions that the model does not know."""
    known, positions = config.vocab_size, getattr(config, "max_position_embeddings", None)
    if vocabulary > known:
        raise UserError(
            f"the tokenizer has {vocabulary:,} tokens and {name} knows {known:,}; give the tokenizer that it was "
            "trained with as data.tokenizer, or for new weights set model.vocab_size=null"
        )
    if positions is not None and context > positions:
        raise UserError(f"data.context {context} is more than the {positions} tokens that {name} reads; shorten it")
