"""What compression leaves of one network: the rows of a training epoch, or of a checkpoint, are all measured here."""

import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from pipeline.compression import ChannelGroups, Compressed, channel_groups, compressions
from pipeline.compression.compress import (
    AUTO,
    Counted,
    Report,
    check_finite,
    check_groups,
    check_ratios,
    kinds,
    macs,
    parameters,
)
from pipeline.compression.copies import bare_copy
from pipeline.compression.group import DEFAULT_PARTS, PARTS
from pipeline.compression.layers import UNITS, other_units
from pipeline.compression.masks import MASKS, check_mask
from pipeline.compression.methods import FOLDING, METHODS, check_pictures
from pipeline.compression.predict import judge
from pipeline.compression.projection import Projection, named_tensors
from pipeline.compression.repair import (
    Reference,
    norm_parameters,
    reference,
    repair_,
    statistics,
    tracked_norms,
    tune_norms_,
)
from pipeline.compression.synthetic import synthesize
from pipeline.evaluate import evaluate as totals_of
from pipeline.results import DENSE, STAGES, Row
from pipeline.tables import UserError, one_line, pick
from pipeline.tasks import Classification

Batch = tuple[Tensor, Tensor]
PICTURES = ("synthetic", "data")  # that a method may be compensated on
# What may stand behind a method's name, "mix+data+macs", and the options that it is short for.
ADDITIONS: dict[str, dict[str, Any]] = {
    "synthetic": {"pictures": "synthetic"},
    "data": {"pictures": "data"},
    "grail": {"pictures": "data", "solve_on": "dense"},
    "ar": {"approximate_repair": True},
    "macs": {"allocate": "macs"},
    "params": {"allocate": "params"},
    "filters": {"units": "filters"},
    "neurons": {"units": "neurons"},
}
CALIBRATION = 512  # unlabelled training pictures for that
KEPT = 2**31  # bytes of the machine's memory that evaluation batches may take


@dataclass(frozen=True)
class Metrics:
    """Sums over pictures, so that the parts of several processes add up."""

    correct: float = 0.0
    loss_sum: float = 0.0
    n: float = 0.0

    @property
    def acc(self) -> float:
        return self.correct / self.n

    @property
    def loss(self) -> float:
        return self.loss_sum / self.n


def evaluate(model: nn.Module, batches: Iterable[Batch]) -> Metrics:
    totals = totals_of(model, Classification("multiclass", "logits"), batches)
    if totals is None:
        return Metrics()
    n, _, right, loss = totals.tolist()
    return Metrics(right, loss, n)


class Entry(NamedTuple):
    """What one row is about; of the uncompressed network: DENSE, 0.0, "raw"."""

    method: str
    ratio: float
    stage: str

    def __str__(self) -> str:
        return f"{self.method} at ratio {self.ratio:g} ({self.stage})"

    @property
    def file(self) -> str:
        """What the network of this entry is called on disk."""
        return f"{self.method}-r{self.ratio:g}-{self.stage}.safetensors"


@dataclass
class Found:
    """What is known about an entry: values of its row, and this process's share of the sums if it was measured."""

    values: dict[str, Any]
    metrics: Metrics | None = None


class Inputs(NamedTuple):
    """All on the network's device: example, a batch of one; what to evaluate on; training samples for repair."""

    example: Tensor
    batches: Iterable[Batch]
    mending: Sequence[Batch]


class Measurement:
    """Compress copies of a network by every method and ratio, evaluate each at every stage.

    methods: names in METHODS, also with some of ADDITIONS behind ("fold+synthetic": compensated on pictures made from
        the network itself, "fold+data": on unlabelled training pictures, "l1+grail": on these as GRAIL does,
        "fold+ar": BatchNorm variances follow the weights, "fold+data+macs": also sizes by what groups can spare,
        "l1+filters", "l1+neurons": groups of these alone), names in MASKS, or
        {label: {"method": name, "pictures": "synthetic" or "data", options of `compressions` and of the method}}
    ratios: fractions of channels to remove (of weights, by MASKS), 0 <= r < 1
    stages: of results.STAGES; one that a network has nothing for (repair without BatchNorm) gives no rows
    round_to: leave multiples of so many channels; seed: of methods that draw
    parts: of compression.group.PARTS, what is compressed; a method's own options may say other parts. Masks know
        neither channels nor parts: round_to and parts are not for them
    predict: foretell, on synthetic pictures, what every network is worth: the fidelity in its rows
    who: whom warnings name

    Keeps the trace and the MAC counts, so one Measurement serves all networks of one architecture.
    """

    def __init__(
        self,
        methods: Sequence[str] | Mapping[str, Mapping[str, Any]],
        ratios: Sequence[float],
        stages: Sequence[str],
        round_to: int = 1,
        seed: int = 0,
        parts: Sequence[str] = DEFAULT_PARTS,
        predict: bool = False,
        who: str = "compression",
    ) -> None:
        for name, values in {"methods": methods, "ratios": ratios, "stages": stages, "parts": parts}.items():
            if isinstance(values, str | float | int):
                raise UserError(f"{name} must be a list, such as [{values}], got {values!r}")
        named = methods if isinstance(methods, Mapping) else dict.fromkeys(methods)
        self.methods = {
            label: {"method": label, "pictures": None, **options} if options else _spelled_out(label)
            for label, options in named.items()
        }
        self.shared = {"seed": seed, "round_to": round_to, "parts": parts}
        for label, options in self.methods.items():
            pick("method", kinds(), options["method"])
            check_pictures(options["method"], options["pictures"])
            if options["pictures"] is not None:
                pick("pictures", dict.fromkeys(PICTURES), options["pictures"])
            if options["method"] in MASKS:
                check_mask(label, options["method"], _of_mask(options))
                continue
            pick("units", dict.fromkeys(UNITS), options.get("units", "all"))
            for part in self._parts(options):
                pick("part", dict.fromkeys(PARTS), part)
        if DENSE in self.methods:
            raise UserError(f"method label {DENSE!r} is taken by the uncompressed network; choose another")
        check_ratios(ratios, round_to)
        for stage in stages:
            pick("stage", dict.fromkeys(STAGES), stage)
        if not self.methods or not ratios or not stages:
            raise UserError("compression needs at least one method, one ratio and one stage")
        self.ratios, self.stages = sorted(set(map(float, ratios))), tuple(s for s in STAGES if s in stages)
        self.predict, self.who = predict, who
        self._groups: dict[tuple[Any, ...], ChannelGroups] = {}
        self._counted: Counted = {}
        self._warned: set[str] = set()

    @property
    def mends(self) -> bool:
        """Are training samples needed?"""
        return bool(set(self.stages) - {"raw"}) or any(o["pictures"] == "data" for o in self.methods.values())

    @property
    def folds(self) -> dict[str, bool]:
        """Of the labels of methods that compare at one ratio: do they fold, or prune?

        Not "auto", masks (their ratio is of weights) and what has any of ADDITIONS, by its options or in its label. So
        the gap that an epoch logs is that of reports, which know no more than labels, wherever those say it all.
        """
        added = [item for options in ADDITIONS.values() for item in options.items()]
        return {
            label: o["method"] in FOLDING
            for label, o in self.methods.items()
            if o["method"] in METHODS and "+" not in label and not any(o.get(k) == v for k, v in added)
        }

    @property
    def traced(self) -> bool:
        """Are the channel groups of an architecture known?"""
        return bool(self._groups)

    def trace(self, net: nn.Module, example: Tensor) -> None:
        """Find the channel groups now, and forget those of another network. UserError when there are none.

        Masks need none.
        """
        self._groups = {}
        for label, options in self.methods.items():
            if options["method"] not in MASKS:
                groups = self.groups(label, net, example)
                check_groups(net, groups)
                other_units(net, groups, options.get("units", "all"))

    def groups(self, label: str, net: nn.Module, example: Tensor) -> ChannelGroups:
        """What the method of this label compresses, traced once for networks of the same shapes."""
        parts = self._parts(self.methods[label])
        shapes = tuple(t.shape for t in named_tensors(net).values())  # a network may be made smaller while it trains
        if (parts, shapes) not in self._groups:
            self._groups[parts, shapes] = channel_groups(net, example, parts)
        return self._groups[parts, shapes]

    def _parts(self, options: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple({**self.shared, **options}["parts"])

    def rows(
        self,
        live: nn.Module,
        inputs: Callable[[], Inputs],
        context: Mapping[str, Any],
        *,
        device: torch.device | str = "cpu",
        forward: Callable[[], AbstractContextManager] = nullcontext,
        total: Callable[[Tensor], Tensor] = lambda sums: sums,
        done: Callable[[Entry, Compressed], None] = lambda entry, compressed: None,
        bar: Mapping[str, Any] | None = None,
    ) -> list[Row]:
        """The rows of this network, which stays as it is; what fails becomes failed rows.

        inputs: makes what to measure on; what goes wrong there costs rows too
        context: values of the other fields of Row
        forward: context of every forward pass (autocast); bar: options of tqdm, shown when given
        total: adds up (rows, 3) sums over processes, called once; every process must call `rows` alike
        done: told of every network that was measured
        """
        # What is measured is settled before anything can fail, so that all processes add up the same entries.
        plan = self.plan(live)
        found: dict[Entry, Found] = {}
        with self._or_fail(found, plan, "measurement"):
            net = bare_copy(live).eval().to(device)
            example, batches, mending = inputs()
            values: dict[str, Any] = {"error": 0.0, "params": parameters(net)}
            with self._or_fail(found, plan[:1], str(plan[0]), values):
                values["macs"] = macs(net, example, self._counted)
                found[plan[0]] = evaluated(net, batches, values, forward)
            count = len(self.methods) * len(self.ratios)
            with tqdm(total=count, leave=False, dynamic_ncols=True, **(bar or {"disable": True})) as shown:
                on_pictures = cache(lambda: statistics(net, (batch for batch, _ in mending)))
                for entries, compressed, values in self._compressed(net, example, mending, plan[1:], found):
                    shown.set_postfix_str(f"{entries[0].method} {entries[0].ratio:g}")
                    against = partial(self.reference, entries[0].method, net, example, compressed.report, on_pictures)
                    for entry in entries:
                        with self._or_fail(found, [entry], str(entry), values):
                            mend_(compressed.model, entry.stage, mending, against, values, forward)
                            found[entry] = evaluated(compressed.model, batches, values, forward)
                            done(entry, compressed)
                    shown.update()
        return as_rows(plan, found, context, total)

    def plan(self, net: nn.Module) -> list[Entry]:
        """All entries in the order of the rows; stages that the network has nothing for are left out.

        The order of the stages matters: norm tuning starts from repaired statistics.
        """
        applies = {"raw": True, "repaired": bool(tracked_norms(net)), "norm_tuned": bool(norm_parameters(net))}
        stages = [stage for stage in self.stages if applies[stage]]
        smaller = [Entry(label, ratio, stage) for label in self.methods for ratio in self.ratios for stage in stages]
        return [Entry(DENSE, 0.0, "raw"), *smaller]

    def _compressed(
        self,
        net: nn.Module,
        example: Tensor,
        mending: Sequence[Batch],
        plan: Sequence[Entry],
        found: dict[Entry, Found],
    ) -> Iterator[tuple[list[Entry], Compressed, dict[str, Any]]]:
        """(its entries, network, row values) for every method and ratio; an error costs the method's ratios left."""
        made: dict[str, Tensor] = {}
        judged = self.judge(net, example, made)
        for label in dict.fromkeys(entry.method for entry in plan):
            own = [entry for entry in plan if entry.method == label]
            with self._or_fail(found, own, label):
                start = time.perf_counter()
                smaller = self.compressed(label, net, example, mending, made)
                for ratio, compressed in zip(self.ratios, smaller, strict=True):
                    report = compressed.report
                    values = {"error": report.error, "params": report.params_after, "macs": report.macs_after}
                    values["seconds"] = time.perf_counter() - start
                    values["fidelity"] = judged(compressed.model)
                    yield [entry for entry in own if entry.ratio == ratio], compressed, values
                    start = time.perf_counter()

    def reference(
        self,
        label: str,
        net: nn.Module,
        example: Tensor,
        report: Report,
        on_pictures: Callable[[], Mapping[str, Tensor]],
    ) -> Reference:
        """What a smaller network of this label is repaired against."""
        options = self.methods[label]
        if options["method"] in MASKS:
            return reference(net, on_pictures())
        groups, projections = self.groups(label, net, example), [Projection(row.labels) for row in report.groups]
        return reference(net, on_pictures(), groups, projections, options.get("norm_scale", True))

    def judge(self, net: nn.Module, example: Tensor, made: dict[str, Tensor]) -> Callable[[nn.Module], float | None]:
        """What foretells the worth of smaller networks (see predict.py); None where nobody asked, or it cannot be."""
        if self.predict:
            with self.or_warn("fidelity cannot be foretold"):
                return judge(net, self.synthetic(net, example, made))
        return lambda smaller: None

    def compressed(
        self,
        label: str,
        net: nn.Module,
        example: Tensor,
        mending: Sequence[Batch],
        made: dict[str, Tensor] | None = None,
        **options: Any,
    ) -> Iterator[Compressed]:
        """The network at every ratio by the method of this label, as it is, without a later stage.

        made: pictures that were made for this network before, added to; options: of `compressions`, before our own
        """
        options = {"ratios": self.ratios, "counted": self._counted, **self.methods[label], **options}
        if options["method"] in MASKS:
            options.pop("full", None)  # shapes stay as they are
            method, seed = options["method"], self.shared["seed"]
            yield from compressions(net, example, method, **{"seed": seed, **_of_mask(options)})
            return
        kind, made = options.pop("pictures"), {} if made is None else made
        if kind == "data" and kind not in made:
            made[kind] = torch.cat([batch for batch, _ in mending])[:CALIBRATION]
        if kind == "synthetic":
            self.synthetic(net, example, made)
        given = {"groups": self.groups(label, net, example), "pictures": made[kind] if kind else None}
        if options["method"] == AUTO and not kind:  # else it goes by the pictures that its candidates see
            options.setdefault("judge_on", self.synthetic(net, example, made))
        yield from compressions(net, example, **{**self.shared, **options, **given})

    def synthetic(self, net: nn.Module, example: Tensor, made: dict[str, Tensor]) -> Tensor:
        """Pictures of this network's own, made once."""
        if "synthetic" not in made:
            made["synthetic"] = synthesize(net, example, seed=self.shared["seed"])
        return made["synthetic"]

    @contextmanager
    def _or_fail(
        self, found: dict[Entry, Found], entries: Sequence[Entry], what: str, values: Mapping[str, Any] | None = None
    ) -> Iterator[None]:
        """An exception makes those of these entries fail that are not measured yet."""
        try:
            yield
        except Exception as error:
            for entry in entries:
                found.setdefault(entry, Found({**(values or {}), "reason": one_line(error)}))
            self.warn(f"{what}: {one_line(error)}")

    @contextmanager
    def or_warn(self, text: str) -> Iterator[None]:
        """An exception becomes a warning."""
        try:
            yield
        except Exception as error:
            self.warn(f"{text}: {one_line(error)}")

    def warn(self, text: str) -> None:
        """Say a thing once."""
        if text not in self._warned:
            self._warned.add(text)
            warnings.warn(f"{self.who}: {text}", RuntimeWarning, stacklevel=2)


def _spelled_out(label: str) -> dict[str, Any]:
    """The options that a label stands for where none are given: "fold+synthetic" is fold, compensated."""
    method, *additions = label.split("+")
    options: dict[str, Any] = {"method": method, "pictures": None}
    for addition in additions:
        for name, value in pick("addition to a method", ADDITIONS, addition).items():
            if options.get(name) not in (None, value):
                raise UserError(f"{label!r} says both {name}={options[name]} and {name}={value}; choose one")
            options[name] = value
    return options


def _of_mask(options: Mapping[str, Any]) -> dict[str, Any]:
    """What is said of a mask beside its name: no pictures, where there are none."""
    return {name: value for name, value in options.items() if name != "method" and (name, value) != ("pictures", None)}


class Streamed:
    """A loader's batches on the device, fetched anew at every pass."""

    def __init__(self, loader: DataLoader, move: Callable[[Any], Batch]) -> None:
        self.loader, self.move = loader, move

    def __iter__(self) -> Iterator[Batch]:
        return map(self.move, self.loader)


def passes(loader: DataLoader, move: Callable[[Any], Batch], example: Tensor) -> Iterable[Batch]:
    """The loader's batches for any number of passes: kept where `move` puts them if they fit there, else streamed.

    example: (1, ...) of the inputs, on that device. ImageNet's 50,000 test pictures are 30 GB.
    """
    streamed = Streamed(loader, move)
    size = example.numel() * example.element_size() * len(loader.dataset)
    return list(streamed) if size <= room(example.device) else streamed


def room(device: torch.device) -> int:
    """Bytes that pictures may take there: half of what a GPU has free, for a network needs the rest."""
    return torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else KEPT


def mend_(
    model: nn.Module,
    stage: str,
    batches: Sequence[Batch],
    against: Callable[[], Reference],
    values: dict[str, Any],
    forward: Callable[[], AbstractContextManager],
) -> None:
    """Make the network of the stage before into one of this stage, and add the time to its values."""
    start = time.perf_counter()
    with forward(), torch.enable_grad():
        if stage == "repaired":
            repair_(model, (inputs for inputs, _ in batches), against())
        elif stage == "norm_tuned":
            tune_norms_(model, batches)
    values["seconds"] += time.perf_counter() - start


def evaluated(
    model: nn.Module,
    batches: Iterable[Batch],
    values: Mapping[str, Any],
    forward: Callable[[], AbstractContextManager],
) -> Found:
    start = time.perf_counter()
    with forward():
        check_finite(named_tensors(model))
        metrics = evaluate(model, batches)
    return Found({**values, "seconds": values.get("seconds", 0.0) + time.perf_counter() - start}, metrics)


def as_rows(
    plan: Sequence[Entry], found: Mapping[Entry, Found], context: Mapping[str, Any], total: Callable[[Tensor], Tensor]
) -> list[Row]:
    """Add up the shares of all processes, and make the rows."""
    none = Metrics(math.nan, math.nan, math.nan)
    parts = [found[entry].metrics or none for entry in plan]
    sums = total(torch.tensor([[m.correct, m.loss_sum, m.n] for m in parts], dtype=torch.float64))
    rows = []
    for entry, share in zip(plan, sums.tolist(), strict=True):
        metrics, values = Metrics(*share), {**context, **found[entry].values, **entry._asdict()}
        if metrics.n > 0:  # NaN where any process failed
            rows.append(Row(**values, n=int(metrics.n), acc=metrics.acc, loss=metrics.loss))
        else:
            reason = values.get("reason") or "failed on another process, or there were no pictures"
            rows.append(Row(**{**values, "reason": reason}, status="failed"))
    return rows
