"""The vision towers of open_clip as classifiers: a linear head, or one made of words."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.library import InputConfig, check_known, muted, side, trained_weights
from pipeline.tables import UserError, optional, pick

HEADS = ("linear", "zero_shot")
SCALE = 100.0  # factor of zero-shot logits, as OpenAI's CLIP has learnt it


class ClipClassifier(nn.Module):
    """(B, 3, size, size) pictures to (B, classes) logits: a linear map of the tower's features.

    visual: pictures to (B, features); normalize: bring the features to length 1 first
    """

    def __init__(self, visual: nn.Module, features: int, classes: int, normalize: bool) -> None:
        super().__init__()
        self.visual = visual
        self.head = nn.Linear(features, classes)
        self.normalize = normalize

    def forward(self, x: Tensor) -> Tensor:
        features = self.visual(x)
        return self.head(F.normalize(features, dim=-1) if self.normalize else features)


def open_clip_model(
    classes: int,
    channels: int,
    architecture: str = "ViT-B-32-quickgelu",
    pretrained: str | None = None,
    head: str = "linear",
    normalize: bool = True,
    class_names: str | Sequence[str] = "imagenet",
    templates: str | Sequence[str] = "openai",
    **options: Any,
) -> nn.Module:
    """A ClipClassifier. Options go to `open_clip.create_model` (force_image_size, embed_dim, vision_cfg, ...).

    pretrained: a tag of open_clip such as "openai", or a file with both towers; None: random weights, to train or to
        load a checkpoint into
    head: "linear": a new one; "zero_shot": the text tower makes it of class_names and templates, and is then dropped
    normalize: classify features of length 1, as zero-shot heads do, and the model soups, which started from such heads
    class_names: one name for each class, in the order of the labels, or "imagenet" for the 1,000 of ImageNet-1K
    templates: sentences with {} for the name, or "openai" for the 80 of arXiv:2103.00020, or "simple" for 7 of them
    """
    open_clip = optional("this model", "open_clip", "clip")
    check(architecture, pretrained)
    pick("head of open_clip", dict.fromkeys(HEADS), head)
    if channels != 3:
        raise UserError(f"open_clip's {architecture} takes 3 channels, these pictures have {channels}; use model=timm")
    names, texts = words(class_names, templates)
    if head == "zero_shot" and len(names) != classes:
        raise UserError(f"class_names has {len(names)} names, the data has {classes} classes; give one name a class")
    # Without pretrained weights open_clip warns that they are random.
    what = f"open_clip's {architecture}, {pretrained}"
    with trained_weights(what, hub=not Path(pretrained).is_file()) if pretrained else muted():
        clip = open_clip.create_model(architecture, pretrained=pretrained, **options)
    features = options.get("embed_dim", open_clip.get_model_config(architecture)["embed_dim"])
    net = ClipClassifier(clip.visual, features, classes, normalize)
    if head == "zero_shot":
        with torch.no_grad():
            net.head.weight.copy_(zero_shot(clip, architecture, names, texts))
            net.head.bias.zero_()
    return net


def open_clip_input(
    architecture: str = "ViT-B-32-quickgelu", pretrained: str | None = None, **options: Any
) -> InputConfig:
    open_clip = optional("this model", "open_clip", "clip")
    check(architecture, pretrained)
    vision = options.get("vision_cfg", open_clip.get_model_config(architecture)["vision_cfg"])
    trained = open_clip.get_pretrained_cfg(architecture, pretrained) if pretrained else {}
    return InputConfig(
        size=side(options.get("force_image_size") or vision.get("image_size", 224)),
        crop_pct=1.0,
        mean=tuple(trained.get("mean") or open_clip.OPENAI_DATASET_MEAN),
        std=tuple(trained.get("std") or open_clip.OPENAI_DATASET_STD),
        interpolation=trained.get("interpolation") or "bicubic",
    )


def check(architecture: str, pretrained: str | None) -> None:
    """UserError for names that open_clip does not have, and for weights that were trained with another activation."""
    open_clip = optional("this model", "open_clip", "clip")
    check_known("open_clip model", architecture, open_clip.list_models(), "open_clip.list_models()")
    if not pretrained or Path(pretrained).is_file():
        return
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    pick(f"tag or file of weights for open_clip's {architecture}", dict.fromkeys(tags), pretrained)
    quick = open_clip.get_pretrained_cfg(architecture, pretrained).get("quick_gelu", False)
    if quick != open_clip.get_model_config(architecture).get("quick_gelu", False):
        plain = architecture.removesuffix("-quickgelu")
        raise UserError(
            f"{pretrained} was trained with {'QuickGELU' if quick else 'GELU'}, which open_clip's {architecture} has"
            f" not; use architecture={plain + '-quickgelu' if quick else plain}"
        )


def words(class_names: str | Sequence[str], templates: str | Sequence[str]) -> tuple[Sequence[str], Sequence[Any]]:
    """(names of classes, templates that make sentences of them: text with {}, or open_clip's functions)"""
    open_clip = optional("this model", "open_clip", "clip")
    if isinstance(class_names, str):
        class_names = pick("class_names of open_clip", {"imagenet": open_clip.IMAGENET_CLASSNAMES}, class_names)
    if isinstance(templates, str):
        known = {"openai": open_clip.OPENAI_IMAGENET_TEMPLATES, "simple": open_clip.SIMPLE_IMAGENET_TEMPLATES}
        return class_names, pick("templates of open_clip", known, templates)
    wrong = [text for text in templates if "{}" not in text]
    if wrong or not templates:
        raise UserError(
            f"template {(wrong or ['none'])[0]!r} must hold {{}} for the class's name: 'a photo of a {{}}.'"
        )
    return class_names, list(templates)


def zero_shot(clip: nn.Module, architecture: str, names: Sequence[str], templates: Sequence[Any]) -> Tensor:
    """(classes, features) weights of a head: the mean of a class's normalised text features, to length SCALE.

    arXiv:2103.00020, section 3.1.4. 1,000 names in 80 sentences take an hour on one CPU core.
    """
    import open_clip

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = open_clip.get_tokenizer(architecture, context_length=clip.context_length)
    if isinstance(clip, open_clip.CLIP) and clip.text_pool_type == "argmax" and clip.attn_mask is not None:
        texts = [make.format(name) if isinstance(make, str) else make(name) for name in names for make in templates]
        tokenizer = open_clip.get_tokenizer(architecture, context_length=shorten_(clip, tokenizer(texts)))
    training = clip.training
    weight = open_clip.build_zero_shot_classifier(
        clip.to(device).eval(), tokenizer, names, templates, device=device, use_tqdm=len(names) > 100
    )
    clip.cpu().train(training)
    return SCALE * weight.T.cpu()


def shorten_(clip: nn.Module, tokens: Tensor) -> int:
    """Cut the text tower to the longest of the (texts, positions) tokens, and return its length.

    Each position sees only those before it, and a text's feature is that of its last token, so the padding up to 77
    changes nothing. Without padding ImageNet's prompts, of 22 tokens at most, took a fifth of the time and gave the
    same bits.
    """
    length = int(tokens.count_nonzero(dim=1).max())
    clip.positional_embedding = nn.Parameter(clip.positional_embedding[:length])
    clip.attn_mask = clip.attn_mask[:length, :length]
    return length
