"""Measures what compression leaves of one network: `measure` runs its chains and gives a row for every network made.

Every stage works on a copy of its own, so that no row depends on which others were asked for.
"""

import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from pipeline.compression import Compressed
from pipeline.compression.calibrate.predict import PICTURES, judge
from pipeline.compression.checks import check_finite
from pipeline.compression.copies import bare_copy
from pipeline.compression.merge.modules import named_tensors
from pipeline.compression.recipe import Calibration
from pipeline.compression.sizes.count import macs, parameters
from pipeline.data.corruptions import corrupted
from pipeline.entries import Chains, Entry, facts, until_compressed
from pipeline.evaluate import evaluate
from pipeline.example import Example
from pipeline.metrics import METRICS
from pipeline.results import Row, blind, table
from pipeline.sharpness import sharpness
from pipeline.stages import (
    Followed,
    State,
    Supplies,
    Traces,
    compressed,
    fitting,
)
from pipeline.tables import UserError, one_line
from pipeline.tasks.task import Batch, Task


class Once:
    """Warnings that are given once each. who: the speaker that begins each of them."""

    def __init__(self, who: str = "compression") -> None:
        self.who, self._said = who, set[str]()

    def say(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            warnings.warn(f"{self.who}: {text}", RuntimeWarning, stacklevel=3)

    @contextmanager
    def instead(self, text: str) -> Iterator[None]:
        """Inside, an exception becomes a warning that begins with `text`."""
        try:
            yield
        except Exception as error:
            self.say(f"{text}: {one_line(error)}")


class Inputs(NamedTuple):
    """Data on the network's device.

    example: the network's arguments, a batch of one. batches: to evaluate on, by split.
    training: labelled training samples without augmentation, for stages and calibration.
    """

    example: Example
    batches: Mapping[str, Iterable[Batch]]
    training: Sequence[Batch] = ()


@dataclass
class Host:
    """The surroundings of a measurement, which a callback and a script both fill in.

    task: settled, see Task. inputs: gets the data; an exception in it costs rows, not the run.
    splits: those that `inputs` will have. traces: of the architecture, kept from one network to the next.
    forward: context of every forward pass (autocast). bar: options of tqdm; None: no progress bar.
    total: adds up (rows, sums) over processes, called once; every process must measure alike.
    done: called with every network that was measured. certify: whether it keeps any, which then need certificates.
    """

    task: Task
    inputs: Callable[[], Inputs]
    splits: Sequence[str] = ("val",)
    device: torch.device | str = "cpu"
    traces: Traces = field(default_factory=Traces)
    once: Once = field(default_factory=Once)
    forward: Callable[[], AbstractContextManager] = nullcontext
    total: Callable[[Tensor], Tensor] = lambda sums: sums
    done: Callable[[Entry, Compressed], None] = lambda entry, compressed: None
    bar: Mapping[str, Any] | None = None
    certify: bool = False


@dataclass
class Found:
    """The result of an entry: values of its row, and this process's sums by split; totals are None where it failed."""

    values: dict[str, Any]
    totals: Mapping[str, Tensor | None] | None = None


def measure(live: nn.Module, chains: Chains, host: Host, context: Mapping[str, Any]) -> list[Row]:
    """The rows of this network, which stays as it is; an entry that fails becomes a failed row.

    context: values of the other fields of Row.
    """
    # The list of entries is settled before anything can fail, so that all processes add up the same entries.
    entries = chains.entries(live)
    found: dict[Entry, Found] = {}
    with or_fail(found, entries, "measurement", host.once):
        given = host.inputs()  # before anything can fail: processes may have to agree on it
        evaluating = partial(evaluated, chains, given, host)
        net = bare_copy(live).eval().to(host.device)
        shared = {"seed": chains.seed, "traces": host.traces, "forward": host.forward, "certify": host.certify}
        supplies = Supplies(net, given.example, host.task, given.training, **shared)
        measure_dense(supplies, evaluating, host, entries, found)
        measure_chains(chains, supplies, evaluating, host, entries[1:], found)
    return as_rows(entries, found, host, facts(chains, live, entries), context, chains.corruptions is not None)


Evaluate = Callable[..., "Found"]  # (network, values of its row, check=False) -> what was found, see `evaluated`


def measure_dense(
    supplies: Supplies, evaluating: Evaluate, host: Host, entries: Sequence[Entry], found: dict[Entry, Found]
) -> None:
    """The row of the uncompressed network. The task checks every batch here; one that it refuses fails all entries."""
    values: dict[str, Any] = {"error": 0.0, "params": parameters(supplies.dense)}
    with or_fail(found, entries[:1], str(entries[0]), host.once, values):
        values["macs"] = macs(supplies.dense, supplies.example, supplies.traces.counted)
        try:
            found[entries[0]] = evaluating(supplies.dense, values, check=True)
        except UserError as refused:
            found |= {entry: Found({"reason": one_line(refused)}) for entry in entries[1:]}
            raise


def measure_chains(
    chains: Chains,
    supplies: Supplies,
    evaluating: Evaluate,
    host: Host,
    entries: Sequence[Entry],
    found: dict[Entry, Found],
) -> None:
    judged = judging(chains, supplies, host.once)

    def measure_state(state: State, own: Sequence[Entry]) -> None:
        followed, said = Followed(state, supplies), cache(partial(numbers, judged))
        for entry in own:
            measure_entry(entry, followed, evaluating, host, said, found)

    count = len(chains.recipes) * len(chains.ratios)
    with tqdm(total=count, leave=False, dynamic_ncols=True, **(host.bar or {"disable": True})) as bar:
        for label, recipe in chains.recipes.items():
            own = [entry for entry in entries if entry.method == label and entry not in found]
            if not own:  # the network has nothing for any of the stages
                continue
            with or_fail(found, own, label, host.once):
                start = time.perf_counter()
                for state in compressed(State(supplies.dense), recipe, chains.ratios, supplies):
                    assert state.report is not None
                    state, ratio = replace(state, seconds=time.perf_counter() - start), state.report.ratio
                    bar.set_postfix_str(f"{label} {ratio:g}")
                    measure_state(state, [entry for entry in own if entry.ratio == ratio])
                    bar.update()
                    del state  # before the next one is made: two of a large network may not fit
                    start = time.perf_counter()


def measure_entry(
    entry: Entry,
    followed: Followed,
    evaluating: Evaluate,
    host: Host,
    said: Callable[[State], Mapping[str, Any]],
    found: dict[Entry, Found],
) -> None:
    """said: what a row says of the state behind its last compression."""
    values: dict[str, Any] = {}
    with or_fail(found, [entry], str(entry), host.once, values):
        tail = fitting(entry.stage, followed.supplies.dense) or ()
        values |= said(followed.state(until_compressed(tail)))
        state = followed.state(tail)
        found[entry] = evaluating(state.model, {**values, "seconds": state.seconds})
        assert state.report is not None
        host.done(entry, Compressed(state.model, state.report))


def judging(chains: Chains, supplies: Supplies, once: Once) -> Callable[[nn.Module], float | None]:
    """A function that foretells a smaller network's fidelity (see predict.py), or gives None where it cannot."""
    if chains.predict:
        with once.instead("fidelity cannot be foretold"):
            return judge(supplies.dense, supplies.pictures(Calibration("synthetic", PICTURES)), supplies.task.answers)
    return lambda smaller: None


def numbers(judged: Callable[[nn.Module], float | None], state: State) -> dict[str, Any]:
    """The values of a row that a compression decides, whatever stages come behind it but another compression."""
    report = state.report
    assert report is not None
    found = {"error": report.error, "params": report.params_after, "macs": report.macs_after, "seconds": state.seconds}
    return {**found, "fidelity": judged(state.model)}


def evaluated(
    chains: Chains, given: Inputs, host: Host, model: nn.Module, values: Mapping[str, Any], check: bool = False
) -> Found:
    """The metrics of the task, and what the chains ask for beside them."""
    found = metrics_of(given, host, model, values, check)
    assert found.totals is not None
    beside = sharpness_of(chains, given, host, model), corrupted_totals(chains, given, host, model)
    return Found(found.values | beside[0], {**found.totals, **beside[1]})


def metrics_of(given: Inputs, host: Host, model: nn.Module, values: Mapping[str, Any], check: bool = False) -> Found:
    """Evaluate the model on every split. check: let the task check every batch, see `evaluate`.

    The seconds of the row are those of the task's metrics, so that they do not depend on what is measured beside them.
    """
    start = time.perf_counter()
    with host.forward():
        check_finite(named_tensors(model))
        totals = {split: evaluate(model, host.task, batches, check) for split, batches in given.batches.items()}
    return Found({**values, "seconds": values.get("seconds", 0.0) + time.perf_counter() - start}, totals)


def sharpness_of(chains: Chains, given: Inputs, host: Host, model: nn.Module) -> dict[str, float]:
    """The sharpness that the chains ask for; {} where it cannot be measured. Outside of autocast, as it is a small
    difference of losses."""
    if chains.sharpness is not None:
        with host.once.instead("sharpness cannot be measured"):
            return sharpness(model, host.task, given.training, chains.sharpness)
    return {}


def corrupted_totals(chains: Chains, given: Inputs, host: Host, model: nn.Module) -> dict[str, Tensor | None]:
    """{name of a split in corruption: the task's sums over all corruptions}; {} where it cannot be measured."""
    if chains.corruptions is not None:
        with host.once.instead("corruptions cannot be measured"), host.forward():
            return {
                in_corruption(split): evaluate(model, host.task, corrupted(batches, chains.corruptions, chains.seed))
                for split, batches in given.batches.items()
            }
    return {}


def in_corruption(split: str) -> str:
    return f"{split} corrupted"


@contextmanager
def or_fail(
    found: dict[Entry, Found],
    entries: Sequence[Entry],
    what: str,
    once: Once,
    values: Mapping[str, Any] | None = None,
) -> Iterator[None]:
    """Inside, an exception fails those of these entries that are not measured yet, and becomes a warning."""
    try:
        yield
    except Exception as error:
        for entry in entries:
            found.setdefault(entry, Found({**(values or {}), "reason": one_line(error)}))
        once.say(f"{what}: {one_line(error)}")


def as_rows(
    entries: Sequence[Entry],
    found: Mapping[Entry, Found],
    host: Host,
    facts: Mapping[Entry, Mapping[str, str]],
    context: Mapping[str, Any],
    corrupted: bool = False,
) -> list[Row]:
    """Add up the shares of all processes and make the rows, the first split first.

    corrupted: whether there are sums on corrupted pictures, which become a column.
    """
    missing = torch.full((host.task.size,), math.nan, dtype=torch.float64)
    nothing = torch.zeros(host.task.size, dtype=torch.float64)

    def share(entry: Entry, split: str) -> Tensor:
        totals = found[entry].totals
        if totals is None:
            return missing
        return (missing if split not in totals else nothing) if (sums := totals.get(split)) is None else sums

    places = [(split, entry) for split in host.splits for entry in entries]
    beside = [(in_corruption(split), entry) for split, entry in places if corrupted]
    sums = host.total(torch.stack([share(entry, split) for split, entry in (*places, *beside)]))
    corruption = [host.task.values(total)[host.task.metrics[0]] for total in sums[len(places) :]] or [None] * len(
        places
    )
    rows = []
    for (split, entry), total, value in zip(places, sums[: len(places)], corruption, strict=True):
        known = {} if value is None or math.isnan(value) else {"corrupted": value}
        fixed = {**about_task(host.task), "split": split}
        values = {**context, **fixed, **facts[entry], **found[entry].values, **entry._asdict(), **known}
        rows.append(as_row(host.task, total, values))
    return rows


def about_task(task: Task) -> dict[str, Any]:
    """The columns of a row that say what its task measures."""
    return {"task": task.name, "metric": task.metrics[0], "chance": task.chance}


def warn_where_blind(rows: Sequence[Row], once: Once) -> None:
    """Warn where the uncompressed network is no better than the chance that its task told."""
    for row in blind(table(rows)).drop_nulls("chance").iter_rows(named=True):
        metric = METRICS[row["metric"]]
        once.say(
            f"the uncompressed network's {metric.title} of {metric.text(row[metric.name])} is no better than chance, "
            f"{metric.text(row['chance'])}; check that its weights are trained, and that the data have the classes or "
            "the tokenizer, and the preparation, that it was trained with"
        )


def as_row(task: Task, total: Tensor, values: Mapping[str, Any]) -> Row:
    """total: (task.size,); its first sum counts the samples, and NaN says that the entry failed on some process."""
    if total[0] > 0:
        return Row(**values, n=task.count(total), **task.values(total))
    reason = values.get("reason") or "failed on another process, or there was nothing to measure on"
    return Row(**{**values, "reason": reason}, status="failed")
