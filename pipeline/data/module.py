"""The LightningDataModule of any data set of pictures, and `module_of`, which finds that of any set in DATASETS."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule
from lightning.fabric.utilities.data import suggested_max_num_workers
from torch.utils.data import DataLoader

from pipeline.tables import UserError, call, pick

from . import DATASETS
from .augment import augmentation, check_alpha, check_steps, mixing
from .picture_set import DataSource, Portion
from .pictures import Pictures, collate
from .split import split
from .text.module import TextData, check_numbers


class PictureData(LightningDataModule):
    """Train, validation and test pictures of one set.

    `facts`, `preparation`, `told`, `kind` and `unit` are those of TextData, too, so nothing has to ask which it is.

    After `prepare_data()` and `setup()`, which a Trainer calls:
    train_data, val_data, test_data: Pictures; only train_data is augmented
    repair_data: the training pictures, without augmentation
    (where a set has test pictures alone, the other three raise UserError)
    classes: names in the order of the labels; num_classes of them
    channels, size: C and H of a picture; example: (1, C, H, H) float32, a real one, normalised

    name: a row of DATASETS; `options` are those of the row, such as size of 'folder'
    root: where the set lies or is downloaded to; None: the default of the set
    augment: rows of AUGMENTATIONS, done in this order; (): none
    mixup, cutmix: alpha of the Beta distribution of the weights by which training pictures and labels are mixed in
        pairs, 0: off; both on: one of the two for each batch. Labels of a training batch become (B, classes) float32
    val_fraction: share of the training pictures held out for validation, 0 <= f < 1
    seed: chooses what is held out, and the pictures of train_size; shuffling and augmentation follow torch's own seed
    workers: processes that fetch training batches and, for a set that stays on disk, evaluation batches as well; None:
        one for each core of this process's share if pictures have to be decoded, none if they are in memory
    train_size, test_size: use only so many pictures, every class in proportion, for quick runs; None: all. The test
        pictures are the same for every seed.
    mean, std: of the channels scaled to 0..1, to normalise by; None: those that are usual for the set, else those of
        its training pictures
    download: fetch the set when it is not in root
    """

    kind, unit = "pictures", "pictures"

    def __init__(
        self,
        name: str,
        root: str | Path | None = None,
        batch_size: int = 128,
        augment: Sequence[str] = (),
        mixup: float = 0.0,
        cutmix: float = 0.0,
        val_fraction: float = 0.1,
        seed: int = 0,
        workers: int | None = None,
        eval_batch_size: int = 512,
        train_size: int | None = None,
        test_size: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        download: bool = True,
        **options: Any,
    ):
        super().__init__()
        self.source = pick("data set", rows(self.kind), name)
        check_steps(augment)
        check_alpha("mixup", mixup)
        check_alpha("cutmix", cutmix)
        check_numbers(batch_size, eval_batch_size, workers, val_fraction=val_fraction)
        self.name, self.augment, self.batch_size, self.eval_batch_size = name, augment, batch_size, eval_batch_size
        self.mixup, self.cutmix = mixup, cutmix
        self.val_fraction, self.seed = val_fraction, seed
        self.train_size, self.test_size, self.mean, self.std = train_size, test_size, mean, std
        self.workers, self.download = workers, download
        self.place = {} if root is None else {"root": root}
        self.options = options
        self.test_data: Pictures | None = None

    def prepare_data(self) -> None:
        """Download what is missing (Lightning calls this on one process per machine)."""
        if self.download and self.source.fetch:
            self.source.fetch(**self.place)

    def setup(self, stage: str | None = None) -> None:
        if self.test_data is not None:  # Lightning calls setup before every stage
            return
        pictures = call(f"data set {self.name!r}", self.source.load, **self.place, **self.options)
        self.classes, self.num_classes = pictures.classes, len(pictures.classes)
        self.mixing = mixing(self.mixup, self.cutmix, self.num_classes)
        self.channels, self.size = pictures.test.images.shape[1:3]

        if (self.mean is None) != (self.std is None):
            given, missing = ("mean", "std") if self.std is None else ("std", "mean")
            raise UserError(f"data.{given} is set and data.{missing} is not; give both, or neither")
        normal = self.mean or pictures.mean, self.std or pictures.std
        for key, values in {"mean": normal[0], "std": normal[1]}.items():
            if len(values) != self.channels:
                raise UserError(f"{key} {list(values)} must have one value for each of {self.channels} channels")
        self.of_training = self.cut(pictures.train, *normal) if pictures.train else None
        test = Pictures(pictures.test.images, pictures.test.labels, *normal)
        self.test_data = test.subset(part_of(test.labels, "test_size", self.test_size, seed=0))
        self.example = (self.repair_data if self.of_training else self.test_data)[0][0][None]

    def cut(self, part: Portion, mean: Sequence[float], std: Sequence[float]) -> dict[str, Pictures]:
        """{"train", "repair", "val"}: training pictures, the same without augmentation, and those held out by seed."""
        everything = Pictures(part.images, part.labels, mean, std)
        varied = Pictures(part.images if part.varied is None else part.varied, part.labels, mean, std)
        train, val = split(part.labels, self.val_fraction, self.seed)
        train = train[part_of(part.labels[train], "train_size", self.train_size, self.seed)]
        return {
            "train": varied.subset(train, augmentation(self.augment, self.size)),
            "repair": everything.subset(train),
            "val": everything.subset(val),
        }

    @property
    def train_data(self) -> Pictures:
        return self.asked_for("train")

    @property
    def val_data(self) -> Pictures:
        return self.asked_for("val")

    @property
    def repair_data(self) -> Pictures:
        return self.asked_for("repair")

    def facts(self) -> dict[str, Any]:
        """What a network has to know of the data: arguments of `build_model`."""
        return {"classes": self.num_classes, "channels": self.channels}

    def preparation(self) -> dict[str, Any]:
        """How pictures are made ready and what the outputs mean, for use of the network elsewhere."""
        mean, std = self.test_data.mean, self.test_data.std
        return {"size": self.size, "mean": list(mean), "std": list(std), "classes": list(self.classes)}

    def told(self) -> str:
        """A line that says how pictures are made ready: wrong preparation only lowers accuracy, without any error."""
        mean, std = (", ".join(f"{value:.3g}" for value in self.preparation()[key]) for key in ("mean", "std"))
        return (
            f"{len(self.test_data):,} pictures of {self.size}x{self.size}, {len(self.classes)} classes, normalised by "
            f"mean {mean} and std {std} (data.mean=)"
        )

    def asked_for(self, name: str) -> Pictures:
        if self.of_training is None:
            raise UserError(
                f"data set {self.name!r} has no training pictures in {self.place['root']}: put them in train/<class>/, "
                "or measure trained networks without repair, with compression.stages=[raw]"
            )
        return self.of_training[name]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Mix a training batch on the device, once, even if a step passes it through the network twice (SAM)."""
        if self.mixing is None or self.trainer is None or not self.trainer.training:
            return batch
        return self.mixing(*batch)

    def train_dataloader(self) -> DataLoader:
        processes = self.trainer.world_size if self.trainer else 1
        share = -(-len(self.train_data) // processes)  # DistributedSampler rounds up
        return DataLoader(
            self.train_data,
            self.batch_size,
            shuffle=True,
            # A last batch of one is dropped, because BatchNorm cannot take a variance of one value per channel.
            drop_last=share > self.batch_size > 1 and share % self.batch_size == 1,
            num_workers=self.processes(self.train_data),
            # A persistent worker carries random state from epoch to epoch, which a resumed run would not have.
            persistent_workers=False,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
        )

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """No loader where nothing is held out, so that a Trainer skips validation."""
        return self.eval_dataloader(self.val_data) if len(self.val_data) else []

    def test_dataloader(self) -> DataLoader:
        return self.eval_dataloader(self.test_data)

    def eval_dataloader(self, pictures: Pictures) -> DataLoader:
        """Batches in order. The loader's own generator keeps a pass from drawing on torch's global random state."""
        return DataLoader(
            pictures,
            self.eval_batch_size,
            num_workers=0 if pictures.in_memory else self.processes(pictures),
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),
        )

    def processes(self, pictures: Pictures) -> int:
        if self.workers is not None:
            return self.workers
        return 0 if pictures.in_memory else suggested_max_num_workers(self.trainer.num_devices if self.trainer else 1)


MODULES: dict[str, type[PictureData] | type[TextData]] = {module.kind: module for module in (PictureData, TextData)}


def module_of(name: str) -> type[PictureData] | type[TextData]:
    """The data module that serves a row of DATASETS. UserError, with the known names, for any other."""
    return MODULES[pick("data set", DATASETS, name).kind]


def rows(kind: str) -> dict[str, DataSource]:
    """The rows of DATASETS that one data module serves."""
    return {name: source for name, source in DATASETS.items() if source.kind == kind}


def part_of(labels: torch.Tensor, option: str, size: int | None, seed: int) -> torch.Tensor:
    """Indices of the `size` pictures to use, every class in proportion; None: all."""
    if size is None or size == len(labels):
        return torch.arange(len(labels))
    if not 0 < size < len(labels):
        raise UserError(f"{option} {size} must be in 1..{len(labels)}, the number of pictures")
    return split(labels, size, seed)[1]
