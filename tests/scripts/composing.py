"""Configs for tests: composed as the command line does, on tiny data and tiny networks."""

from pathlib import Path

from hydra import compose, initialize_config_module
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from tiny_models import TINY_CLIP

import configs
from scripts.compress import completed, expanded
from scripts.config import resolved

CONFIGS = Path(configs.__file__).parent
TINY = [
    "trainer.max_epochs=1",
    "+trainer.limit_train_batches=1",
    "+trainer.limit_val_batches=1",
    "trainer.enable_progress_bar=false",
    "trainer.accelerator=cpu",
    "compression.ratios=[0.5]",
    "compression.methods=[fold,l1]",
    "compression.repair_size=8",
    "wandb.mode=disabled",
]


def composed(*overrides: str) -> dict:
    GlobalHydra.instance().clear()
    with initialize_config_module("configs", version_base="1.3"):
        return resolved(compose("train", overrides=list(overrides)))


def composed_compress(*overrides: str) -> dict:
    GlobalHydra.instance().clear()
    with initialize_config_module("configs", version_base="1.3"):
        return resolved(completed(compose("compress", overrides=expanded(list(overrides)))))


def grid(sweep: str) -> list[list[str]]:
    """The overrides of every cell, as Hydra makes them."""
    params = OmegaConf.load(CONFIGS / "sweep" / f"{sweep}.yaml").hydra.sweeper.params
    overrides = OverridesParser.create().parse_overrides([f"{key}={value}" for key, value in params.items()])
    return BasicSweeper.split_arguments(overrides, None)[0]


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def shrunk(config: dict, roots: dict) -> dict:
    """The same config on tiny data and with a tiny network."""
    data, model = config["data"], config["model"]
    if data["name"] in roots:
        data["root"] = str(roots[data["name"]])
    data.update({"batch_size": 8, "val_fraction": 0.25})
    if "context" in data:
        made = {"root": str(roots["text"]), "tokenizer": "bytes", "vocabulary": None, "cache": roots["cache"]}
        data.update({"context": 16, "train_size": None, "test_size": 8, "val_size": 8, "eval_batch_size": 4, **made})
        data.update({"name": "text"} if data["name"] == "c4" else {})
        for key in ("documents", "test_documents", "root" if data["name"] == "pydoc" else None):
            data.pop(key, None)
    if model["name"] == "llama":
        model.update({"hidden": 16, "ffn": 24, "layers": 2, "heads": 4, "kv_heads": 2})
    if "width" in model:
        model["width"] = 4
    if model["name"] == "timm":
        model.update({"pretrained": False, "embed_dim": 24, "depth": 1, "num_heads": 2, "patch_size": 8})
        model["img_size"] = 32
    if model["name"] == "simple_vit":
        model.update({"dim": 24, "depth": 1, "heads": 2, "mlp_dim": 32, "patch_size": 8})
    if model["name"] == "torchvision":
        model["architecture"] = "squeezenet1_1"
    if model["name"] == "open_clip":
        model.update({**TINY_CLIP, "pretrained": None})
        if model["head"] == "zero_shot":
            model["class_names"] = list("abcdefghij")
    data.update({key: None for key in ("train_size", "test_size", "size") if key in data and "context" not in data})
    if config.get("chains"):
        data["train_size"], config["profile"]["seconds"] = 64, 0.01
    if data["name"] == "imagenet":
        data.update({"size": 32, "cache": None})
    return config
