"""Tiny networks of other libraries, with all the parts of the real ones."""

from pathlib import Path

import pytest

# Options of model open_clip. The vocabulary is the tokenizer's, so most of it is 49,408 embeddings.
TINY_CLIP = {
    "architecture": "ViT-B-32-quickgelu",
    "embed_dim": 12,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "layers": 2, "width": 16, "head_width": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "layers": 2, "width": 8, "heads": 2},
}


def write_huggingface_vit(folder: Path, classes: int = 5, **options) -> Path:
    """Write a ViT for 32x32 pictures with `save_pretrained`, which takes the options; returns the folder."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        image_size=32,
        patch_size=16,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        num_labels=classes,
    )
    transformers.ViTForImageClassification(config).save_pretrained(folder, **options)
    return folder


# Options of model llama, and the facts of its data.
TINY_LLAMA = {"hidden": 16, "ffn": 24, "layers": 2, "heads": 4, "kv_heads": 2}
TEXTS = {"vocabulary": 31, "context": 12}

# The sizes in the words of transformers' configs, by the kind of model.
_LLAMA = {
    "vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "bos_token_id": None, "eos_token_id": None,
    "pad_token_id": None,
}  # fmt: skip
LANGUAGE_MODELS = {
    "llama": _LLAMA,
    "smollm3": {**_LLAMA, "tie_word_embeddings": True},
    "qwen2": _LLAMA,
    "qwen3": {**_LLAMA, "head_dim": 8},
    "gpt2": {
        "vocab_size": 31, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_inner": 24,
        "bos_token_id": None, "eos_token_id": None,
    },
}  # fmt: skip


def write_language_model(folder: Path, kind: str = "llama", **options) -> Path:
    """Write a language model with random weights with `save_pretrained`; options change its config."""
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(kind, **{**LANGUAGE_MODELS[kind], **options})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder
