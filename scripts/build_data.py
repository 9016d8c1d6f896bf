"""Builds the data that a resolved config names, read and normalised as the model was trained."""

from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

from lightning import LightningDataModule

from pipeline.data.module import module_of
from pipeline.data.picture_set import DataSource, PictureSet
from pipeline.models import input_config
from pipeline.tables import UserError, call
from scripts.config import Config

TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")  # in a folder of Hugging Face
OF_PICTURES = ("mixup", "cutmix", "mean", "std")  # settings in base.yaml that other data do not have


def build_data(config: Config) -> LightningDataModule:
    return load_data(**data_options(config))


def data_options(config: Config) -> Config:
    """Arguments of `load_data`. Settings that data. leaves open come from the model's library (timm, ...).

    data.preprocessing names another model, and then its library decides. Size and crop are set only for data that is
    cropped: other pictures have one size, which is then the network's.
    """
    options = {**config["data"], "seed": config["seed"]}
    if module_of(options["name"]).kind != "pictures":
        options = {key: value for key, value in options.items() if key not in OF_PICTURES or value}
    if options.get("tokenizer", "") is None:
        options |= tokenizer_of(config["model"])
    known = None if options.get("preprocessing") else input_config(**config["model"])
    if known is None:
        return {**options, "usual": None}
    for key in ("size", "crop_pct", "interpolation"):
        if "crop_pct" in options and options[key] is None:
            options[key] = getattr(known, key)
    return {**options, "usual": [list(known.mean), list(known.std)]}


def tokenizer_of(model: Config) -> Config:
    """Arguments of the data by which a text is read as the model was trained; a model of ours takes any tokenizer."""
    if "architecture" not in model:
        return {"tokenizer": "bpe"}
    source = Path(model["architecture"]).expanduser()
    if source.is_dir() and not has_tokenizer(source):
        raise UserError(
            f"{source} has no tokenizer ({TOKENIZERS[0]}); give the one that it was trained with as data.tokenizer, "
            "and with it data.vocabulary=null"
        )
    return {"tokenizer": str(source), "vocabulary": None}


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZERS)


def load_data(usual: list[list[float]] | None, **options: Any) -> LightningDataModule:
    """The data, ready to use. usual: mean and std to normalise by unless options set others; None: those of the set."""
    data = call("data", module_of(options["name"]), **options)
    if usual is not None:
        data.source = normalised_by(data.source, *usual)
    data.prepare_data()
    data.setup()
    return data


def normalised_by(source: DataSource, mean: list[float], std: list[float]) -> DataSource:
    """The same source, whose pictures are normalised by this mean and std if they have as many channels."""

    @wraps(source.load)
    def load(**options: Any) -> PictureSet:
        pictures = source.load(**options)
        return replace(pictures, mean=mean, std=std) if len(pictures.mean) == len(mean) else pictures

    return replace(source, load=load)
