"""Measures what compression leaves of trained language models, with data and without, beside other methods.

    python -m benchmarks.language smollm2 --network SmolLM2-135M-Instruct.Q4_1.gguf --c4 c4.parquet --wikitext wiki.txt
    python -m benchmarks.language stories --network stories260K/hf --c4 tinystories.txt

    python -m benchmarks.language page      # docs/language.md and its picture, from the rows that are there

Rows go to benchmarks/results/language_<network>.json as they are made; what is there is not made again. Every number is
a perplexity on texts that chose nothing: the first 400 documents of C4 calibrate, the next 200 chose the defaults, and
those from 600 on are reported, as are all of WikiText-2's. Only feed-forward channels go. Evaluation runs in bfloat16,
which changes the dense perplexity by less than a thousandth.
"""

import argparse
import json
import re
import struct
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import torch
from torch import Tensor, nn

from benchmarks.common import machine, rounded, timed, write_below
from pipeline.compression import METHODS, Plan, Projection, Recipe, channel_groups, parse
from pipeline.compression.calibrate import compensate
from pipeline.compression.calibrate.batches import batches_of
from pipeline.compression.calibrate.compensate import Moments, Target, moments_of, readers, statistics_of
from pipeline.compression.calibrate.lockstep import Stop, forward, watched
from pipeline.compression.calibrate.texts import written_texts
from pipeline.compression.choose.weights import GroupWeights
from pipeline.compression.compress import Network, channels_left, compensated_, compressions
from pipeline.compression.copies import bare_copy
from pipeline.compression.group import ChannelGroups
from pipeline.compression.merge.modules import apply
from pipeline.compression.recipe import Calibration
from pipeline.data.text.tokenizers import load_tokenizer
from pipeline.evaluate import evaluate
from pipeline.models import build_model
from pipeline.stages import State, Supplies, parse_tail
from pipeline.tasks import Language

RESULTS = Path(__file__).parent / "results"
TASK = Language()
PAGE, MARK = Path("docs/language.md"), "<!-- written by benchmarks.language -->"
SEES = re.compile(r"data|self|unigram|wanda-sp|flap|grail")  # plans that look at texts
DRAWN = ("fold", "l2", "wanda-sp", "flap", "grail", "fold+data+params", "obs+data+params", "obs+self+params")
CALIBRATE, CHOOSE = 400, 200  # documents
# Network: tokens of a window, windows to calibrate on, ratios.
SETTINGS = {
    "smollm2": (512, 64, (0.1, 0.2, 0.3, 0.5)),
    "stories": (256, 64, (0.1, 0.2, 0.3, 0.5)),
    "trained": (128, 128, (0.1, 0.2, 0.3, 0.5)),
}
# Rows that are made for a network. Methods of other papers are named after them.
PLANS = (
    "fold", "l1", "l2", "wanda", "random",
    "wanda-sp", "flap", "grail",
    "obs+data+params", "obs+self+params", "fold+data+params", "fold+self+params", "obs+unigram+params",
    "obs+data", "obs+self", "fold+data", "mix+data+target=mend", "wanda+data",
)  # fmt: skip


def windows(documents: Sequence[str], encode: Callable[[str], list[int]], end: Sequence[int], size: int) -> Tensor:
    """(N, size) int64: the documents one after the other, each followed by `end`, in windows that do not overlap."""
    ids = [i for document in documents for i in (*encode(document), *end)]
    return torch.tensor(ids[: len(ids) // size * size]).view(-1, size)


@torch.no_grad()
def perplexity(net: nn.Module, texts: Tensor) -> float:
    with torch.autocast("cpu", torch.bfloat16):
        return TASK.values(evaluate(net.eval(), TASK, texts.split(8)))["perplexity"]


def by_wanda(net: Network, ratio: float) -> list[Projection]:
    """Wanda's choice of whole channels, of each group alike."""
    sizes = [channels_left(group.size, ratio) for group in net.groups]
    weights = [GroupWeights(group, net.tensors, moments=lambda: net.moments) for group in net.groups]
    return [METHODS["wanda"](of_group, [k])[k] for of_group, k in zip(weights, sizes, strict=True)]


def wanda_sp(net: Network, ratio: float) -> nn.Module:
    """Wanda's score for whole channels, as the baseline of FLAP's paper: nothing is solved."""
    return apply(net.model, net.groups, by_wanda(net, ratio))


def flap(net: Network, ratio: float) -> nn.Module:
    """FLAP (arXiv:2312.11983): fluctuation of a channel times its readers' norm, standardised over each layer, one
    threshold for all layers, and the means of what is dropped as a bias of the reader."""
    means, variances = channel_statistics(net)
    scores = []
    for group in net.groups:
        name = group.reads[0].tensor
        weight = net.tensors[name].movedim(group.reads[0].axis, 0).flatten(1)
        score = variances[name] * weight.square().sum(1)
        scores.append((score - score.mean()) / score.std())
    every = torch.cat(scores).sort().values
    threshold = every[int(ratio * len(every))]
    plans = []
    for score in scores:
        kept = score >= threshold
        kept[score.argmax()] = True
        plans.append(Projection(torch.where(kept, kept.cumsum(0) - 1, -1)))
    smaller = apply(net.model, net.groups, plans)
    for group, plan in zip(net.groups, plans, strict=True):
        name = group.reads[0].tensor
        layer = smaller.get_submodule(name.rpartition(".")[0])
        gone = plan.labels < 0
        bias = net.tensors[name].movedim(group.reads[0].axis, 0)[gone].T @ means[name][gone]
        layer.bias = nn.Parameter(bias if layer.bias is None else layer.bias + bias)
    return smaller


@torch.no_grad()
def channel_statistics(net: Network) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Means and variances of the inputs of all readers, {weight: (C,)}."""
    moments: dict[str, list[Moments]] = defaultdict(list)

    def keep(stop: Stop) -> None:
        moments[stop.name].append(moments_of(stop.x.flatten(0, -2)))

    with watched(readers(net.model, net.groups), keep):
        for batch in net.pictures or ():
            forward(net.model, batch)
    found = {name: statistics_of(batches) for name, batches in moments.items()}
    return {name: mean for name, (_, mean) in found.items()}, {name: var for name, (var, _) in found.items()}


def grail(net: Network, ratio: float) -> nn.Module:
    """GRAIL's code for language models (arXiv:2602.23795): wanda's choice, blocks one after the other on what reaches
    them, and a ridge of 1e-3 of the mean second moment."""
    usual = compensate.TARGETS["same"]
    compensate.TARGETS["same"] = Target(1e-3)
    try:
        plans = by_wanda(net, ratio)
        smaller = apply(net.model, net.groups, plans)
        compensated_(net, smaller, Plan(net.groups, plans))
        return smaller
    finally:
        compensate.TARGETS["same"] = usual


OTHERS = {"wanda-sp": wanda_sp, "flap": flap, "grail": grail}


def made(
    plan: str, dense: nn.Module, groups: ChannelGroups, texts: dict[str, Tensor], ratios: Sequence[float]
) -> Iterator[tuple[float, nn.Module]]:
    """(ratio, smaller network) of a plan."""
    data, example = list(texts["data"].split(8)), texts["data"][:1]
    if plan in OTHERS:
        net = Network(bare_copy(dense, share=True), example, groups, batches_of(data), TASK.answers, target="same")
        yield from ((ratio, OTHERS[plan](net, ratio)) for ratio in ratios)
        return
    spelling, _, tail = plan.partition(" > ")
    recipe: Recipe = parse(spelling)
    given = {"data": data, "self": list(texts["self"].split(8)) if "self" in texts else None}
    pictures = given.get(recipe.calibration.pictures)
    made_of = compressions(dense, example, recipe, ratios, pictures=pictures, groups=groups, answers=TASK.answers)
    supplies = Supplies(dense, example, TASK, data)
    supplies.made[Calibration("self")] = texts["self"]
    for smaller in made_of:
        state = State(smaller.model, smaller.report, dense)
        for stage in parse_tail(tail) if tail else ():
            state = stage.run(state, supplies)
        yield smaller.report.ratio, state.model


def load(name: str, path: Path, vocabulary: int, context: int) -> nn.Module:
    if name == "trained":
        return build_trained(path).eval()
    options = {"vocabulary": vocabulary, "context": context}
    return build_model("language_model", architecture=str(path), **options).eval()


def build_trained(checkpoint: Path) -> nn.Module:
    """The network of a run of scripts.train, from the config beside its checkpoint."""
    from omegaconf import OmegaConf

    from scripts.build_data import build_data
    from scripts.build_network import build_net

    config = OmegaConf.to_container(OmegaConf.load(checkpoint.parent / "config.yaml"))
    config = {**config, "checkpoint": str(checkpoint)}
    return build_net(config, build_data(config))


def stories_tokenizer(path: Path) -> Any:
    """The tokenizer of stories260K, from llama2.c's file of pieces: merges are their splits, best score first."""
    from tokenizers import Tokenizer, models, normalizers

    raw, at, pieces = path.read_bytes(), 4, []
    while at < len(raw):
        score, length = struct.unpack_from("<fi", raw, at)
        pieces.append((raw[at + 8 : at + 8 + length].decode(), score))
        at += 8 + length
    names = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *(piece for piece, _ in pieces[259:])]
    ids: dict[str, int] = {}
    for i, name in enumerate(names):
        ids.setdefault(name, i)
    merges = [
        (piece[:k], piece[k:])
        for piece, _ in sorted(pieces[259:], key=lambda of: -of[1])
        for k in range(1, len(piece))
        if piece[:k] in ids and piece[k:] in ids
    ]
    found = Tokenizer(models.BPE(vocab=ids, merges=merges, byte_fallback=True, unk_token="<unk>"))
    found.normalizer = normalizers.Prepend(" ")
    return found


def encoder(name: str, path: Path) -> tuple[Callable[[str], list[int]], list[int], int]:
    """(text -> ids, ids behind each document, vocabulary)"""
    if name == "stories":
        tokenizer = stories_tokenizer(path.parent / "tok512.bin")
        return lambda text: [1, *tokenizer.encode(text).ids], [], 512
    found = load_tokenizer(str(path))
    return lambda text: found.encode([text])[0][0].tolist(), [found.end] * (found.end is not None), found.vocabulary


def documents_of(path: Path) -> list[str]:
    if path.suffix == ".parquet":
        return pl.read_parquet(path)["text"].to_list()
    text = path.read_text()
    if "Once upon a time" in text[:10_000]:  # TinyStories: paragraphs of a story are lines to the network
        stories = re.split(r"\n\n(?=Once upon a time|Once there|Once,)", text)
        return [story.strip().replace("\n\n", "\n") for story in stories if story.isascii()]
    return [text]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=[*SETTINGS, "page"])
    parser.add_argument("--network", type=Path)
    parser.add_argument("--c4", type=Path, help="documents to calibrate on and to report")
    parser.add_argument("--wikitext", type=Path, help="a second text to report")
    parser.add_argument("--own", type=Path, help="a file of ids that the network wrote; it is made where it is missing")
    parser.add_argument("--plans", nargs="*", default=PLANS)
    parser.add_argument("--ratios", nargs="*", type=float)
    parser.add_argument("--windows", type=int, help="to calibrate on")
    parser.add_argument("--tokens", type=int, default=100_000, help="to report on, of each text")
    parser.add_argument("--tokenizer", type=Path, help="where it does not lie with the network")
    parser.add_argument("--label", help="name of the network in the rows")
    given = parser.parse_args()
    page() if given.name == "page" else run(given)


def run(given: argparse.Namespace) -> None:
    size, count, ratios = SETTINGS[given.name]
    count, ratios = given.windows or count, given.ratios or ratios
    encode, end, vocabulary = encoder(given.name, given.tokenizer or given.network)
    net = load(given.name, given.network, vocabulary, size)
    documents = documents_of(given.c4)
    if given.name == "stories":  # the first half is reported
        documents.reverse()
    cut = [CALIBRATE, CALIBRATE + CHOOSE] if len(documents) > 1000 else [len(documents) * 3 // 8, len(documents) // 2]
    calibrate, _, reported = documents[: cut[0]], documents[cut[0] : cut[1]], documents[cut[1] :]
    tests = {"c4" if given.name != "stories" else "stories": windows(reported, encode, end, size)}
    if given.wikitext:
        tests["wikitext"] = windows(documents_of(given.wikitext), encode, end, size)
    tests = {name: text[: -(-given.tokens // size)] for name, text in tests.items()}
    texts = {"data": windows(calibrate, encode, end, size)[:count]}
    if given.own and given.own.is_file():
        texts["self"] = torch.load(given.own)[:count, :size]
    else:
        seconds, texts["self"] = timed(lambda: written_texts(net, texts["data"][:1], count, answers=TASK.answers))
        print(f"wrote {count} texts of {size} tokens in {seconds:.0f} s", flush=True)
        if given.own:
            torch.save(texts["self"], given.own)
    groups = channel_groups(net, texts["data"][:1], ["hidden"])
    label = given.label or given.name
    results = RESULTS / f"language_{label}.json"
    rows = json.loads(results.read_text()) if results.is_file() else []

    def done(plan: str, ratio: float) -> bool:
        key = (label, plan, ratio, count)
        return any((r["network"], r["plan"], r["ratio"], r["windows"]) == key for r in rows)

    def add(plan: str, ratio: float, smaller: nn.Module, seconds: float) -> None:
        found = {name: perplexity(smaller, text) for name, text in tests.items()}
        size_of = {"params": sum(p.numel() for p in smaller.parameters()), "seconds": seconds}
        told = {"tokens": {name: text.numel() for name, text in tests.items()}, "machine": machine("transformers")}
        row = {"network": label, "plan": plan, "ratio": ratio, "windows": count, "window": size}
        rows.append(rounded({**row, "perplexity": found, **size_of, **told}))
        results.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
        print(f"{label} {plan} {ratio:g}: {found} {seconds:.0f} s", flush=True)

    if not done("dense", 0.0):
        add("dense", 0.0, net, 0.0)
    for plan in given.plans:
        left = [ratio for ratio in ratios if not done(plan, ratio)]
        start = time.perf_counter()
        for ratio, smaller in made(plan, net, groups, texts, left) if left else ():
            add(plan, ratio, smaller, time.perf_counter() - start)
            start = time.perf_counter()


def page() -> None:
    """Tables and the picture of docs/language.md."""
    lines = []
    for path in sorted(RESULTS.glob("language_*.json")):
        rows = json.loads(path.read_text())
        for text in rows[0]["perplexity"]:
            lines += [*table(rows, text), ""]
    write_below(PAGE, MARK, "Language models", lines)
    picture()


def table(rows: Sequence[dict[str, Any]], text: str) -> list[str]:
    """One network on one text, a line for each plan and number of windows."""
    dense = next(row for row in rows if row["plan"] == "dense")
    ratios = sorted({row["ratio"] for row in rows} - {0.0})
    found = {(row["plan"], row["windows"], row["ratio"]): row["perplexity"].get(text) for row in rows}
    plans = list(dict.fromkeys((row["plan"], row["windows"]) for row in rows if row["plan"] != "dense"))

    def told(value: float | None) -> str:
        return "" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.2f}"

    return [
        f"### {dense['network']} on {text}: dense {dense['perplexity'][text]:.2f}, {dense['tokens'][text]:,} tokens",
        "",
        "| method | texts | " + " | ".join(f"{ratio:.0%} gone" for ratio in ratios) + " |",
        "|---|---|" + "---|" * len(ratios),
        *(
            f"| {plan} | {windows if SEES.search(plan) else ''} | "
            + " | ".join(told(found.get((plan, windows, ratio))) for ratio in ratios)
            + " |"
            for plan, windows in plans
        ),
    ]


def picture() -> None:
    """Perplexity over the ratio, one panel for each network, on a log axis."""
    import matplotlib.pyplot as plt

    paths = sorted(RESULTS.glob("language_*.json"))
    figure, axes = plt.subplots(1, len(paths), figsize=(5 * len(paths), 4.2), squeeze=False, layout="constrained")
    for axis, path in zip(axes[0], paths, strict=True):
        rows = json.loads(path.read_text())
        text = next(iter(rows[0]["perplexity"]))
        dense = rows[0]["perplexity"][text]
        usual = next(row["windows"] for row in rows if row["plan"] != "dense")
        for plan in DRAWN:
            points = [(r["ratio"], r["perplexity"][text]) for r in rows if r["plan"] == plan and r["windows"] == usual]
            if points:
                axis.plot(*zip((0.0, dense), *sorted(points), strict=True), marker="o", markersize=3, label=plan)
        axis.set(yscale="log", xlabel="feed-forward channels removed", title=f"{rows[0]['network']}, {text}")
        axis.set_ylim(top=dense * 25)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    axes[0][0].set_ylabel("perplexity")
    figure.savefig(PAGE.with_suffix(".png"), dpi=130)


if __name__ == "__main__":
    main()
