"""Weights arrive whole from every kind of file that people have; a file that does not fit is refused in one line."""

import fractions
import json

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from safetensors.torch import save_file
from tiny_models import TINY_CLIP, write_huggingface_vit
from torch import nn
from torchvision.models import DenseNet
from torchvision.models import resnet18 as torchvision_resnet18

from pipeline.models import build_model
from pipeline.models.checkpoint import load_into, read_state, settings_in, weight_files
from pipeline.tables import UserError

VIT = {"dim": 16, "depth": 2, "heads": 2, "mlp_dim": 24, "patch_size": 8}


def randomized(net: nn.Module) -> nn.Module:
    """The network with random statistics and norms, which differ from those of every new network."""
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.5 if "var" in name else torch.randn_like(tensor) / 4)
    return net.eval()


def small(classes: int = 10) -> nn.Module:
    return build_model("resnet18", classes, 3, width=4)


@torch.no_grad()
def assert_same_function(net: nn.Module, theirs, size: int = 32) -> None:
    x = torch.randn(3, 3, size, size)
    torch.testing.assert_close(net.eval()(x), theirs(x))


@pytest.mark.parametrize("prefix", ["", "module.", "net._orig_mod.", "_orig_mod.module.model.", "model.backbone."])
def test_wrappers_around_wrappers(prefix):
    weights = randomized(small()).state_dict()
    net = small()
    others = {"loss.weight": torch.zeros(2), "ema.0": torch.zeros(3)} if prefix else {}
    left_out = load_into(net, {prefix + name: t for name, t in weights.items()} | others, "net.pt")
    assert left_out == list(others)
    torch.testing.assert_close(dict(net.state_dict()), dict(weights), rtol=0, atol=0)


def test_values_take_the_types_and_memory_formats_of_the_model():
    weights = randomized(small()).half().state_dict()
    net = small().to(memory_format=torch.channels_last)
    load_into(net, {name: t for name, t in weights.items() if "num_batches" not in name}, "net.pt")
    for name, tensor in net.state_dict().items():
        assert tensor.dtype == (torch.int64 if "num_batches" in name else torch.float32)
        if "num_batches" not in name:
            assert torch.equal(tensor, weights[name].float())
    assert net.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)


class Regression(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_averaged_weights_are_taken_where_a_run_kept_them(tmp_path):
    task = Regression()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        default_root_dir=tmp_path,
        callbacks=[EMAWeightAveraging(decay=0.5), ModelCheckpoint(tmp_path, "epoch", save_on_train_epoch_end=True)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(task, torch.utils.data.DataLoader(torch.randn(4, 2), batch_size=1, num_workers=0))
    content = torch.load(tmp_path / "epoch.ckpt", weights_only=True)
    live, found = content["current_model_state"], read_state(tmp_path / "epoch.ckpt")
    assert torch.equal(found["net.weight"], content["state_dict"]["net.weight"])
    assert not torch.equal(found["net.weight"], live["net.weight"])


@pytest.mark.parametrize(
    "content",
    [
        lambda w, other: {"epoch": 3, "state_dict": other, "state_dict_ema": w},  # timm
        lambda w, other: {"model": other, "model_ema": {"n_averaged": torch.tensor(3)} | prefixed(w, "module.")},
        lambda w, other: {"last": w, "best": None},  # the sharpness study
        lambda w, other: {"model": {"state_dict": w}, "rng_state": torch.zeros(8, dtype=torch.uint8)},
    ],
    ids=["timm's average", "torchvision's average", "sharpness study", "random state beside"],
)
def test_where_scripts_keep_their_weights(content, tmp_path):
    weights, other = randomized(small()).state_dict(), small().state_dict()
    torch.save(content(weights, other), tmp_path / "net.pth")
    net = small()
    load_into(net, read_state(tmp_path / "net.pth"), "net.pth")
    torch.testing.assert_close(dict(net.state_dict()), dict(weights), rtol=0, atol=0)


def prefixed(state, prefix):
    return {prefix + name: tensor for name, tensor in state.items()}


# Public files of other code


def test_the_folding_studys_resnet18():
    """The study trains torchvision's ResNet18 with the stem for small pictures, whose names are not ours."""
    theirs = torchvision_resnet18(num_classes=10)
    theirs.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    theirs.maxpool = nn.Identity()
    randomized(theirs)
    assert {"layer2.0.downsample.0.weight", "fc.bias"} <= set(theirs.state_dict())
    net = build_model("resnet18", 10, 3)
    assert load_into(net, theirs.state_dict(), "2025-06-07_opt=adam.pth") == []
    with torch.no_grad():
        x = torch.randn(2, 3, 8, 8)
        torch.testing.assert_close(net.eval()(x), theirs(x), rtol=1e-4, atol=1e-4)


def test_the_sharpness_studys_preact_resnet18():
    """The study's module has our names, and its normalisation has no tensors."""
    names = ["conv1.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var", "bn.num_batches_tracked"]
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    for stage in (1, 2, 3, 4):
        for block in (0, 1):
            at = f"layer{stage}.{block}"
            names += [f"{at}.bn{i}.{part}" for i in (1, 2) for part in norm]
            names += [f"{at}.conv1.weight", f"{at}.conv2.weight"]
        names += [f"layer{stage}.0.shortcut.0.weight"] if stage > 1 else []
    assert set(build_model("preact_resnet18", 10, 3, width=4).state_dict()) == {*names, "linear.weight", "linear.bias"}


def test_the_sharpness_studys_simple_vit():
    """The study's network is that of vit-pytorch 0.40, which differs from today's in more than names."""
    names = ["to_patch_embedding.1.weight", "to_patch_embedding.1.bias"]
    for i in range(2):
        at = f"transformer.layers.{i}"
        names += [f"{at}.0.norm.weight", f"{at}.0.norm.bias", f"{at}.0.to_qkv.weight", f"{at}.0.to_out.weight"]
        names += [f"{at}.1.net.{part}.{value}" for part in (0, 1, 3) for value in ("weight", "bias")]
    names += [f"linear_head.{part}.{value}" for part in (0, 1) for value in ("weight", "bias")]
    net = randomized(build_model("simple_vit", 7, 3, **VIT))
    assert list(net.state_dict()) == names

    def theirs(x):
        tokens = net.to_patch_embedding[0](x) @ net.to_patch_embedding[1].weight.T + net.to_patch_embedding[1].bias
        tokens = tokens + net.pos_embedding
        for attention, mlp in net.transformer.layers:
            tokens = tokens + attention(tokens)
            tokens = tokens + mlp(tokens)
        norm, head = net.linear_head
        return head(norm(tokens.mean(1)))

    assert_same_function(net, theirs)


def test_model_soups():
    """A soup is a whole CLIP without the blocks of its text tower, and a head for features of length 1."""
    open_clip = pytest.importorskip("open_clip")
    net = build_model("open_clip", 7, 3, **TINY_CLIP)
    options = {name: value for name, value in TINY_CLIP.items() if name != "architecture"}
    clip = randomized(open_clip.CLIP(**options, quick_gelu=True))
    head = nn.Linear(12, 7)
    state = {f"model.{n}": t for n, t in clip.state_dict().items() if not n.startswith("transformer.")}
    state |= {f"classification_head.{name}": t for name, t in head.state_dict().items()}
    left_out = load_into(net, state, "model_0.pt")
    assert sorted(left_out) == [
        f"model.{name}"
        for name in ("ln_final.bias", "ln_final.weight", "logit_scale", "positional_embedding", "text_projection",
                     "token_embedding.weight")
    ]  # fmt: skip
    assert_same_function(net, lambda x: head(clip.encode_image(x, normalize=True)))
    state.pop("model.visual.ln_post.bias")
    with pytest.raises(UserError, match=r"model_0.pt is no ClipClassifier: .* it lacks visual.ln_post.bias; choose"):
        load_into(net, state, "model_0.pt")


def test_torchvisions_old_densenets():
    make = {"growth_rate": 2, "block_config": (1, 2), "num_init_features": 4, "bn_size": 2, "num_classes": 3}
    theirs, net = randomized(DenseNet(**make)), DenseNet(**make)
    old = {
        name.replace("norm1", "norm.1").replace("norm2", "norm.2").replace("conv1", "conv.1").replace("conv2", "conv.2")
        for name in theirs.state_dict()
    }
    assert "features.denseblock2.denselayer2.norm.2.weight" in old
    load_into(
        net, dict(zip(sorted(old), (theirs.state_dict()[n] for n in sorted(theirs.state_dict())), strict=True)), "d"
    )
    assert_same_function(net, theirs)


# Folders of Hugging Face


@pytest.mark.parametrize("shard", [None, "4KB"])
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_folders_of_huggingface(form, shard, tmp_path):
    """Names in the files are not those of the modules: transformers renames modules, but not its files."""
    options = {"max_shard_size": shard} if shard else {}
    folder = write_huggingface_vit(tmp_path / "vit", **options)
    theirs = build_model("huggingface", 5, 3, architecture=str(folder))
    if form == "bin":
        for file in weight_files(folder):
            torch.save(read_state(file), file.with_name(f"pytorch_{file.stem}.bin"))
            file.unlink()
        for index in folder.glob("*.index.json"):
            of = {name: f"pytorch_{at}".replace("safetensors", "bin") for name, at in weight_map(index).items()}
            (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": of}))
            index.unlink()
    assert len(weight_files(folder)) == 1 if shard is None else len(weight_files(folder)) > 3
    assert "vit.encoder.layer.0.attention.attention.query.weight" in read_state(folder)
    net = build_model("huggingface", 5, 3, architecture=str(folder), pretrained=False)
    load_into(net, read_state(folder), folder)
    torch.testing.assert_close(net.state_dict(), theirs.state_dict(), rtol=0, atol=0)


def weight_map(index):
    return json.loads(index.read_text())["weight_map"]


def test_a_network_of_huggingface_trained_by_us_and_by_them(huggingface_vit):
    theirs = build_model("huggingface", 5, 3, architecture=str(huggingface_vit))
    for prefix, state in (
        ("net.", theirs.state_dict()),
        ("", theirs.model.state_dict()),
        ("module.", read_state(huggingface_vit)),
    ):
        net = build_model("huggingface", 5, 3, architecture=str(huggingface_vit), pretrained=False)
        load_into(net, prefixed(state, prefix), "net.pt")
        torch.testing.assert_close(net.state_dict(), theirs.state_dict(), rtol=0, atol=0)


def test_what_of_huggingface_does_not_fit(huggingface_vit):
    state = read_state(huggingface_vit)
    net = build_model("huggingface", 7, 3, architecture=str(huggingface_vit), pretrained=False)
    with pytest.raises(UserError, match=r"vit has 5 classes, the data 7 \(model.classifier.weight is") as caught:
        load_into(net, state, "vit")
    assert "\n" not in str(caught.value)
    net = build_model("huggingface", 5, 3, architecture=str(huggingface_vit), pretrained=False)
    state.pop("vit.encoder.layer.1.output.dense.weight")
    with pytest.raises(UserError, match=r"is no ImageClassifier: .* it lacks model.vit.layers.1.mlp.fc2.weight"):
        load_into(net, state, "vit")


def test_folders_that_are_not_whole(tmp_path):
    with pytest.raises(UserError, match=f"folder {tmp_path} holds no weights: it has none of model.safetensors"):
        read_state(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text("{")
    with pytest.raises(UserError, match=r"index.json is damaged"):
        read_state(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}))
    save_file({"a": torch.zeros(2)}, tmp_path / "model-1.safetensors")
    with pytest.raises(UserError, match=r"lacks model-2.safetensors, which model.safetensors.index.json names"):
        read_state(tmp_path)


# Files that are refused


@pytest.mark.parametrize("zipped", [True, False], ids=["", "of before 2020"])
def test_what_a_pickle_needs_beside_weights_is_named(zipped, tmp_path):
    content = {"model": small().state_dict(), "share": fractions.Fraction(1, 3)}
    torch.save(content, tmp_path / "net.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"would run code: it needs fractions.Fraction; save the weights alone"):
        read_state(tmp_path / "net.pt")


def test_torchscript_is_named(tmp_path):
    with pytest.warns(match="torch.jit.* is deprecated"):
        torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), tmp_path / "net.pt")
    with pytest.raises(UserError, match=r"net.pt is a TorchScript archive, which holds code; save its state_dict\(\)"):
        read_state(tmp_path / "net.pt")


def test_what_holds_no_names(tmp_path):
    torch.save(torch.zeros(3), tmp_path / "net.pt")
    with pytest.raises(UserError, match="holds a Tensor, no weights by name"):
        read_state(tmp_path / "net.pt")


# Names of files

STUDY = (
    "dataset=cifar10 arch=resnet18 opt={} seed=42 lr=0.1 batch_size=128 momentum=0.9 wd={} epochs=200 l1={} l2=0.0"
    " sam={} sam_rho=0.05 rand_aug=True lr_schedule={}"
)
SHARPNESS = (
    "dataset=cifar10 model={} epochs=200 lr_max={} model_width={} l2_reg=0.0 sam_rho=0.1 batch_size=128 frac_train=1"
    " p_label_noise=0.0 lr_schedule=cyclic augm={} randaug=False seed=0 epoch=200"
)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        (STUDY.format("adam", "0.0005", "0.0", "True", "True"), "2025-06-07_23-50-07_{underscores}.pth"),
        (STUDY.format("sgd", "0.0", "1e-05", "False", "False"), "nets/sgd/2025-06-11_02-10-15_{underscores}.pth"),
        (SHARPNESS.format("resnet18", "0.0504226", 64, "False"), "2023-01-15 14:36:41.247 {spaces}.pth"),
        (SHARPNESS.format("resnet18", "0.9131416", 64, "True"), "2023-01-15 15_20_55.687 {spaces}.pth"),
        (SHARPNESS.format("vit_exp", "0.155923", 512, "True"), "vit/2023-01-14 23_40_10.063 {spaces}.pth"),
        ("", "soups/model_4.pt"),
        ("", "resnet20-12fca82f.th"),
        ("lr=0.1 wd=0.05", "runs/a_{underscores}"),  # a folder
        ("lr=1e-05", "a_{underscores}.pth.tar"),
    ],
)
def test_hyperparameters_in_the_names_of_files(settings, name):
    name = name.format(spaces=settings, underscores=settings.replace(" ", "_"))
    assert settings_in(name) == dict(pair.split("=") for pair in settings.split())
