"""The models of other libraries: their trained weights, heads made of words, and how pictures are made ready."""

import json
import sys
from urllib.error import URLError

import pytest
import torch
from huggingface_hub import constants
from tiny_models import TINY_CLIP, write_huggingface_vit
from torch import nn
from torchvision.models import WeightsEnum, get_model

from pipeline.models import InputConfig, build_model, input_config
from pipeline.tables import UserError

NAMES, SENTENCES = ["cat", "tabby cat with a very long name", "dog"], ["a photo of a {}.", "{}!"]


# torchvision


@pytest.fixture
def file_of_torchvision(monkeypatch):
    """A file in place of a download: random weights for 1,000 classes."""
    kept = {}

    def served(self, *args, **kwargs):
        name = type(self).__name__.removesuffix("_Weights").lower()
        options = {"init_weights": False} if name == "googlenet" else {}
        return kept.setdefault(name, get_model(name, weights=None, **options)).state_dict()

    monkeypatch.setattr(WeightsEnum, "get_state_dict", served)
    return kept


@pytest.mark.parametrize("architecture", ["squeezenet1_1", "googlenet"])
@pytest.mark.parametrize("classes", [7, 1000])
def test_all_of_torchvisions_weights_but_a_classifier_of_other_classes(architecture, classes, file_of_torchvision):
    net = build_model("torchvision", classes, 3, architecture=architecture, pretrained=True)
    theirs = file_of_torchvision[architecture].state_dict()
    new = {name for name, tensor in net.state_dict().items() if not torch.equal(tensor, theirs[name])}
    head = {"squeezenet1_1": "classifier.1", "googlenet": "fc"}[architecture]
    assert new == (set() if classes == 1000 else {f"{head}.weight", f"{head}.bias"})
    assert isinstance(net.train()(torch.randn(2, 3, 64, 64)), torch.Tensor), "no second classifiers in training"


# open_clip


@pytest.fixture
def clip():
    """A tiny CLIP whose text features are not all alike."""
    open_clip = pytest.importorskip("open_clip")
    options = {name: value for name, value in TINY_CLIP.items() if name != "architecture"}
    clip = open_clip.CLIP(**options, quick_gelu=True).eval()
    with torch.no_grad():
        for parameter in clip.parameters():
            parameter.copy_(torch.randn_like(parameter) / 2)
    return clip


def test_a_zero_shot_head_is_clip_less_its_text_tower(clip, tmp_path):
    open_clip = pytest.importorskip("open_clip")
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    net = build_model(
        "open_clip", 3, 3, **TINY_CLIP, pretrained=str(tmp_path / "clip.pt"), head="zero_shot", class_names=NAMES,
        templates=SENTENCES,
    )  # fmt: skip
    assert {name.split(".")[0] for name in net.state_dict()} == {"visual", "head"}
    texts = open_clip.get_tokenizer("ViT-B-32-quickgelu")([s.format(n) for n in NAMES for s in SENTENCES])
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        features = clip.encode_text(texts, normalize=True).unflatten(0, (3, 2)).mean(1)
        weight = features / features.norm(dim=1, keepdim=True)
        expected = 100 * clip.encode_image(x, normalize=True) @ weight.T
        torch.testing.assert_close(net.eval()(x), expected)
    assert net.head.bias.abs().sum() == 0


def test_a_linear_head_classifies_features_of_length_one_unless_told_otherwise():
    x = torch.randn(4, 3, 32, 32)
    for normalize in (True, False):
        net = build_model("open_clip", 5, 3, **TINY_CLIP, normalize=normalize).eval()
        with torch.no_grad():
            features = net.visual(x)
            expected = net.head(nn.functional.normalize(features, dim=1) if normalize else features)
            torch.testing.assert_close(net(x), expected)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"class_names": NAMES}, "class_names has 3 names, the data has 10 classes; give one name a class"),
        ({"class_names": "cifar"}, "unknown class_names of open_clip 'cifar'; choose from: imagenet"),
        ({"templates": "opena"}, r"unknown templates of open_clip 'opena' \(did you mean 'openai'\?\)"),
        ({"templates": ["a {}", "a photo"]}, r"template 'a photo' must hold \{\} for the class's name"),
        (
            {"architecture": "ViT-B-32", "pretrained": "openai"},
            "openai was trained with QuickGELU.*=ViT-B-32-quickgelu",
        ),
    ],
)
def test_words_and_weights_that_do_not_fit(options, match):
    pytest.importorskip("open_clip")
    with pytest.raises(UserError, match=match):
        build_model("open_clip", 10, 3, **({"head": "zero_shot"} | options))


# Hugging Face


def test_huggingface_folders(huggingface_vit):
    trained = build_model("huggingface", 5, 3, architecture=str(huggingface_vit)).state_dict()
    again = build_model("huggingface", 5, 3, architecture=str(huggingface_vit)).state_dict()
    torch.testing.assert_close(trained, again, rtol=0, atol=0)
    other = build_model("huggingface", 7, 3, architecture=str(huggingface_vit)).state_dict()
    assert {name for name in other if not torch.equal(other[name], trained[name])} == {
        "model.classifier.weight", "model.classifier.bias"
    }  # fmt: skip
    fresh = build_model("huggingface", 5, 3, architecture=str(huggingface_vit), pretrained=False).state_dict()
    assert not torch.equal(fresh["model.classifier.weight"], trained["model.classifier.weight"])
    with pytest.raises(UserError, match=r"the config of .*vit has no 'hidden_sizes'"):
        build_model("huggingface", 5, 3, architecture=str(huggingface_vit), hidden_sizes=3)


def test_huggingface_weights_of_half_precision_become_whole(tmp_path):
    folder = write_huggingface_vit(tmp_path / "vit")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    for pretrained in (True, False):
        net = build_model("huggingface", 5, 3, architecture=str(folder), pretrained=pretrained)
        assert {tensor.dtype for tensor in net.parameters()} == {torch.float32}


# Failures of downloads and imports


@pytest.mark.parametrize(
    ("name", "extra", "package"), [("open_clip", "clip", "open_clip"), ("huggingface", "huggingface", "transformers")]
)
def test_a_missing_library_is_named_with_its_extra(name, extra, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    for function, where in ((build_model, (10, 3)), (input_config, ())):
        with pytest.raises(UserError, match=rf"needs {package}, .*pip install 'foldability\[{extra}\]'"):
            function(name, *where, architecture="ViT-B-32")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("timm", {"architecture": "resnet10t", "pretrained": True}),
        ("torchvision", {"architecture": "squeezenet1_1", "pretrained": True}),
        ("open_clip", {"pretrained": "openai"}),
        ("huggingface", {"architecture": "nobody/no-such-vit"}),
    ],
)
def test_without_a_network_there_is_one_line_at_once(name, options, monkeypatch, tmp_path):
    def away(*args, **kwargs):
        raise URLError("Name or service not known")

    class Session:
        head = staticmethod(away)

    monkeypatch.setattr("huggingface_hub.get_session", Session)
    monkeypatch.setattr("torch.hub.download_url_to_file", away)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(
        UserError, match=r"no trained weights for .*(not in the cache|not known).*; (set|give)"
    ) as caught:
        build_model(name, 10, 3, **options)
    assert "\n" not in str(caught.value)
    assert constants.HF_HUB_OFFLINE is False


# How pictures are made ready


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("resnet18", {"width": 4}, None),
        ("timm", {"architecture": "vit_base_patch32_224"}, (224, 0.9, 0.5, 0.5, "bicubic")),
        ("timm", {"architecture": "resnet18", "img_size": 64, "pretrained": True}, (64, 0.95, 0.485, 0.229, "bicubic")),
        ("torchvision", {"pretrained": "IMAGENET1K_V1"}, (224, 0.875, 0.485, 0.229, "bilinear")),
        ("torchvision", {"architecture": "resnet50"}, (224, 224 / 232, 0.485, 0.229, "bilinear")),
        ("open_clip", {"pretrained": "openai"}, (224, 1.0, 0.48145466, 0.26862954, "bicubic")),
        ("open_clip", TINY_CLIP, (32, 1.0, 0.48145466, 0.26862954, "bicubic")),
        ("open_clip", {"force_image_size": 64}, (64, 1.0, 0.48145466, 0.26862954, "bicubic")),
    ],
)
def test_the_pictures_that_a_model_wants(name, options, expected):
    found = input_config(name, **options)
    if expected is None:
        assert found is None
    else:
        assert (found.size, found.crop_pct, found.mean[0], found.std[0], found.interpolation) == expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (None, None),
        ({"size": {"height": 32, "width": 32}, "resample": 2}, (32, 1.0, "bilinear")),
        ({"size": 224, "crop_pct": 0.875, "resample": 3}, (224, 0.875, "bicubic")),
        (
            {"size": {"shortest_edge": 256}, "do_center_crop": True, "crop_size": {"height": 224, "width": 224}},
            (224, 0.875, "bicubic"),
        ),
    ],
)
def test_the_pictures_that_a_folder_of_huggingface_wants(settings, expected, tmp_path):
    pytest.importorskip("transformers")
    if settings is not None:
        settings = {"resample": 3, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.5, 0.5]} | settings
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    found = input_config("huggingface", architecture=str(tmp_path))
    if expected is not None:
        size, crop_pct, interpolation = expected
        expected = InputConfig(size, crop_pct, (0.1, 0.2, 0.3), (0.5, 0.5, 0.5), interpolation)
    assert found == expected


def test_pictures_that_are_no_squares_are_refused(tmp_path):
    pytest.importorskip("transformers")
    settings = {"resample": 3, "image_mean": [0.5], "image_std": [0.5], "size": {"height": 224, "width": 448}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"pictures of size .*448.*only squares can be made; set data.size"):
        input_config("huggingface", architecture=str(tmp_path))
