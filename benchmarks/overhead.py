"""Measures what Lightning and the compression callback cost beside loops written by hand, both in one run.

    python -m benchmarks.overhead               # six minutes on two busy cores
    python -m benchmarks.overhead --repeats 3   # three epoch ends instead of one

An epoch of Lightning with the callback attached runs after every epoch of a plain loop over the same network and data;
the time of the callback's measurement is taken out. That time is compared with the bare forward passes that a
measurement needs: right before or after (in turns) every evaluation and repair, a plain loop passes the same batches
through a copy of the same network. Pictures are random, because time does not depend on what they show.
"""

import argparse
import copy
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from benchmarks.common import THREADS, described, machine, timed, write
from callbacks.compression import CompressionCallback
from pipeline.compression.calibrate.repair import repair_
from pipeline.data import DATASETS, DataSource
from pipeline.data.module import PictureData
from pipeline.data.picture_set import PictureSet, Portion, picture_set
from pipeline.evaluate import evaluate
from pipeline.models import build_model
from pipeline.tasks import Classification
from pipeline.training import Training

SEED = 0
CLASSES = 10
WIDTH = 16
SGD = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
METHODS = ["fold", "l1", "l2"]
RATIOS = [r / 10 for r in range(1, 10)]
STAGES = ["raw", "repaired"]
REPAIR_SIZE = 2048
OVERHEAD, RATIO = 0.05, 1.3  # targets: Lightning over the plain loop, measurement over its bare passes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=1, help="epoch ends at which the callback measures")
    parser.add_argument("--epochs", type=int, default=9, help="from one measurement to the next; the first warms up")
    parser.add_argument("--train", type=int, default=2048, help="training pictures")
    parser.add_argument("--val", type=int, default=1024, help="pictures that either loop validates on")
    parser.add_argument("--measured", type=int, default=5000, help="pictures that smaller networks are measured on")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/overhead"), help="writes OUT.json, OUT.md")
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        epochs, ends = measured(args.train, args.val, args.measured, args.epochs, args.repeats)
    result = {
        "config": {
            "model": "resnet18",
            "width": WIDTH,
            "memory_format": "channels_last",
            "data": "random 3x32x32 pictures in memory, crop and flip",
            "train": args.train,
            "val": args.val,
            "measured": args.measured,
            "batch_size": 128,
            "eval_batch_size": 512,
            "optim": SGD,
            "methods": METHODS,
            "ratios": RATIOS,
            "stages": STAGES,
            "repair_size": REPAIR_SIZE,
        },
        "seed": SEED,
        "machine": machine("lightning"),
        "overhead": statistics.median(e["lightning_s"] / e["plain_s"] for e in epochs) - 1,
        "ratio": statistics.median(end["whole_s"] / bare_s(end) for end in ends),
        "epochs": epochs,
        "epoch_ends": ends,
    }
    write(args.out, result, report(result))


def measured(train: int, val: int, test: int, every: int, repeats: int) -> tuple[list[dict], list[dict]]:
    """Wall seconds of the epochs after the first, and of the epoch ends at which the callback measures."""
    torch.manual_seed(SEED)
    with mock.patch.dict(DATASETS, {"random": DataSource(lambda: random_pictures(train + val, test))}):
        data = PictureData("random", batch_size=128, augment=["crop", "flip"], val_fraction=val / (train + val))
        data.setup()
    assert (len(data.train_data), len(data.val_data), len(data.test_data)) == (train, val, test)
    net = build_model("resnet18", classes=CLASSES, channels=3, width=WIDTH).to(memory_format=torch.channels_last)
    plain = PlainLoop(copy.deepcopy(net), data, epochs=every * repeats)
    task = Training(net, Classification("multiclass", classes=CLASSES), {"name": "sgd", **SGD}, {"name": "cosine"})
    bare = BarePasses()
    compression = TimedCompression(
        bare, METHODS, RATIOS, every, STAGES, eval_data=data.test_dataloader(), repair_size=REPAIR_SIZE, seed=SEED
    )
    beside = SideBySide(plain, compression)
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch("pipeline.measure.evaluate", bare.beside("evaluation", evaluate, training=False, at=1)),
        mock.patch("pipeline.stages.repair.repair_", bare.beside("repair", repair_, training=True, at=0)),
    ):
        trainer = Trainer(
            max_epochs=every * repeats,
            accelerator="cpu",
            logger=CSVLogger(folder),
            callbacks=[compression, beside],
            default_root_dir=folder,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        trainer.fit(task, datamodule=data)
    failed = compression.rows.filter(compression.rows["status"] != "ok")
    assert failed.is_empty(), failed
    return beside.epochs[1:], compression.ends


def random_pictures(*counts: int) -> PictureSet:
    """A set of random pictures. counts: of training and validation pictures together, and of test pictures."""
    generator = torch.Generator().manual_seed(SEED)
    parts = [
        Portion(
            torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator),
            torch.arange(count) % CLASSES,
        )
        for count in counts
    ]
    return picture_set(*parts, [str(c) for c in range(CLASSES)])


class PlainLoop:
    """Training written by hand: loss and accuracy on the training pictures and on the validation pictures."""

    def __init__(self, net: nn.Module, data: PictureData, epochs: int) -> None:
        self.net, self.train, self.val = net, data.train_dataloader(), data.val_dataloader()
        self.optimizer = torch.optim.SGD(net.parameters(), **SGD)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, epochs * len(self.train))

    def epoch(self) -> list[float]:
        """[loss, accuracy] of training and of validation."""
        self.net.train()
        sums = torch.zeros(2)
        for images, labels in self.train:
            logits = self.net(images)
            loss = F.cross_entropy(logits, labels)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            sums += torch.stack([loss.detach() * len(labels), (logits.argmax(1) == labels).sum()])
        found = (sums / len(self.train.dataset)).tolist()
        self.net.eval()
        sums = torch.zeros(2)
        with torch.no_grad():
            for images, labels in self.val:
                logits = self.net(images)
                loss = F.cross_entropy(logits, labels)
                sums += torch.stack([loss * len(labels), (logits.argmax(1) == labels).sum()])
        return found + (sums / len(self.val.dataset)).tolist()


class SideBySide(Callback):
    """Run an epoch of the plain loop before every epoch of the Trainer; clock both.

    The Trainer's epoch lasts until the start of the next one, so that its work between epochs counts.
    """

    def __init__(self, plain: PlainLoop, compression: "TimedCompression") -> None:
        self.plain, self.compression = plain, compression
        self.epochs: list[dict[str, float]] = []
        self.start = 0.0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.stop()
        seconds, _ = timed(self.plain.epoch)
        self.epochs.append({"plain_s": seconds})
        self.start = time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.stop()

    def stop(self) -> None:
        if self.epochs:
            seconds = time.perf_counter() - self.start
            self.epochs[-1]["lightning_s"] = seconds - self.compression.taken_out()


class BarePasses:
    """Clocks evaluations and repairs, and bare passes of the same batches through copies of the networks."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.calls = 0

    def beside(self, name: str, work: Callable, training: bool, at: int) -> Callable:
        """`work(model, ...)` with a bare pass before or after it, in turns, because the second finds caches warm.

        at: index of the batches among the arguments behind the model
        """

        def both(model: nn.Module, *given: Any) -> Any:
            start = time.perf_counter()
            batches = list(given[at])
            given = (*given[:at], batches, *given[at + 1 :])
            inputs = [batch if isinstance(batch, Tensor) else batch[0] for batch in batches]
            twin = copy.deepcopy(model).train(training)  # a pass in training mode moves statistics
            self.calls += 1
            spent = {}
            if self.calls % 2:
                spent[f"bare_{name}_s"], _ = timed(lambda: forward(twin, inputs))
            spent[f"{name}_s"], result = timed(lambda: work(model, *given))
            if not self.calls % 2:
                spent[f"bare_{name}_s"], _ = timed(lambda: forward(twin, inputs))
            # All time but that of the work itself is the benchmark's own.
            spent["extra_s"] = time.perf_counter() - start - spent[f"{name}_s"]
            for key, seconds in spent.items():
                self.seconds[key] = self.seconds.get(key, 0.0) + seconds
            return result

        return both


@torch.no_grad()
def forward(model: nn.Module, batches: list[Tensor]) -> None:
    for inputs in batches:
        model(inputs)


class TimedCompression(CompressionCallback):
    """Clocks its measurements. ends: seconds of each measurement, without the bare passes, and of its parts."""

    def __init__(self, bare: BarePasses, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.bare, self.ends, self.spent = bare, [], 0.0

    def _run(self, *args: Any) -> None:
        self.bare.seconds.clear()
        seconds, _ = timed(lambda: super(TimedCompression, self)._run(*args))
        spent = dict(self.bare.seconds)
        self.ends.append({"whole_s": seconds - spent.pop("extra_s"), **spent})
        self.spent += seconds

    def taken_out(self) -> float:
        """Seconds of measurement, bare passes included, since the last call."""
        seconds, self.spent = self.spent, 0.0
        return seconds


def bare_s(end: dict[str, float]) -> float:
    return end["bare_evaluation_s"] + end["bare_repair_s"]


def report(result: dict[str, Any]) -> str:
    """Tables, and lines that sum them up, as Markdown."""
    config, epochs, ends = result["config"], result["epochs"], result["epoch_ends"]

    def median(key: str, of: list[dict[str, float]] = ends) -> float:
        return statistics.median(part[key] for part in of)

    rest = statistics.median(end["whole_s"] - end["evaluation_s"] - end["repair_s"] for end in ends)
    networks = len(config["methods"]) * len(config["ratios"])
    shares = [e["lightning_s"] / e["plain_s"] - 1 for e in epochs]
    whole = [end["whole_s"] / bare_s(end) for end in ends]
    return "\n".join(
        [
            "# Cost of Lightning and of the callback",
            f"ResNet18 of width {config['width']}, channels-last, on random 3x32x32 pictures in memory; seed "
            f"{result['seed']}; {described(result['machine'], 'lightning')}. Written by "
            "`python -m benchmarks.overhead`. Seconds are wall time.",
            "",
            f"**Training.** {config['train']:,} pictures in batches of {config['batch_size']} (crop, flip, SGD, a "
            f"schedule by step, loss and accuracy), then validation on {config['val']:,}; a CSV logger, no bar and no "
            "checkpoint. Epochs of a plain loop and of Lightning with the callback attached, its measurement taken "
            "out, by turns.",
            "",
            f"| {len(epochs)} epochs after the first | min s | median s |",
            "|---|---|---|",
            *(
                f"| {name} | {min(e[key] for e in epochs):.2f} | {median(key, epochs):.2f} |"
                for name, key in {"plain loop": "plain_s", "Lightning with the callback": "lightning_s"}.items()
            ),
            "",
            f"Lightning costs {result['overhead']:+.1%} over the plain loop (median of {len(epochs)} pairs of epochs, "
            f"{min(shares):+.1%} ... {max(shares):+.1%}); to stay under {OVERHEAD:+.0%}.",
            "",
            f"**Measurement.** {', '.join(config['methods'])} at {len(config['ratios'])} ratios "
            f"({min(config['ratios'])} ... {max(config['ratios'])}), {' and '.join(config['stages'])}: "
            f"{2 * networks + 1} evaluations on {config['measured']:,} pictures (batches of "
            f"{config['eval_batch_size']}) and {networks} repairs on {config['repair_size']:,}, beside bare passes of "
            "the same batches through copies of the same networks.",
            "",
            f"| epoch end, median of n = {len(ends)} | callback s | bare passes s |",
            "|---|---|---|",
            f"| evaluation | {median('evaluation_s'):.2f} | {median('bare_evaluation_s'):.2f} |",
            f"| repair | {median('repair_s'):.2f} | {median('bare_repair_s'):.2f} |",
            f"| all else: {networks} smaller networks, reports, batches, rows | {rest:.2f} | |",
            f"| whole | {median('whole_s'):.2f} | {statistics.median(map(bare_s, ends)):.2f} |",
            "",
            f"The epoch end takes {result['ratio']:.2f} times its bare passes (n = {len(ends)}, {min(whole):.2f} ... "
            f"{max(whole):.2f}); to stay under {RATIO}.",
        ]
    )


if __name__ == "__main__":
    main()
