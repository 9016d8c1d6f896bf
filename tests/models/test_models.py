"""Every architecture of the table, and the sizes of those that state one."""

import pytest
import torch

from pipeline.models import MODELS, build_model
from pipeline.tables import UserError

OPTIONS = {"resnet18": {"width": 4}, "preact_resnet18": {"width": 4}, "timm": {"architecture": "resnet10t"}}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_every_model_gives_logits(name, channels):
    model = build_model(name, 7, channels, **OPTIONS.get(name, {})).eval()
    with torch.no_grad():
        assert model(torch.randn(2, channels, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("resnet18", 11_173_962), ("preact_resnet18", 11_172_170), ("resnet20", 269_722), ("resnet32", 464_154)],
)
def test_sizes_are_those_that_the_builders_state(name, parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in build_model(name, 10, 3).parameters()) == parameters


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
        ("timm", {"architecture": "vit_tiny_patch61"}, "unknown timm model 'vit_tiny_patch61'"),
        ("timm", {"architecture": "resnet10t", "widht": 3}, "widht"),
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
