"""Networks of torchvision, timm, open_clip, vit_pytorch and Hugging Face: all their groups are found, fold and prune.

The default suite has small networks from the libraries' own constructors, the slow suite the usual sizes.
"""

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import pytest
import timm
import torch
from timm.models import MlpMixer
from torch import nn
from torchvision.models import (
    ConvNeXt,
    DenseNet,
    EfficientNet,
    MobileNetV2,
    MobileNetV3,
    RegNet,
    ShuffleNetV2,
    SwinTransformer,
    VisionTransformer,
)
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.efficientnet import MBConvConfig
from torchvision.models.mobilenetv3 import InvertedResidualConfig
from torchvision.models.regnet import BlockParams
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2
from torchvision.models.vgg import VGG, make_layers
from toy_nets import frozen_reason, picture

from benchmarks.coverage import ARCHITECTURES, EXACT, WITH_HEADS, WITH_WIDTH, Detector, errors
from pipeline.compression import channel_groups
from pipeline.models import build_model


class Tiny(NamedTuple):
    """A small network, what it is called with, and how many groups of each part it has; "head": it has attention."""

    build: Callable[[], nn.Module]
    example: object
    found: dict[str, int]


IDS = torch.arange(10).view(2, 5) % 7


def vgg():
    net = VGG(make_layers([8, "M", 12, "M"], batch_norm=True), num_classes=5)
    net.classifier = nn.Sequential(nn.Linear(12 * 7 * 7, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 5))
    return net


def regnet(se_ratio):
    return RegNet(BlockParams.from_init_params(depth=4, w_0=8, w_a=8.0, w_m=2.0, group_width=4, se_ratio=se_ratio), 5)


def swin(version):
    parts = {"block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2} if version == 2 else {}
    return SwinTransformer([4, 4], 8, [2, 2], [2, 2], [2, 2], num_classes=5, **parts)


def timms(name, **options):
    return lambda: timm.create_model(name, num_classes=5, **options)


VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}


def clip():
    import open_clip

    vision = {"image_size": 16, "layers": 2, "width": 16, "patch_size": 8, "head_width": 8}
    text = {"context_length": 5, "vocab_size": 20, "width": 16, "heads": 2, "layers": 2}
    return open_clip.CLIP(12, vision, text)


def hugging_face(model, **sizes):
    def build():
        import transformers

        kind = getattr(transformers, model)
        return kind(kind.config_class(use_cache=False, **sizes))

    return build


LLAMA = {
    "vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
BERT = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip


def encoder(norm_first):
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, norm_first=norm_first)
    return nn.Sequential(nn.Linear(6, 16), layer, nn.Linear(16, 5))


TINY = {
    "vgg": Tiny(vgg, picture(size=32), {"hidden": 3}),
    "densenet": Tiny(lambda: DenseNet(4, (2, 2), 8, bn_size=2, num_classes=5), picture(size=32), {"hidden": 10}),
    "mobilenet_v2": Tiny(
        lambda: MobileNetV2(5, inverted_residual_setting=[[1, 8, 1, 1], [3, 8, 2, 2]]),
        picture(size=32),
        {"hidden": 5, "residual": 1},
    ),
    "mobilenet_v3": Tiny(
        lambda: MobileNetV3(
            [
                InvertedResidualConfig(8, 3, 8, 8, True, "RE", 1, 1, 1.0),
                InvertedResidualConfig(8, 5, 24, 12, True, "HS", 2, 1, 1.0),
            ],
            last_channel=20,
            num_classes=5,
        ),
        picture(size=32),
        {"hidden": 6, "residual": 1},
    ),
    "efficientnet": Tiny(
        lambda: EfficientNet([MBConvConfig(1, 3, 1, 8, 8, 1), MBConvConfig(4, 3, 2, 8, 12, 2)], 0.2, num_classes=5),
        picture(size=32),
        {"hidden": 6, "residual": 2},
    ),
    "shufflenet": Tiny(lambda: ShuffleNetV2([2, 2, 2], [8, 16, 24, 32, 40], 5), picture(size=32), {"hidden": 8}),
    "regnet_x": Tiny(lambda: regnet(None), picture(size=32), {"hidden": 5, "residual": 3}),
    "regnet_y": Tiny(lambda: regnet(0.25), picture(size=32), {"hidden": 9, "residual": 3}),
    "convnext": Tiny(
        lambda: ConvNeXt([CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 2)], num_classes=5),
        picture(size=32),
        {"hidden": 3},
    ),
    "swin": Tiny(lambda: swin(1), picture(size=32), {"hidden": 4, "head": 0}),
    "swin_v2": Tiny(lambda: swin(2), picture(size=32), {"hidden": 12, "head": 0}),
    "vit": Tiny(
        lambda: VisionTransformer(16, 8, 2, 2, 16, 24, num_classes=5),
        picture(size=16),
        {"hidden": 2, "width": 8, "head": 2},
    ),
    "timm vit": Tiny(timms("vit_tiny_patch16_224", **VIT), picture(size=16), {"hidden": 2, "width": 8, "head": 2}),
    "timm vit, gains and norms of queries and keys": Tiny(
        timms("vit_tiny_patch16_224", qk_norm=True, init_values=0.1, **VIT), picture(size=16), {"hidden": 2, "head": 0}
    ),
    "timm vit, pooled by attention": Tiny(
        timms("vit_tiny_patch16_224", global_pool="map", class_token=False, **VIT),
        picture(size=16),
        {"hidden": 4, "width": 8, "head": 2},
    ),
    "timm deit": Tiny(
        timms("deit_tiny_distilled_patch16_224", **VIT), picture(size=16), {"hidden": 2, "width": 8, "head": 2}
    ),
    "timm eva": Tiny(timms("eva02_tiny_patch14_224", **VIT), picture(size=16), {"hidden": 2, "head": 0}),
    "timm vit, rotary": Tiny(timms("vit_small_patch16_rope_224", **VIT), picture(size=16), {"hidden": 2, "head": 2}),
    "timm swin": Tiny(
        timms("swin_tiny_patch4_window7_224", img_size=32, window_size=2, embed_dim=8, depths=(2, 2), num_heads=(2, 2)),
        picture(size=32),
        {"hidden": 4, "width": 16, "head": 4},
    ),
    "timm mixer": Tiny(
        lambda: MlpMixer(5, img_size=32, patch_size=16, num_blocks=2, embed_dim=16), picture(size=32), {"hidden": 4}
    ),
    "timm convnext": Tiny(
        timms("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 12, 12)), picture(size=32), {"hidden": 4}
    ),
    "timm resnext": Tiny(
        timms(
            "resnext50_32x4d",
            layers=(1, 1, 1, 1),
            channels=(16, 16, 24, 24),
            cardinality=4,
            base_width=16,
            stem_width=8,
        ),
        picture(size=32),
        {"hidden": 4, "residual": 4},
    ),
    "timm resnetv2": Tiny(
        timms("resnetv2_50", layers=(1, 1), channels=(16, 32), stem_chs=8),
        picture(size=32),
        {"hidden": 5, "residual": 2},
    ),
    "open_clip": Tiny(clip, (picture(size=16), IDS), {"hidden": 4, "width": 16, "head": 4}),
    "simple_vit": Tiny(
        lambda: build_model("simple_vit", 5, 3, size=16, patch_size=8, dim=16, depth=2, heads=2, mlp_dim=24),
        picture(size=16),
        {"hidden": 2, "width": 8, "head": 2},
    ),
    "gpt2": Tiny(
        hugging_face("GPT2LMHeadModel", vocab_size=20, bos_token_id=0, eos_token_id=0, n_embd=16, n_layer=2, n_head=2),
        {"input_ids": IDS},
        {"hidden": 2, "width": 8, "head": 2},
    ),
    "llama": Tiny(hugging_face("LlamaForCausalLM", **LLAMA), {"input_ids": IDS}, {"hidden": 2, "head": 2}),
    "llama, tied embeddings": Tiny(
        hugging_face("LlamaForCausalLM", tie_word_embeddings=True, **LLAMA),
        {"input_ids": IDS},
        {"hidden": 2, "head": 2},
    ),
    "llama, eager": Tiny(
        hugging_face("LlamaForCausalLM", attn_implementation="eager", **LLAMA),
        {"input_ids": IDS},
        {"hidden": 2, "head": 2},
    ),
    "qwen3": Tiny(hugging_face("Qwen3ForCausalLM", head_dim=6, **LLAMA), {"input_ids": IDS}, {"hidden": 2, "head": 2}),
    "bert": Tiny(
        hugging_face("BertForSequenceClassification", vocab_size=20, **BERT),
        {"input_ids": IDS},
        {"hidden": 3, "width": 8, "head": 2},
    ),
    "hugging face vit": Tiny(
        hugging_face("ViTForImageClassification", image_size=16, patch_size=8, **BERT),
        {"pixel_values": picture(size=16)},
        {"hidden": 2, "width": 8, "head": 2},
    ),
    "torch encoder layer": Tiny(lambda: encoder(False), torch.randn(2, 5, 6), {"hidden": 1, "width": 4, "head": 1}),
    "torch encoder layer, norm first": Tiny(
        lambda: encoder(True), torch.randn(2, 5, 6), {"hidden": 1, "width": 4, "head": 1}
    ),
    "detector": Tiny(lambda: Detector(8), picture(size=32), {"hidden": 49, "residual": 4}),
}


@pytest.mark.parametrize("name", TINY)
def test_small_ones(name):
    torch.manual_seed(0)
    build, example, expected = TINY[name]
    model = build().eval()
    asked = (WITH_WIDTH, WITH_HEADS) if "head" in expected else (WITH_WIDTH,)
    traces = [channel_groups(model, example, parts) for parts in asked]
    found = [Counter(group.part for group in groups) for groups in traces]
    assert found[0] | found[-1] == Counter(expected)
    for seed in range(2):
        folded, pruned, effect = errors(model, example, traces, seed)
        assert max(folded, pruned) < EXACT / 10
        assert effect > EXACT


NAMED = {
    "convnext": ("features.0.0.weight", "layer_norm"),
    "swin": ("features.1.0.attn.qkv.weight", "select"),  # its forward takes the width from the stream
    "timm vit, gains and norms of queries and keys": ("blocks.0.attn.q_norm.weight", "layer_norm"),
    "open_clip": ("visual.proj", "linalg_vector_norm"),  # features are brought to length 1
}


@pytest.mark.parametrize("name", NAMED)
def test_what_freezes_is_named_with_its_operation(name):
    build, example, _ = TINY[name]
    tensor, operation = NAMED[name]
    assert operation in frozen_reason(channel_groups(build().eval(), example, WITH_WIDTH), tensor)


# Networks with norms over all their channels: the LayerNorm of a spatial gate, a response norm.
FROZEN = ("timm gmlp_ti16_224", "timm convnextv2_atto")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The tensor attributes.*were assigned during export:UserWarning")  # LeViT's cache
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_those_that_people_have(name):
    model, example = ARCHITECTURES[name].build().eval(), ARCHITECTURES[name].example()
    traces = [channel_groups(model, example, parts) for parts in (WITH_WIDTH, WITH_HEADS)]
    assert any(map(len, traces)) == (name not in FROZEN)
    if name not in FROZEN:
        folded, pruned, effect = errors(model, example, traces, seed=0)
        assert max(folded, pruned) < EXACT
        assert effect > EXACT
