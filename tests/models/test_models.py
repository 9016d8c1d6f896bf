"""Every architecture of the table, and the sizes of those that state one."""

import pytest
import torch
from tiny_models import TINY_CLIP

from pipeline.compression import channel_groups, compress
from pipeline.models import MODELS, build_model, reads
from pipeline.tables import UserError

SMALL_VIT = {"dim": 16, "depth": 2, "heads": 2, "mlp_dim": 24}
OPTIONS = {
    "resnet18": {"width": 4},
    "preact_resnet18": {"width": 4},
    "resnet9": {"width": 4},
    "simple_vit": SMALL_VIT,
    "timm": {"architecture": "resnet10t"},
    "torchvision": {"architecture": "squeezenet1_1"},
    "open_clip": TINY_CLIP,
}
COLOUR = ("torchvision", "open_clip", "huggingface")  # take 3 channels alone


@pytest.fixture
def options(huggingface_vit):
    return OPTIONS | {"huggingface": {"architecture": str(huggingface_vit), "pretrained": False}}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", [name for name in MODELS if reads(name) == "pictures"])
def test_every_model_gives_logits(name, channels, options):
    if channels == 1 and name in COLOUR:
        with pytest.raises(UserError, match="takes 3 channels, these pictures have 1; use model=timm"):
            build_model(name, 7, channels, **options[name])
        return
    model = build_model(name, 7, channels, **options.get(name, {}))
    assert model.training
    with torch.no_grad():
        assert model.eval()(torch.randn(2, channels, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize(
    ("name", "mlps"), [("open_clip", "visual.transformer.resblocks"), ("huggingface", "model.vit")]
)
def test_what_is_around_other_libraries_transformers_hides_nothing_from_the_tracer(name, mlps, options):
    model = build_model(name, 7, 3, **options[name]).eval()
    groups = channel_groups(model, torch.randn(2, 3, 32, 32))
    assert len([group for group in groups if group.name.startswith(mlps)]) >= 2, "one for each block's MLP"


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("resnet18", 11_173_962),
        ("preact_resnet18", 11_172_170),
        ("resnet9", 1_849_930),
        ("resnet20", 269_722),
        ("resnet32", 464_154),
        ("simple_vit", 18_927_114),  # as in the study's log
    ],
)
def test_sizes_are_those_that_the_builders_state(name, parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in build_model(name, 10, 3).parameters()) == parameters


@pytest.mark.parametrize("name", ["resnet18", "preact_resnet18"])
def test_a_stem_of_stride_2_halves_the_pictures_and_changes_no_tensor(name):
    whole, half = (build_model(name, 7, 3, width=4, stem_stride=stride).eval() for stride in (1, 2))
    half.load_state_dict(whole.state_dict())
    pictures = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(half.conv1(pictures), whole.conv1(pictures)[..., ::2, ::2])


def test_every_channel_of_resnet9_can_be_compressed_and_its_duplicates_fold_without_loss():
    torch.manual_seed(0)
    model = build_model("resnet9", 7, 3, width=4).double().eval()
    groups = channel_groups(model, torch.randn(2, 3, 32, 32, dtype=torch.float64))
    assert [(group.name, group.size) for group in groups] == [
        ("stem.conv", 4),
        ("layer1.0.conv", 8),
        ("layer1.1.conv1.conv", 8),
        ("layer2.0.conv", 16),
        ("layer2.1.conv1.conv", 16),
    ]
    with torch.no_grad():  # clusters of 3 and of 1, where half of the channels stay
        for layer in (model.stem, model.layer1[1].conv1):
            layer.conv.weight[: len(layer.conv.weight) // 2 + 1] = layer.conv.weight[0]
    pictures = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    protect = ["layer1.0.conv", "layer2"]
    smaller, report = compress(model, pictures, "fold", 0.5, features="writers", protect=protect)
    assert [group.after for group in report.groups] == [2, 8, 4, 16, 16]
    with torch.no_grad():
        torch.testing.assert_close(smaller(pictures), model(pictures))


def test_simple_vit_has_a_group_for_each_mlp_and_its_duplicates_fold_without_loss():
    torch.manual_seed(0)
    model = build_model("simple_vit", 7, 3, size=8, **SMALL_VIT).double().eval()
    pictures = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    groups = channel_groups(model, pictures)
    assert [(group.name, group.size) for group in groups] == [
        ("transformer.layers.0.1.net.1", 24),
        ("transformer.layers.1.1.net.1", 24),
    ]
    for layers in model.transformer.layers:
        net = layers[1].net
        with torch.no_grad():  # clusters of 13 and of 1 channels
            net[1].weight[12:] = net[1].weight[0]
            net[1].bias[12:] = net[1].bias[0]
    smaller, report = compress(model, pictures, "fold", 0.5, features="writers")
    assert [group.after for group in report.groups] == [12, 12]
    with torch.no_grad():
        torch.testing.assert_close(smaller(pictures), model(pictures))


def test_simple_vit_of_the_study_has_18_29_million_parameters_at_ratio_0_1():
    """The number that the study reports; 103 of 1024 hidden channels go, each with 512 + 1 + 512 weights."""
    with torch.device("meta"):
        model = build_model("simple_vit", 10, 3)
    assert sum(p.numel() for p in model.parameters()) - 6 * 103 * 1025 == 18_293_664


def test_simple_vit_as_the_library_has_it():
    with torch.device("meta"):
        names = set(build_model("simple_vit", 10, 3, variant="vit_pytorch", **SMALL_VIT).state_dict())
    assert {"to_patch_embedding.3.weight", "transformer.norm.weight", "linear_head.weight"} <= names


@pytest.mark.parametrize("name", ["resnet18", "preact_resnet18"])
def test_names_are_those_of_the_study_checkpoints(name):
    with torch.device("meta"):
        names = set(build_model(name, 10, 3).state_dict())
    assert {"conv1.weight", "layer1.0.bn1.running_mean", "layer2.0.shortcut.0.weight", "linear.bias"} <= names


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("resnet81", {}, r"unknown model 'resnet81' \(did you mean"),
        ("resnet18", {"depth": 3}, "model 'resnet18' has no option 'depth'; it takes: width"),
        ("simple_vit", {"size": 30}, "model 'simple_vit': size 30 must be a multiple of 4"),
        ("simple_vit", {"dim": 30}, "model 'simple_vit': dim 30 must be a multiple of 4"),
        ("simple_vit", {"variant": "old"}, "unknown variant of simple_vit 'old'; choose from: study, vit_pytorch"),
        ("timm", {"architecture": "vit_tiny_patch61"}, "unknown timm model 'vit_tiny_patch61'"),
        ("timm", {"architecture": "resnet10t", "widht": 3}, "widht"),
        ("torchvision", {"architecture": "resnet51"}, "unknown torchvision model 'resnet51'; near it: resnet50"),
        ("torchvision", {"architecture": "squeezenet1_1", "widht": 3}, "widht"),
        ("torchvision", {"pretrained": "V3"}, "unknown weights of resnet50 'V3'; choose from: DEFAULT, IMAGENET1K_V1"),
        ("open_clip", {"architecture": "ViT-B32"}, "unknown open_clip model 'ViT-B32'; near it: ViT-B-32"),
        ("open_clip", {"pretrained": "opnai"}, r"weights for open_clip's ViT-B-32-quickgelu 'opnai' \(did you mean"),
        ("open_clip", {"head": "zeroshot"}, r"unknown head of open_clip 'zeroshot' \(did you mean 'zero_shot'\?\)"),
        ("huggingface", {"architecture": "/nowhere/vit"}, "no folder /nowhere/vit"),
    ],
)
def test_errors(name, options, match):
    with pytest.raises(UserError, match=match):
        build_model(name, 10, 3, **options)


def test_the_seed_decides_the_weights():
    models = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        models.append(build_model("resnet18", 10, 3, width=4).conv1.weight)
    assert torch.equal(models[0], models[1])
    assert not torch.equal(models[0], models[2])
