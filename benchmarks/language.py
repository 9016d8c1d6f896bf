"""Measures what compression leaves of trained language models, with data and without, beside other methods.

    python -m benchmarks.language smollm2 --network SmolLM2-135M-Instruct.Q4_1.gguf --c4 c4.parquet --wikitext wiki.txt
    python -m benchmarks.language stories --network stories260K/hf --c4 tinystories.txt

    python -m scripts.train sweep=llama_small data.root=... paths.runs=runs/small    # its head says which texts
    python -m benchmarks.language small --runs runs/small

    python -m benchmarks.language page      # docs/language.md and its picture, from the rows that are there

Rows go to benchmarks/results/language_<network>.json as they are made; what is there is not made again. A network is
measured on every text that is given before the next one is made, and a row that lacks one of them is made anew. Every
number is a perplexity on texts that chose nothing: the first 400 documents of C4 calibrate, the next 200 chose the
defaults, and those from 600 on are reported, as are all of WikiText-2's. Only feed-forward channels go. Evaluation runs
in bfloat16 where the CPU has it, which changes the dense perplexity by less than a thousandth.

`--draws 3` calibrates three times, each on other windows, of data as of what the network wrote. Plans that look at no
texts are measured once.
"""

import argparse
import json
import re
import struct
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import torch
from torch import Tensor, nn

from benchmarks.common import machine, rounded, timed
from benchmarks.language_page import RESULTS, SEES, Row, page
from benchmarks.trained import recipe_of
from pipeline.cells import cells, flat, read_record
from pipeline.compression import METHODS, Plan, Projection, Recipe, channel_groups, parse
from pipeline.compression.budget import channels_left
from pipeline.compression.calibrate import compensate
from pipeline.compression.calibrate.batches import batches_of
from pipeline.compression.calibrate.compensate import Moments, Target, moments_of, readers, statistics_of
from pipeline.compression.calibrate.lockstep import Stop, forward, watched
from pipeline.compression.calibrate.texts import written_texts
from pipeline.compression.choose.weights import GroupWeights
from pipeline.compression.compress import compressions
from pipeline.compression.copies import bare_copy
from pipeline.compression.group import ChannelGroups
from pipeline.compression.merge.modules import apply
from pipeline.compression.network import Network, compensated_
from pipeline.compression.recipe import Calibration
from pipeline.cpu import has_bfloat16
from pipeline.data.text.tokenizers import load_tokenizer
from pipeline.evaluate import evaluate
from pipeline.models import build_model
from pipeline.stages import State, Supplies, parse_tail
from pipeline.stages.stage import CALIBRATION
from pipeline.tables import UserError
from pipeline.tasks import Language

TASK = Language()
CALIBRATE, CHOOSE = 400, 200  # documents
# Network: tokens of a window, windows to calibrate on, ratios.
SETTINGS = {
    "smollm2": (512, 64, (0.1, 0.2, 0.3, 0.5)),
    "stories": (256, 64, (0.1, 0.2, 0.3, 0.5)),
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
    with torch.autocast("cpu", torch.bfloat16, enabled=has_bfloat16()):
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
    plan: str, dense: nn.Module, groups: ChannelGroups, texts: Mapping[str, Tensor], ratios: Sequence[float], seed: int
) -> Iterator[tuple[float, nn.Module]]:
    """(ratio, smaller network) of a plan.

    texts: (N, T) windows of each text that it looks at, see `looks_at`; seed: of what is drawn beside them.
    """
    example = next(iter(texts.values()))[:1]
    given = {name: list(text.split(8)) for name, text in texts.items()}
    data = given.get("data", [])
    if plan in OTHERS:
        net = Network(bare_copy(dense, share=True), example, groups, batches_of(data), TASK.answers, target="same")
        yield from ((ratio, OTHERS[plan](net, ratio)) for ratio in ratios)
        return
    spelling, _, tail = plan.partition(" > ")
    recipe: Recipe = parse(spelling)
    pictures = given.get(recipe.calibration.pictures)
    shared: dict[str, Any] = {"groups": groups, "answers": TASK.answers, "seed": seed}
    made_of = compressions(dense, example, recipe, ratios, pictures=pictures, **shared)
    supplies = Supplies(dense, example, TASK, data, seed)
    if "self" in texts:
        supplies.made[Calibration("self")] = texts["self"]
    for smaller in made_of:
        state = State(smaller.model, smaller.report, dense)
        for stage in parse_tail(tail) if tail else ():
            state = stage.run(state, supplies)
        yield smaller.report.ratio, state.model


def looks_at(plan: str) -> list[str]:
    """The texts, "data" or "self", that a plan calibrates and trains on; at least one, for the example of a network."""
    spelling, _, tail = plan.partition(" > ")
    stages = parse_tail(tail) if tail else ()
    named = {"data"} if plan in OTHERS else {parse(spelling).calibration.pictures} & {"data", "self"}
    named |= {"data" for stage in stages if stage.needs}
    named |= {"self" for stage in stages if getattr(stage, "on", None) == "self"}
    return sorted(named) or ["data"]


def load(path: Path, vocabulary: int, context: int) -> nn.Module:
    options = {"vocabulary": vocabulary, "context": context}
    return build_model("language_model", architecture=str(path), **options).eval()


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
    parser.add_argument("name", choices=[*SETTINGS, "small", "page"])
    parser.add_argument("--network", type=Path)
    parser.add_argument("--c4", type=Path, help="documents to calibrate on and to report")
    parser.add_argument("--wikitext", type=Path, help="a second text to report")
    parser.add_argument("--own", type=Path, help="a file of ids that the network wrote; it is made where it is missing")
    parser.add_argument("--plans", nargs="*", default=PLANS)
    parser.add_argument("--ratios", nargs="*", type=float)
    parser.add_argument("--windows", type=int, help="to calibrate on")
    parser.add_argument("--draws", type=int, default=1, help="calibrations, each on other windows")
    parser.add_argument("--tokens", type=int, default=100_000, help="to report on, of each text")
    parser.add_argument("--tokenizer", type=Path, help="where it does not lie with the network")
    parser.add_argument("--label", help="name of the network in the rows")
    parser.add_argument("--runs", type=Path, help="the folder of a sweep of language models, whose rows are taken over")
    given = parser.parse_args()
    if given.name == "page":
        page()
    elif given.name == "small":
        write(RESULTS / "language_small.json", taken_over(given.runs))
    else:
        run(given)


def run(given: argparse.Namespace) -> None:
    size, count, ratios = SETTINGS[given.name]
    count, ratios = given.windows or count, given.ratios or ratios
    encode, end, vocabulary = encoder(given.name, given.tokenizer or given.network)
    net = load(given.network, vocabulary, size)
    calibrate, reported = parts(documents_of(given.c4), given.name)
    tests = {"c4" if given.name != "stories" else "stories": windows(reported, encode, end, size)}
    if given.wikitext:
        tests["wikitext"] = windows(documents_of(given.wikitext), encode, end, size)
    tests = {name: text[: -(-given.tokens // size)] for name, text in tests.items()}
    texts = {"data": windows(calibrate, encode, end, size)}
    if any("self" in looks_at(plan) for plan in given.plans):
        texts["self"] = own_texts(net, texts["data"][:1], given.draws * count, given.own)
    groups = channel_groups(net, texts["data"][:1], ["hidden"])
    label = given.label or given.name
    rows = Rows(RESULTS / f"language_{label}.json", tests)

    def add(plan: str, ratio: float, draw: int, smaller: nn.Module, seconds: float) -> None:
        found = {name: perplexity(smaller, text) for name, text in tests.items()}
        size_of = {"params": sum(p.numel() for p in smaller.parameters()), "seconds": seconds}
        row = {"network": label, "plan": plan, "ratio": ratio, "windows": count, "window": size, "draw": draw}
        rows.add({**row, "perplexity": found, **size_of})
        print(f"{label} {plan} {ratio:g} ({draw}): {found} {seconds:.0f} s", flush=True)

    if not rows.done("dense", 0.0, count, 0):
        add("dense", 0.0, 0, net, 0.0)
    for plan, draw in [(name, i) for name in given.plans for i in range(given.draws if SEES.search(name) else 1)]:
        left = [ratio for ratio in ratios if not rows.done(plan, ratio, count, draw)]
        if not left:
            continue
        start = time.perf_counter()
        seen = {name: drawn(name, texts[name], count, draw) for name in looks_at(plan)}
        for ratio, smaller in made(plan, net, groups, seen, left, draw):
            add(plan, ratio, draw, smaller, time.perf_counter() - start)
            start = time.perf_counter()


def parts(documents: list[str], name: str) -> tuple[list[str], list[str]]:
    """(documents to calibrate on, documents to report); those between them chose the defaults."""
    if name == "stories":  # the first half is reported
        documents = documents[::-1]
    large = len(documents) > 1000
    cut = (CALIBRATE, CALIBRATE + CHOOSE) if large else (len(documents) * 3 // 8, len(documents) // 2)
    return documents[: cut[0]], documents[cut[1] :]


def own_texts(net: nn.Module, example: Tensor, count: int, path: Path | None) -> Tensor:
    """(count or more, T) ids that the network wrote, from the file where there is one, else written to it."""
    if path and path.is_file():
        return torch.load(path)[:, : example.shape[1]]
    seconds, texts = timed(lambda: written_texts(net, example, count, answers=TASK.answers))
    print(f"wrote {count} texts of {example.shape[1]} tokens in {seconds:.0f} s", flush=True)
    if path:
        torch.save(texts, path)
    return texts


def drawn(name: str, texts: Tensor, count: int, draw: int) -> Tensor:
    """The windows (count, T) of a draw, no two draws share one. UserError where there are too few."""
    found = texts[draw * count : (draw + 1) * count]
    if len(found) < count:
        raise UserError(
            f"draw {draw} of {count} windows needs {(draw + 1) * count} of {name}, and there are {len(texts)}; "
            "give more text, or lower --draws or --windows"
        )
    return found


class Rows:
    """The rows of a file, each written as it is made. tests: the texts that a row must have to be done."""

    def __init__(self, path: Path, tests: Mapping[str, Tensor]) -> None:
        self.path, self.tests = path, tests
        self.rows = {key_of(row): row for row in (json.loads(path.read_text()) if path.is_file() else [])}

    def done(self, *key: Any) -> bool:
        """key: plan, ratio, windows, draw"""
        return key in self.rows and self.tests.keys() <= self.rows[key]["perplexity"].keys()

    def add(self, row: Mapping[str, Any]) -> None:
        """Write a row. It takes the place of one with the same key."""
        told = {"tokens": {name: text.numel() for name, text in self.tests.items()}, "machine": machine("transformers")}
        self.rows[key_of(row)] = rounded({**row, **told})
        write(self.path, self.rows.values())


def write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


def taken_over(runs: Path) -> Iterator[Row]:
    """The rows of a sweep's cells and of their chains, on the test part, as rows of this page."""
    for folder in cells(runs):
        record = read_record(folder)
        if record is None or record["state"] != "done":
            raise UserError(f"{folder} is not done: run the sweep to its end first")
        window, count = (record["config"]["data"][key] for key in ("context", "test_size"))
        facts = {"network": f"{folder.name.partition('-')[0]}, {recipe_of(flat(record['config']))}", "draw": 0}
        facts |= {"windows": CALIBRATION, "window": window, "tokens": {"test": count * window}}
        files = [path for path in (folder / "rows.parquet", folder / "chains.parquet") if path.exists()]
        lines = pl.concat(map(pl.read_parquet, files), how="diagonal_relaxed").filter(pl.col("split") == "test")
        for line in lines.unique("chain", keep="first", maintain_order=True).iter_rows(named=True):
            plan = line["method"] + ("" if line["stage"] == "raw" else f" > {line['stage']}")
            for usual in ("+parts=[hidden]", f"+size={CALIBRATION}", f",size={CALIBRATION}"):
                plan = plan.replace(usual, "")
            told = {key: line[key] for key in ("ratio", "params", "seconds")}
            yield rounded({**facts, "plan": plan, "perplexity": {"test": line["perplexity"]}, **told})


def key_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """(plan, ratio, windows, draw) of a row; the oldest rows say no draw, and are the first."""
    return row["plan"], row["ratio"], row["windows"], row.get("draw", 0)


if __name__ == "__main__":
    main()
