"""Measures which networks the tracer understands: the groups it finds, whether they are right, and what it freezes.

    python -m benchmarks.coverage                  # every architecture, each in a process of its own
    python -m benchmarks.coverage --only swin      # those with this in their name; the other rows stay as they are

Writes benchmarks/results/coverage.json and, from it, docs/coverage.md. Weights are random, because the results depend
on the architecture alone; nothing is downloaded.
"""

import argparse
import json
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from benchmarks.common import described, machine, rounded, timed
from pipeline.compression import ChannelGroups, Projection, channel_groups, compress
from pipeline.compression.group import DEFAULT_PARTS, PARTS
from pipeline.compression.merge.modules import apply, named_tensors
from pipeline.compression.sizes.count import parameters
from pipeline.compression.trace.verify import duplicate_, randomise_
from pipeline.example import Example, call_arguments
from pipeline.models import build_model

SEED = 20  # differs from that of the tracer's own check
EXACT = 1e-4  # a relative error must stay below this
RATIO = 0.5
LIBRARIES = ("torchvision", "timm", "open_clip_torch", "transformers")
TIMEOUT = 900  # seconds for one architecture
# The width of heads and whole heads cannot be compressed at once, so there are two traces.
WITH_WIDTH, WITH_HEADS = (*DEFAULT_PARTS, "width"), (*DEFAULT_PARTS, "head")


# --- the networks


@dataclass(frozen=True)
class Architecture:
    """Builds a network with fresh weights, and its arguments."""

    build: Callable[[], nn.Module]
    example: Callable[[], Example]


def pictures(size: int, count: int = 1) -> Callable[[], Example]:
    return lambda: torch.randn(count, 3, size, size)


def words(*names: str) -> Callable[[], Example]:
    """Keyword arguments: sixteen tokens under each of these names."""
    return lambda: {name: torch.randint(1, 1000, (1, 16)) for name in names}


def ours(name: str, size: int, classes: int = 1000, **options: Any) -> Architecture:
    """A row of MODELS, with pictures of this size in pixels."""
    return Architecture(lambda: build_model(name, classes, 3, **options), pictures(size))


def torchvision(name: str, size: int) -> Architecture:
    return ours("torchvision", size, architecture=name)


def timm(name: str, size: int) -> Architecture:
    return ours("timm", size, architecture=name)


def segmentation(name: str) -> Architecture:
    def build() -> nn.Module:
        from torchvision.models import get_model

        return get_model(name, weights=None, weights_backbone=None)

    return Architecture(build, pictures(64, count=2))


def clip(name: str) -> Architecture:
    """Both towers."""

    def build() -> nn.Module:
        import open_clip

        return open_clip.create_model(name)

    return Architecture(build, lambda: (torch.randn(1, 3, 224, 224), torch.randint(1, 1000, (1, 77))))


def hugging_face(model: str, example: Callable[[], Example] = words("input_ids"), **sizes: Any) -> Architecture:  # noqa: B008
    """A class of transformers with its config's default sizes, unless `sizes` gives others."""

    def build() -> nn.Module:
        import transformers

        kind = getattr(transformers, model)
        return kind(kind.config_class(use_cache=False, **sizes))

    return Architecture(build, example)


def conv_norm_act(c: int, out: int, size: int = 1, stride: int = 1) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(c, out, size, stride, size // 2, bias=False), nn.BatchNorm2d(out), nn.SiLU(inplace=True)
    )


class SplitStage(nn.Module):
    """Half of the channels goes through residual blocks; the last layer reads the other half and all maps between."""

    def __init__(self, c: int, out: int, blocks: int = 1, residual: bool = True) -> None:
        super().__init__()
        half = out // 2
        self.first, self.last = conv_norm_act(c, out), conv_norm_act((2 + blocks) * half, out)
        self.blocks = nn.ModuleList(
            nn.Sequential(conv_norm_act(half, half, 3), conv_norm_act(half, half, 3)) for _ in range(blocks)
        )
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.first(x).chunk(2, 1))
        for block in self.blocks:
            y = block(parts[-1])
            parts.append(parts[-1] + y if self.residual else y)
        return self.last(torch.cat(parts, 1))


class Pyramid(nn.Module):
    """Concatenates a map and max pools of it, as spatial pyramid pooling does with three pools in a row."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.first, self.last = conv_norm_act(c, c // 2), conv_norm_act(2 * c, c)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.first(x)]
        for _ in range(3):
            parts.append(F.max_pool2d(parts[-1], 5, 1, 2))
        return self.last(torch.cat(parts, 1))


class Detector(nn.Module):
    """A detector like YOLOv8: the maps of a backbone go into a neck that upsamples and then downsamples again.

    (B, 3, H, W) -> three maps (B, boxes + classes, ·, ·) of strides 8, 16 and 32
    """

    def __init__(self, width: int = 16, classes: int = 80, boxes: int = 64) -> None:
        super().__init__()
        a, b, c, d = width, 2 * width, 4 * width, 8 * width
        self.to8 = nn.Sequential(
            conv_norm_act(3, a, 3, 2), conv_norm_act(a, b, 3, 2), SplitStage(b, b), conv_norm_act(b, c, 3, 2),
            SplitStage(c, c, 2),
        )  # fmt: skip
        self.to16 = nn.Sequential(conv_norm_act(c, d, 3, 2), SplitStage(d, d, 2))
        self.to32 = nn.Sequential(conv_norm_act(d, 2 * d, 3, 2), SplitStage(2 * d, 2 * d), Pyramid(2 * d))
        self.up16, self.up8 = SplitStage(3 * d, d, residual=False), SplitStage(d + c, c, residual=False)
        self.down16, self.down32 = conv_norm_act(c, c, 3, 2), conv_norm_act(d, d, 3, 2)
        self.out16, self.out32 = SplitStage(c + d, d, residual=False), SplitStage(3 * d, 2 * d, residual=False)
        self.heads = nn.ModuleList(
            nn.ModuleList(nn.Sequential(conv_norm_act(n, n, 3), nn.Conv2d(n, out, 1)) for out in (boxes, classes))
            for n in (c, d, 2 * d)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        at8 = self.to8(x)
        at16 = self.to16(at8)
        at32 = self.to32(at16)
        at16 = self.up16(torch.cat([F.interpolate(at32, scale_factor=2), at16], 1))
        at8 = self.up8(torch.cat([F.interpolate(at16, scale_factor=2), at8], 1))
        at16 = self.out16(torch.cat([self.down16(at8), at16], 1))
        at32 = self.out32(torch.cat([self.down32(at16), at32], 1))
        return [
            torch.cat([head(y) for head in heads], 1) for heads, y in zip(self.heads, (at8, at16, at32), strict=True)
        ]


def encoder(norm_first: bool) -> Architecture:
    """Two of torch's encoder layers between two linear layers."""

    def build() -> nn.Module:
        options = {"dim_feedforward": 1024, "batch_first": True, "norm_first": norm_first}
        layers = (nn.TransformerEncoderLayer(256, 8, **options) for _ in range(2))
        return nn.Sequential(nn.Linear(32, 256), *layers, nn.Linear(256, 10))

    return Architecture(build, lambda: torch.randn(2, 9, 32))


ARCHITECTURES: dict[str, Architecture] = {
    "resnet18": ours("resnet18", 32, classes=10),
    "preact_resnet18": ours("preact_resnet18", 32, classes=10),
    "resnet20": ours("resnet20", 32, classes=10),
    "simple_vit": ours("simple_vit", 32, classes=10),
    **{
        f"torchvision {name}": torchvision(name, size)
        for name, size in {
            "resnet18": 64,
            "resnet50": 64,
            "resnext50_32x4d": 64,
            "vgg11_bn": 64,
            "vgg16": 64,
            "densenet121": 64,
            "googlenet": 64,
            "inception_v3": 96,
            "squeezenet1_1": 64,
            "mobilenet_v2": 64,
            "mobilenet_v3_small": 64,
            "mobilenet_v3_large": 64,
            "mnasnet1_0": 64,
            "efficientnet_b0": 64,
            "shufflenet_v2_x1_0": 64,
            "regnet_x_400mf": 64,
            "regnet_y_400mf": 64,
            "convnext_tiny": 64,
            "swin_t": 224,
            "swin_v2_t": 256,
            "vit_b_32": 224,
            "maxvit_t": 224,
        }.items()
    },
    "torchvision deeplabv3_mobilenet_v3_large": segmentation("deeplabv3_mobilenet_v3_large"),
    "torchvision lraspp_mobilenet_v3_large": segmentation("lraspp_mobilenet_v3_large"),
    **{
        f"timm {name}": timm(name, size)
        for name, size in {
            "vit_base_patch32_224": 224,
            "deit_tiny_patch16_224": 224,
            "vit_small_patch16_rope_224": 224,
            "vit_relpos_small_patch16_224": 224,
            "vit_base_patch32_siglip_gap_256": 256,
            "eva02_tiny_patch14_224": 224,
            "cait_xxs24_224": 224,
            "xcit_nano_12_p16_224": 224,
            "swin_tiny_patch4_window7_224": 224,
            "pvt_v2_b0": 64,
            "levit_128s": 224,
            "efficientvit_b0": 64,
            "efficientvit_m0": 224,
            "coatnet_nano_rw_224": 224,
            "edgenext_xx_small": 64,
            "mixer_b16_224": 224,
            "resmlp_12_224": 224,
            "gmlp_ti16_224": 224,
            "poolformer_s12": 64,
            "convnext_atto": 64,
            "convnextv2_atto": 64,
            "resnetv2_50": 64,
            "cspdarknet53": 64,
            "hrnet_w18_small": 64,
            "ghostnet_100": 64,
            "repvit_m0_9": 64,
            "fastvit_t8": 64,
            "mobileone_s0": 64,
        }.items()
    },
    "open_clip ViT-B-32": ours("open_clip", 224, architecture="ViT-B-32-quickgelu"),
    "open_clip ViT-B-32, both towers": clip("ViT-B-32"),
    "Hugging Face GPT-2": hugging_face("GPT2LMHeadModel"),
    "Hugging Face LLaMA, tied (SmolLM2-135M)": hugging_face(
        "LlamaForCausalLM", hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3,
        num_hidden_layers=30, vocab_size=49152, tie_word_embeddings=True,
    ),
    "Hugging Face LLaMA (2 layers of TinyLlama-1.1B, 8,000 tokens)": hugging_face(
        "LlamaForCausalLM", hidden_size=2048, intermediate_size=5632, num_attention_heads=32, num_key_value_heads=4,
        num_hidden_layers=2, vocab_size=8000,
    ),
    "Hugging Face Qwen3 (2 layers of Qwen3-0.6B, 8,000 tokens)": hugging_face(
        "Qwen3ForCausalLM", hidden_size=1024, intermediate_size=3072, num_attention_heads=16, num_key_value_heads=8,
        head_dim=128, num_hidden_layers=2, vocab_size=8000,
    ),
    "Hugging Face BERT": hugging_face("BertForSequenceClassification"),
    "Hugging Face T5 (small)": hugging_face("T5ForConditionalGeneration", words("input_ids", "decoder_input_ids")),
    "Hugging Face ViT": hugging_face(
        "ViTForImageClassification", lambda: {"pixel_values": torch.randn(1, 3, 224, 224)}
    ),
    "torch TransformerEncoderLayer": encoder(norm_first=False),
    "torch TransformerEncoderLayer, norm first": encoder(norm_first=True),
    "YOLO-like detector": Architecture(Detector, pictures(64)),
}  # fmt: skip


# --- whether what the tracer finds is right


def fold_error(model: nn.Module, example: Example, groups: ChannelGroups, seed: int) -> float:
    """Relative output error of folding exact duplicates, in clusters of uneven size. The model is changed."""
    projections = drawn(groups, seed, uneven_labels)
    duplicate_(model, groups, projections)
    expected = outputs(model, example)
    return relative_error(expected, outputs(apply(model, groups, projections, share=True), example))


def prune_error(model: nn.Module, example: Example, groups: ChannelGroups, seed: int) -> tuple[float, float]:
    """(relative output error of pruning, relative change of the output by pruning). The model is changed.

    The error compares the smaller network with the whole one in which all reads of the dropped channels are zero.
    """
    projections = drawn(groups, seed, kept_labels)
    before = outputs(model, example)
    found = outputs(apply(model, groups, projections, share=True), example)
    tensors = named_tensors(model)
    with torch.no_grad():
        for group, projection in zip(groups, projections, strict=True):
            for read in group.reads:
                tensors[read.tensor].index_fill_(read.axis, read.index[projection.labels < 0].reshape(-1), 0)
    expected = outputs(model, example)
    return relative_error(expected, found), relative_error(before, expected)


def errors(
    model: nn.Module, example: Example, traces: Sequence[ChannelGroups], seed: int
) -> tuple[float, float, float]:
    """(largest fold error, largest prune error, smallest change by pruning) of several traces on random weights.

    The network runs in double precision where it can. The model is changed.
    """
    model, example = in_double_precision(model, example)
    found = []
    for groups in traces:
        folded = fold_error(randomised(model, seed), example, groups, seed)
        found.append((folded, *prune_error(randomised(model, seed), example, groups, seed)))
    folds, prunes, effects = zip(*found, strict=True)
    return max(folds), max(prunes), min(effects)


def randomised(model: nn.Module, seed: int) -> nn.Module:
    """The same model, with new random weights. The model is changed."""
    randomise_(model, torch.Generator().manual_seed(seed))
    return model


def drawn(groups: ChannelGroups, seed: int, draw: Callable[[int, int, torch.Generator], Tensor]) -> list[Projection]:
    """One projection for each group, of `draw(size, channels left, generator)`; tied groups keep equally many."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[int, Projection] = {}
    for tie in groups.ties:
        size = groups[tie[0]].size
        left = int(torch.randint(1, size, (), generator=generator))
        found |= {i: Projection(draw(size, left, generator)) for i in tie}
    return [found[i] for i in range(len(groups))]


def uneven_labels(size: int, clusters: int, generator: torch.Generator) -> Tensor:
    """(size,) int64 labels in random order: one cluster has most channels, the others have one or two."""
    labels = torch.arange(size).clamp(max=clusters - 1)
    if clusters > 2 and size > clusters:
        labels[-1] = 0
    return labels[torch.randperm(size, generator=generator)]


def kept_labels(size: int, kept: int, generator: torch.Generator) -> Tensor:
    """(size,) int64 labels that keep `kept` channels; the others are -1."""
    stays = torch.randperm(size, generator=generator) < kept
    return torch.where(stays, stays.cumsum(0) - 1, -1)


def outputs(model: nn.Module, example: Example) -> list[Tensor]:
    args, kwargs = call_arguments(example)
    with torch.no_grad():
        return [v for v in tree_leaves(model(*args, **kwargs)) if isinstance(v, Tensor) and v.is_floating_point()]


def relative_error(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """The largest ‖e - f‖ / ‖e‖ of several outputs."""
    return max(float((e - f).norm() / e.norm()) for e, f in zip(expected, found, strict=True))


def in_double_precision(model: nn.Module, example: Example) -> tuple[nn.Module, Example]:
    """Both in float64, or in float32 where the network itself casts to it. The model is changed."""

    def to(value: Any, dtype: torch.dtype) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    try:
        double = tree_map(lambda v: to(v, torch.float64), example)
        outputs(model.double(), double)
        return model, double
    except RuntimeError:
        return model.float(), example


# --- one architecture


@dataclass
class Row:
    """The results for one architecture.

    groups: {part: [groups, channels]}; reachable: fraction of the parameters that goes when every group keeps one
    channel, for the default parts and with attention, by width or by heads; frozen: {reason: channels}
    fold_error, prune_error: relative, the larger one of a trace with widths and of one with heads
    effect: relative change of the output by pruning
    peak: memory while the network was built, traced and folded, divided by that of its parameters
    """

    architecture: str
    parameters: int = 0
    groups: dict[str, list[int]] = field(default_factory=dict)
    reachable: dict[str, float] = field(default_factory=dict)
    frozen: dict[str, int] = field(default_factory=dict)
    fold_error: float = 0.0
    prune_error: float = 0.0
    effect: float = 1.0
    trace_s: float = 0.0
    fold_s: float = 0.0
    peak: float = 0.0
    failure: str = ""


def measured(name: str) -> Row:
    """The row of one architecture, in a process that has done nothing else."""
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    compress(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.zeros(1, 4))  # imports tracing's libraries
    architecture, row = ARCHITECTURES[name], Row(name)
    model, example = architecture.build().eval(), architecture.example()
    row.parameters = parameters(model)
    before = resident()
    row.trace_s, groups = timed(lambda: channel_groups(model, example, WITH_WIDTH))
    for frozen in groups.frozen:
        reason = DETAIL.sub("", frozen.reason)
        row.frozen[reason] = row.frozen.get(reason, 0) + frozen.size
    if not len(groups):
        return row
    row.fold_s, _ = timed(lambda: compress(model, example, "fold", RATIO, groups=groups))
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    row.peak = 1 + (most - before) / sum(p.numel() * p.element_size() for p in model.parameters())
    with_heads = channel_groups(model, example, WITH_HEADS)
    row.reachable = {
        "default": reachable(model, only(groups, DEFAULT_PARTS)),
        "attention": max(reachable(model, g) for g in (groups, with_heads)),
    }
    for part in PARTS:
        chosen = only(with_heads if part == "head" else groups, [part])
        row.groups[part] = [len(chosen), sum(g.size for g in chosen)]
    row.fold_error, row.prune_error, row.effect = errors(model, example, [groups, with_heads], SEED)
    return row


def only(groups: ChannelGroups, parts: Sequence[str]) -> ChannelGroups:
    return ChannelGroups(tuple(g for g in groups if g.part in parts))


def reachable(model: nn.Module, groups: ChannelGroups) -> float:
    """Fraction of the parameters that goes when every group keeps one channel."""
    smallest = apply(model, groups, [Projection(torch.zeros(g.size)) for g in groups], share=True)
    return 1 - parameters(smallest) / parameters(model)


def resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


# --- all of them


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="part of the names of the architectures to measure")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time, of one thread each")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # measure here and print the row
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/coverage.json"))
    parser.add_argument("--doc", type=Path, default=Path("docs/coverage.md"))
    args = parser.parse_args()
    if args.one:
        print(json.dumps(asdict(measured(args.one))))
        return
    names = [name for name in ARCHITECTURES if args.only.lower() in name.lower()]
    if not names:
        parser.error(f"no architecture has {args.only!r} in its name; there are: {', '.join(ARCHITECTURES)}")
    torch.set_num_threads(1)
    known = json.loads(args.out.read_text())["rows"] if args.only and args.out.exists() else []
    rows = {row["architecture"]: Row(**row) for row in known if row["architecture"] in ARCHITECTURES}
    with ThreadPoolExecutor(args.jobs) as pool:
        for row in pool.map(in_own_process, names):
            rows[row.architecture] = row
            print(line(row), flush=True)
            keep([rows[name] for name in ARCHITECTURES if name in rows], args)
    wrong = [row.architecture for row in rows.values() if row.failure]
    if wrong:
        sys.exit(f"failed: {', '.join(wrong)}")


def keep(rows: Sequence[Row], args: argparse.Namespace) -> None:
    """Write the results so far."""
    result = rounded(
        {
            "ratio": RATIO,
            "seed": SEED,
            "jobs": args.jobs,
            "machine": machine(*LIBRARIES),
            "rows": [asdict(row) for row in rows],
        }
    )
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    args.doc.write_text(document(result))


def in_own_process(name: str) -> Row:
    """The row, measured in its own process: memory is that of one architecture, and a failure costs one row."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.coverage", "--one", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return Row(name, failure=f"not done after {TIMEOUT} s")
    said = done.stdout.splitlines() if done.returncode == 0 else done.stderr.splitlines()
    if done.returncode:
        return Row(name, failure=said[-1] if said else f"ended with {done.returncode}")
    row = Row(**json.loads(said[-1]))
    if not row.failure and row.groups:
        row.failure = wrong_with(row)
    return row


def wrong_with(row: Row) -> str:
    """Why the row is not to be trusted; "" where it is."""
    if max(row.fold_error, row.prune_error) >= EXACT:
        return f"folding duplicates changes the output by {row.fold_error:.1e}, pruning by {row.prune_error:.1e}"
    if row.effect < EXACT:
        return f"pruning changes the output by {row.effect:.1e} only, so that the checks prove nothing"
    return ""


def line(row: Row) -> str:
    found = ", ".join(f"{n} {part}" for part, (n, _) in row.groups.items() if n) or "no groups"
    return f"{row.architecture}: {row.failure or found}; {row.trace_s:.1f} s"


COLUMNS: dict[str, Callable[[Row], str]] = {
    "architecture": lambda r: r.architecture,
    "parameters": lambda r: f"{r.parameters / 1e6:.1f}M",
    **{part: lambda r, p=part: str(r.groups.get(p, [0])[0] or "") for part in PARTS},
    "reachable": lambda r: f"{r.reachable.get('default', 0):.0%}",
    "with attention": lambda r: f"{r.reachable.get('attention', 0):.0%}",
    "fold error": lambda r: f"{r.fold_error:.0e}" if r.groups else "",
    "prune error": lambda r: f"{r.prune_error:.0e}" if r.groups else "",
    "trace s": lambda r: f"{r.trace_s:.1f}",
    "fold s": lambda r: f"{r.fold_s:.1f}" if r.groups else "",
    "memory": lambda r: f"{r.peak:.1f}" if r.groups else "",
    "frozen": lambda r: r.failure or "<br>".join(f"{n:,}: {reason}" for reason, n in inner(r.frozen).items()),
}

DETAIL = re.compile(r" \(.*\)")  # shapes that do not fit, which differ from layer to layer
# Reasons that every network has, or that name parts nobody asked for: none of them is a limit of the tracer.
OTHERS = re.compile("leaves the network as its output|.* not among the parts to compress")


def inner(frozen: Mapping[str, int]) -> dict[str, int]:
    """{reason: channels} that froze inside the network, most channels first."""
    return {r: n for r, n in sorted(frozen.items(), key=lambda item: -item[1]) if not OTHERS.fullmatch(r)}


def listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"


def document(result: Mapping[str, Any]) -> str:
    """The text of docs/coverage.md."""
    rows = [Row(**row) for row in result["rows"]]
    table = [
        f"| {' | '.join(COLUMNS)} |",
        f"|{'---|' * len(COLUMNS)}",
        *(f"| {' | '.join(cell(row) for cell in COLUMNS.values())} |" for row in rows),
    ]
    where = described(result["machine"], *LIBRARIES)
    folds, prunes = max(row.fold_error for row in rows), max(row.prune_error for row in rows)
    whole = [row.architecture for row in rows if not row.groups and not row.failure]
    failed = [row.architecture for row in rows if row.failure]
    return f"""# Coverage of the tracer

Written by `python -m benchmarks.coverage`: {len(rows)} architectures at full size (where a name says less, less) with
random weights, seed {result["seed"]}, n = 1; {result["jobs"]} processes at a time. {where}.

The largest fold error is {folds:.0e}, the largest prune error {prunes:.0e}; both are to
stay under {EXACT:.0e}. Nothing can go of: {listed(whole)}.
Failed: {listed(failed)}.

- **hidden, residual, width, head**: coupled groups found of each part. `hidden` and `residual` are compressed by
  default, the `width` of attention heads (one group for the queries and keys and one for the values of every head) and
  whole `head`s when asked for, not both at once.
- **reachable**: share of the parameters that goes when every group keeps one channel; **with attention**: when each
  head keeps a width of one as well, or each layer one head.
- **fold error**: relative error of the output after exact duplicates, in clusters of uneven size that differ from group
  to group, were folded. **prune error**: the same between the network without the dropped channels and the whole
  network in which everything that reads them is zero. Both on random weights, in double precision where the network
  runs in it, all groups at once, the larger one of a trace with widths and of one with heads. Exactly 0 where norms
  round to single precision by themselves.
- **trace s**: `channel_groups` with widths; **fold s**: `compress` at ratio {result["ratio"]:g} after it, wall seconds.
- **memory**: the most that building, tracing and folding took, over the parameters' bytes. In small networks most of it
  is torch.export's own.
- **frozen**: how many channels stay and why, without those of the network's output. The 3 of most rows are the
  network's input.

{chr(10).join(table)}
"""


if __name__ == "__main__":
    main()
