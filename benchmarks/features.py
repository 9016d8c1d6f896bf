"""Which description of a channel folds best? The measurement behind the defaults of `compress`.

    python -m benchmarks.features --data cifar10.npz --resnet20 resnet20-12fca82f.th --run runs/cifar10_resnet18-...

Every combination of features, scale and norm folds the given networks at ratios .1 .3 .5 .7; accuracy is
measured on test pictures, raw and repaired. --resnet20: the CIFAR checkpoint of akamaster/pytorch_resnet_cifar10;
--run: the folder of a run of `scripts.train` on the same pictures. Writes a Markdown table.
"""

import argparse
import itertools
from pathlib import Path

import torch
import yaml
from torch import Tensor, nn

from pipeline.compression import channel_groups, compressions
from pipeline.compression.calibrate.repair import repair_
from pipeline.compression.choose.weights import FEATURES, SCALES
from pipeline.data.module import PictureData
from pipeline.evaluate import metrics_of
from pipeline.models import build_model
from pipeline.tasks import Classification

RATIOS = (0.1, 0.3, 0.5, 0.7)
# Normalisation with which akamaster's checkpoints were trained.
RESNET20_MEAN, RESNET20_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def combinations() -> dict[str, dict]:
    """{row label: method and options of `compressions`}"""
    rows = {
        f"{p}, score={score}": {"method": p, "score": score}
        for p, score in itertools.product(("l1", "l2"), ("first", "group"))
    }
    for features, scale, norm in itertools.product(FEATURES, SCALES, (False, True)):
        label = f"fold, {features}, scale={scale}, norm={norm}"
        rows[label] = {"method": "fold", "features": features, "scale": scale, "norm": norm}
    rows["fold, the defaults but norm_scale=False"] = {"method": "fold", "norm_scale": False}
    return rows


def networks(args: argparse.Namespace, data: PictureData) -> dict[str, nn.Module]:
    nets = {}
    if args.resnet20:
        net = build_model("resnet20", 10, 3)
        state = torch.load(args.resnet20, map_location="cpu", weights_only=True)["state_dict"]
        net.load_state_dict({name.removeprefix("module."): tensor for name, tensor in state.items()})
        nets["resnet20"] = nn.Sequential(Renormalise(data), net)
    for run in args.run:
        model = yaml.safe_load((run / "config.yaml").read_text())["model"]
        net = build_model(classes=data.num_classes, channels=data.channels, **model)
        state = torch.load(run / "last.ckpt", map_location="cpu", weights_only=True)["state_dict"]
        net.load_state_dict({n.removeprefix("net."): t for n, t in state.items() if n.startswith("net.")})
        nets[run.name] = net
    return {name: net.eval() for name, net in nets.items()}


class Renormalise(nn.Module):
    """Changes the data module's normalisation of pictures to that of the ResNet-20 checkpoint."""

    def __init__(self, data: PictureData) -> None:
        super().__init__()
        mean, std = (torch.tensor(v) for v in (data.test_data.mean, data.test_data.std))
        new_mean, new_std = torch.tensor(RESNET20_MEAN), torch.tensor(RESNET20_STD)
        self.register_buffer("gain", (std / new_std).view(1, 3, 1, 1))
        self.register_buffer("shift", ((mean - new_mean) / new_std).view(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain + self.shift


def accuracy(net: nn.Module, test: list) -> float:
    """Accuracy of the network, in %."""
    return 100 * metrics_of(net, Classification("multiclass"), test)["acc"]


def measure(net: nn.Module, test: list, calibration: list[Tensor], options: dict, groups) -> list[float]:
    """Accuracies in %: raw at every ratio, then repaired at every ratio."""
    raw, repaired = [], []
    for compressed in compressions(net, test[0][0][:1], ratios=RATIOS, groups=groups, **options):
        raw.append(accuracy(compressed.model, test))
        repair_(compressed.model, calibration)
        repaired.append(accuracy(compressed.model, test))
    return raw + repaired


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="CIFAR-10 in any form that data=cifar10 takes")
    parser.add_argument("--resnet20", type=Path)
    parser.add_argument("--run", type=Path, action="append", default=[])
    parser.add_argument("--n", type=int, default=2000, help="test pictures")
    parser.add_argument("--out", type=Path, default=Path("docs/features.md"))
    args = parser.parse_args()

    data = PictureData("cifar10", root=args.data, download=False)
    data.setup()
    test = list(data.eval_dataloader(data.test_data.subset(range(args.n))))
    drawn = torch.randperm(len(data.repair_data), generator=torch.Generator().manual_seed(0))[:1024]
    calibration = [inputs for inputs, _ in data.eval_dataloader(data.repair_data.subset(drawn))]
    of = f"Accuracy (%) on {args.n} CIFAR-10 test pictures, n = 1 network each"
    how = "`python -m benchmarks.features` (commands in its head)"
    lines = [f"# What describes a channel\n\n{how}. {of}, repaired to statistics of 1,024 pictures.\n"]
    for name, net in networks(args, data).items():
        groups = channel_groups(net, test[0][0][:1])
        heads = [f"{stage} {ratio:g}" for stage in ("raw", "rep.") for ratio in RATIOS]
        lines += [f"\n## {name}, dense {accuracy(net, test):.1f}\n"]
        lines += ["| | " + " | ".join(heads) + " | mean |", "|---|" + "---|" * (len(heads) + 1)]
        for label, options in combinations().items():
            values = measure(net, test, calibration, options, groups)
            cells = " | ".join(f"{v:.1f}" for v in [*values, sum(values) / len(values)])
            lines.append(f"| {label} | {cells} |")
            print(lines[-1], flush=True)
    args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
