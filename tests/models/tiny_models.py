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
