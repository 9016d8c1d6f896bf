"""Runs chains on disk: every stage has a folder, so that a run that is cut off goes on, and chains share what is alike.

A folder is named by the hash of its stage and of the folder that the stage began with; the first name is the hash of
the network's weights and of what its stages draw on. So chains that begin alike share folders, and a stage is done
anew only where something before it changed. A folder holds

    network.safetensors  the network (see compression.checkpoint), or the file that a stage such as ptq made of it
    stage.json           its stage, sizes, seconds and samples, so far as the row needs them
    rows.parquet         the row, once the network is measured
    speed-*.parquet      its times, once it is timed; the name says the settings

and appears whole: the work is done in NAME.part, where a long stage keeps its progress.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from pipeline.compression.checkpoint import load_compressed, save_compressed, stored_size
from pipeline.compression.plan import Step, history, went_through_
from pipeline.compression.recipe import about
from pipeline.compression.sizes.count import macs, parameters
from pipeline.evaluate import output_on
from pipeline.finished import FileNetwork, FinishedNetwork
from pipeline.measure import Host, Inputs, about_task, metrics_of
from pipeline.measure import as_row as row_of
from pipeline.onnx_network import OnnxNetwork
from pipeline.openvino_network import OpenvinoNetwork
from pipeline.results import DENSE, ROWS, Row, RowStore
from pipeline.stages import TAILS, Chain, Compress, Stage, State, Supplies, check_stage, parse_tail, spell_chain
from pipeline.stages.chain import advanced
from pipeline.stages.stage import is_number
from pipeline.tables import UserError, one_line
from pipeline.tasks.distilled import check_alike
from pipeline.torchao_network import TorchaoNetwork

RECORD = "stage.json"
NETWORK = "network.safetensors"
# In its place behind a stage that finishes a network.
ONNX = "network.onnx"
OPENVINO = "network.openvino.zip"
TORCHAO = "network.int8.safetensors"
FILES: dict[type[FinishedNetwork], str] = {OnnxNetwork: ONNX, OpenvinoNetwork: OPENVINO, TorchaoNetwork: TORCHAO}
# Values of a row that stand in the record of a stage, for all stages up to it.
RECORDED = ("error", "params", "macs", "bytes", "seconds", "unlabelled", "labelled")
WHOLE = "none"  # method of a row whose chain compresses no channels


@dataclass
class Ground:
    """What all chains of one network stand on.

    supplies: what stages draw on; its `dense` is where chains begin. given: the data to measure on.
    store: folder of the stages' folders. name: hash of all that stages draw on but the options of a stage.
    full: the network's architecture at full size. host: the task, where to warn, and how forward passes are done.
    hashes: {teacher: hash of its weights}. context: values of the other fields of Row.
    architecture, source: for files, see `save_compressed`.
    """

    supplies: Supplies
    given: Inputs
    host: Host
    store: Path
    name: str
    full: nn.Module
    context: Mapping[str, Any]
    hashes: Mapping[str, str] = field(default_factory=dict)
    architecture: Mapping[str, Any] = field(default_factory=dict)
    source: Mapping[str, Any] = field(default_factory=dict)
    # The networks of the chain that is run now, by the stages behind them.
    states: dict[Chain, State] = field(default_factory=dict)

    @cached_property
    def whole(self) -> dict[str, Any]:
        """The record of the network where chains begin. bytes: of its tensors."""
        net, supplies = self.supplies.dense, self.supplies
        return {
            "error": 0.0,
            "params": parameters(net),
            "macs": macs(net, supplies.example, supplies.traces.counted),
            "bytes": stored_size(net),
            "seconds": 0.0,
            "unlabelled": 0,
            "labelled": 0,
        }

    def folder(self, chain: Chain) -> Path:
        name = self.name
        for stage in chain:
            teacher = self.hashes.get(getattr(stage, "teacher", ""), "")
            name = hashlib.sha256(json.dumps([name, settings(stage), teacher]).encode()).hexdigest()[:16]
        return self.store / name


# Options that are younger than folders that people have, with the value at which they change nothing.
AT_REST = [("size", None)]


def settings(stage: Stage) -> list[Any]:
    """Every option of a stage, those at their defaults too: a default that changes is another stage.

    A stage that does its work otherwise than it did has a `version` from 2 on, so that older folders are not taken for
    what it does now.
    """
    values = {f.name: getattr(stage, f.name) for f in fields(stage)}
    told = {name: float(v) if is_number(v) else repr(v) for name, v in values.items() if (name, v) not in AT_REST}
    version = getattr(stage, "version", None)
    return [type(stage).__name__, told] if version is None else [type(stage).__name__, told, version]


class Node(NamedTuple):
    """A point of a chain: the stages up to it, and the folder of the last one; no stages: the network they begin with.

    record: of stage.json: bytes; seconds; unlabelled and labelled samples of all stages; error, params and macs.
    """

    chain: Chain
    folder: Path
    record: Mapping[str, Any]


# Called with every node that was measured, and a function that gives its network.
Done = Callable[[Node, Callable[[], nn.Module]], None]


def ready(chains: Sequence[Chain], ground: Ground) -> None:
    """UserError for the first stage that could not be done; nothing is compressed or trained yet."""
    dense, supplies = ground.supplies.dense, ground.supplies
    for chain in chains:
        for stage in chain:
            if reason := stage.reason_against(dense):
                text = f"{stage} cannot be done on {type(dense).__name__}: {reason}; leave it out"
                raise UserError(f"{spell_chain(chain)}: {text}")
            if stage.needs and not supplies.batches:
                text = "needs training samples, and there are none; raise compression.repair_size"
                raise UserError(f"{spell_chain(chain)}: {stage} {text}")
    for name, teacher in supplies.teachers.items():
        answers = [supplies.task.answers(output_on(net, supplies.example)) for net in (dense, teacher())]
        try:
            check_alike(*answers)
        except UserError as error:
            raise UserError(f"teacher {name!r}: {error}") from error
    for stage in {stage: None for chain in chains for stage in chain}:
        check_stage(stage, supplies)


@torch.no_grad()
def run(chains: Sequence[Chain], ground: Ground, done: Done) -> list[Row]:
    """The rows of the uncompressed network and of every stage of every chain; stages in common have one row.

    A stage that fails becomes a failed row, as do those behind it.
    """
    rows = [measured(Node((), ground.folder(()), ground.whole), ground, done)]
    failed: dict[Chain, str] = {}
    for chain in nodes(chains):
        ground.states = {stages: state for stages, state in ground.states.items() if stages == chain[: len(stages)]}
        try:
            if chain[:-1] not in failed:
                rows.append(measured(made(chain, ground), ground, done))
                continue
            failed[chain] = failed[chain[:-1]]
        except Exception as error:
            failed[chain] = one_line(error)
            ground.host.once.say(f"{spell_chain(chain)}: {failed[chain]}")
        rows.append(Row(**said(chain, ground), status="failed", reason=failed[chain]))
    return rows


def nodes(chains: Sequence[Chain]) -> list[Chain]:
    """The beginnings of all chains, each once, in the order in which they are run."""
    return list(dict.fromkeys(chain[:i] for chain in chains for i in range(1, len(chain) + 1)))


def made(chain: Chain, ground: Ground) -> Node:
    """The node with its folder, which is there or is made now."""
    folder = ground.folder(chain)
    if not (folder / RECORD).exists():
        work = folder.with_name(f"{folder.name}.part")
        work.mkdir(parents=True, exist_ok=True)
        begun = state_of(chain[:-1], ground)
        ground.supplies.folder = work
        try:
            state = advanced(chain[-1], replace(begun, seconds=0.0), ground.supplies)
        finally:
            ground.supplies.folder = None
        write(chain, state, work, ground)
        os.replace(work, folder)
        ground.states[chain] = state
    return Node(chain, folder, record_of(chain, ground))


def write(chain: Chain, state: State, work: Path, ground: Ground) -> None:
    """Network and record, and nothing else, into the folder."""
    if isinstance(state.model, FinishedNetwork):
        file = work / FILES[type(state.model)]
        state.model.write(file)
    else:
        file = work / NETWORK
        save_compressed(state.model, file, architecture=ground.architecture, source=ground.source)
    for other in set(work.iterdir()) - {file}:  # the progress of a stage that is done
        other.unlink()
    before, report = record_of(chain[:-1], ground), state.report
    seen = chain[-1].seen(ground.supplies)
    sizes = {name: before[name] for name in ("error", "params", "macs")}
    if isinstance(chain[-1], Compress) and report is not None:
        sizes = {"error": report.error, "params": report.params_after, "macs": report.macs_after}
    record = {
        "stage": str(chain[-1]),
        "chain": spell_chain(chain),
        "input": ground.folder(chain[:-1]).name,
        "seconds": before["seconds"] + state.seconds,
        "unlabelled": before["unlabelled"] + seen.unlabelled,
        "labelled": before["labelled"] + seen.labelled,
        "bytes": file.stat().st_size,
        **sizes,
    }
    (work / RECORD).write_text(json.dumps(record, indent=1))


def record_of(chain: Chain, ground: Ground) -> dict[str, Any]:
    """The record of a stage that is done. UserError where it is damaged."""
    if not chain:
        return ground.whole
    path = ground.folder(chain) / RECORD
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({one_line(error)}); delete its folder to do the stage again") from error


def state_of(chain: Chain, ground: Ground) -> State:
    """The state after a chain that is done. Its network comes from its file.

    A repair further on needs to know what compression changed. A file does not hold that, so a stage that sets
    `State.before` runs again; such stages are those that train nothing.
    """
    if not chain:
        return State(ground.supplies.dense)
    if chain not in ground.states:
        stage = chain[-1]
        net = network_of(chain, ground)
        if stage.terms.before == "clears":
            state = State(net)
        elif stage.terms.before == "keeps":
            state = replace(state_of(chain[:-1], ground), model=net)
        elif stage.terms.before == "begins":
            state = replace(state_of(chain[:-1], ground).begun(), model=net)
        else:
            state = replace(advanced(stage, state_of(chain[:-1], ground), ground.supplies), model=net)
        ground.states[chain] = state
    return ground.states[chain]


def network_of(chain: Chain, ground: Ground) -> nn.Module:
    """The network in the folder of a stage that is done, on the device.

    What torchao made is made again from the network before, because its programs are pickles (see TorchaoNetwork).
    """
    folder = ground.folder(chain)
    kind = next((one for one, name in FILES.items() if (folder / name).exists()), None)
    if kind is None:
        net = load_compressed(folder / NETWORK, ground.full)[0]
        return net.to(next(ground.supplies.dense.parameters()).device).eval()
    before = state_of(chain[:-1], ground)
    if not issubclass(kind, FileNetwork):
        return advanced(chain[-1], before, ground.supplies).model
    like, sizes = before.model, record_of(chain, ground)
    content = (folder / FILES[kind]).read_bytes()
    made = kind(content, like, ground.supplies.example, sizes["params"], sizes["macs"])
    went_through_(made, [*history(like), Step(str(chain[-1]))])
    return made.eval()


def measured(node: Node, ground: Ground, done: Done) -> Row:
    """The row of a node, from its folder where it stands there."""

    def network() -> nn.Module:
        return state_of(node.chain, ground).model

    store = RowStore(node.folder / ROWS)
    if store.rows.is_empty():
        start = time.perf_counter()
        totals = metrics_of(ground.given, ground.host, network(), {}, check=not node.chain).totals
        assert totals is not None
        values = {**said(node.chain, ground), **{name: node.record[name] for name in RECORDED}}
        values["seconds"] += time.perf_counter() - start
        (total,) = totals.values()
        store.add([row_of(ground.host.task, total, values)])
        store.write()
    row = Row(**{**store.rows.to_dicts()[-1], **ground.context})
    done(node, network)
    return row


def said(chain: Chain, ground: Ground) -> dict[str, Any]:
    """The values of a row that say what it is about."""
    task, live = ground.host.task, ground.supplies.dense
    first = next((i for i, stage in enumerate(chain) if isinstance(stage, Compress)), None)
    facts: dict[str, Any] = {"kind": DENSE} if not chain else {"kind": WHOLE}
    if first is not None:
        facts = about(chain[first].recipe)
    for stage in chain:
        facts |= stage.facts
    steps = [str(step) for step in history(live)] + [str(stage) for stage in chain]
    fixed = {**about_task(task), "split": next(iter(ground.given.batches))}
    return {**ground.context, **fixed, **facts, **named(chain, first), "chain": " > ".join(steps)}


def named(chain: Chain, first: int | None) -> dict[str, Any]:
    """{"method", "ratio", "stage"} of a row, which together name a node; first: place of the first compression.

    A chain that begins with a compression is named as methods, ratios and stages name it.
    """
    if not chain:
        return {"method": DENSE, "ratio": 0.0, "stage": "raw"}
    if first is None:
        return {"method": WHOLE, "ratio": 0.0, "stage": spell_chain(chain)}
    method, _, _ = str(chain[first]).rpartition("@")
    tails = {parse_tail(name): name for name in TAILS}
    tail = chain[1:]
    stage = spell_chain(chain) if first else tails.get(tail, spell_chain(tail))
    return {"method": method, "ratio": chain[first].ratio, "stage": stage}
