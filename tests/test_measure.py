"""A measurement keeps and shares traces, by the parts to compress, and pictures where they fit."""

import importlib
import warnings
import weakref
from functools import partial

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pipeline.batches
import pipeline.stages.repair
import pipeline.stages.stage
from pipeline.batches import Passes
from pipeline.compression import channel_groups, compress
from pipeline.entries import Entry, chains, trace
from pipeline.evaluate import settle
from pipeline.measure import Host, Inputs, Once, measure, warn_where_blind
from pipeline.models import build_model
from pipeline.results import Row, side, table
from pipeline.stages import Traces, parse_chain, spell_chain
from pipeline.tables import UserError
from pipeline.tasks import Classification

CONTEXT = {"cell": "c", "model": "m", "data": "d", "seed": 0, "epoch": 0, "step": 0}
PICTURES = TensorDataset(torch.randn(12, 3, 8, 8), torch.arange(12) % 4)
EVERYTHING = tuple(PICTURES.tensors)


def vit() -> nn.Module:
    return VisionTransformer(img_size=8, patch_size=4, embed_dim=16, depth=1, num_heads=2, num_classes=4).eval()


def rows_of(tree, net: nn.Module, traces=None, batches=None, training=(EVERYTHING,), **options) -> list:
    batches = Passes(DataLoader(PICTURES, 5)) if batches is None else batches
    first = next(iter(batches))
    task = settle(net, Classification(), first)
    host = Host(task, lambda: Inputs(first[0][:1], {"test": batches}, training), ("test",), **options)
    host.traces = traces or Traces()
    return measure(net, tree, host, CONTEXT)


def sides(rows: list) -> dict:
    found = table(rows)
    return {method: of for method, of in found.select("method", side()).iter_rows() if of}


def test_methods_with_parts_of_their_own_share_a_trace_of_the_same_parts(monkeypatch):
    traced = []

    def counting(net, example, parts):
        traced.append(parts)
        return real(net, example, parts)

    real = pipeline.stages.stage.channel_groups
    monkeypatch.setattr(pipeline.stages.stage, "channel_groups", counting)
    methods = {"mlp": {"method": "l2"}, "again": {"method": "l1"}, "heads": {"method": "l2", "parts": ["head"]}}
    tree, traces = chains(methods, [0.5], ["raw"], parts=["hidden"]), Traces()
    for net in (vit(), vit()):
        rows = rows_of(tree, net, traces)
        assert [row.status for row in rows] == ["ok"] * 4, [row.reason for row in rows]
        dense, mlp, again, heads = (row.params for row in rows)
        assert len({dense, mlp, heads}) == 3
        assert mlp == again
    assert traced == [("hidden",), ("head",)]


def test_fewer_heads_and_narrower_ones_are_traced_apart():
    """Fewer heads and narrower heads give the same shapes, but their channels are other ones."""
    example, traces = PICTURES.tensors[0][:1], Traces()
    fewer, narrower = (compress(vit(), example, "l1", 0.5, parts=[part]).model for part in ("head", "width"))
    assert [t.shape for t in fewer.parameters()] == [t.shape for t in narrower.parameters()]
    for net in (fewer, narrower):
        found = traces.of(net, example, ["width"])
        assert [group.name for group in found] == [group.name for group in channel_groups(net, example, ["width"])]
    assert len(traces.of(fewer, example, ["width"])) < len(traces.of(narrower, example, ["width"]))


@pytest.mark.parametrize(
    ("methods", "parts", "message"),
    [
        (["fold"], ["heads"], "unknown part 'heads'.*did you mean 'head'.*choose from: head, hidden, residual, width"),
        ({"a": {"method": "fold", "parts": ["widht"]}}, ["hidden"], "unknown part 'widht'"),
        (["fold"], "hidden", r"parts must be a list, such as \[hidden\]"),
    ],
)
def test_unknown_parts_are_refused_at_once(methods, parts, message):
    with pytest.raises(UserError, match=message):
        chains(methods, [0.5], ["raw"], parts=parts)


def test_pictures_are_kept_where_they_fit_and_streamed_where_not(monkeypatch):
    """The numbers are the same either way. A test of Passes shows that kept batches are fetched once."""
    net, size = build_model("resnet20", 4, 3), sum(t.numel() * t.element_size() for t in EVERYTHING)
    both = []
    for room in (size, size - 1):
        monkeypatch.setattr(pipeline.batches, "KEPT", room)
        rows = rows_of(chains(["fold"], [0.5], ["raw"]), net)
        both.append([(row.acc, row.loss, row.n) for row in rows])
    assert both[0] == both[1]


def test_a_label_says_how_a_method_is_compensated(monkeypatch):
    """Synthetic pictures are made once for each network; unlabelled ones are the training samples of repair."""
    made = []
    monkeypatch.setattr(
        pipeline.stages.stage,
        "made_pictures",
        lambda net, example, how, seed, _: made.append(seed) or PICTURES.tensors[0],
    )
    labels = ["fold", "fold+ar", "fold+synthetic", "l1+synthetic", "obs+data", "l1+grail", "l2+data+params", "l2+macs"]
    tree = chains(labels, [0.5], ["raw"], seed=3)
    assert tree.needs == {"calibration"}
    rows = rows_of(tree, build_model("resnet20", 4, 3), batches=[EVERYTHING])
    assert sides(rows) == {"fold": "fold"}
    assert [row.status for row in rows] == ["ok"] * 9, [row.reason for row in rows]
    assert [row.method for row in rows] == ["dense", *labels]
    assert made == [3]
    losses = [row.loss for row in rows]
    assert len(set(losses)) == len(losses), "each is another network"
    assert not chains(["fold", "fold+synthetic"], [0.5], ["raw"]).needs
    told = {row.method: (row.kind, row.calibration, row.sizes, row.statistics) for row in rows}
    assert told == {
        "dense": ("dense", None, None, None),
        "fold": ("fold", "none", "uniform", "none"),
        "fold+ar": ("fold", "none", "uniform", "weights"),
        "fold+synthetic": ("fold", "synthetic", "uniform", "synthetic"),
        "l1+synthetic": ("prune", "synthetic", "uniform", "synthetic"),
        "obs+data": ("prune", "data", "uniform", "data"),
        "l1+grail": ("prune", "data", "uniform", "none"),
        "l2+data+params": ("prune", "data", "params", "data"),
        "l2+macs": ("prune", "none", "macs", "none"),
    }


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (["lamp+data"], r"'lamp\+data', a mask of single weights, has no option 'pictures'; it takes: none"),
        (["n_m+filters"], r"'n_m\+filters', a mask of single weights, has no option 'units'; it takes: m"),
        ({"mine": {"method": "lamp", "parts": ["hidden"]}}, "'mine', a mask of single weights, has no option 'parts'"),
        (["l1+filters+neurons"], r"'l1\+filters\+neurons' says both units=filters and units=neurons; choose one"),
        ({"mine": {"method": "l1", "units": "filter"}}, r"unknown units 'filter' \(did you mean 'filters'\?\)"),
        (["taylor"], r"method 'taylor' needs pictures .*: taylor\+synthetic or taylor\+data"),
        (["fold+sythetic"], r"unknown addition to a method 'sythetic' \(did you mean 'synthetic'\?\)"),
        ({"mine": {"method": "fold", "pictures": "real"}}, "unknown pictures 'real'; choose from: .*data"),
    ],
)
def test_labels_that_make_no_sense_are_refused_at_once(methods, message):
    with pytest.raises(UserError, match=message):
        chains(methods, [0.5], ["raw"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": None}, r"methods must be a list, such as \[\.\.\.\], got None"),
        ({"methods": [{"method": "fold"}]}, "method {'method': 'fold'} must be a name"),
        ({"methods": {"mine": "fold"}}, "method 'mine' must say its options as {method: name, option: value}"),
        ({"ratios": ["a"]}, "ratio 'a' is no number"),
        ({"ratios": [None]}, "ratio None is no number"),
        ({"stages": [1]}, "stage 1 must be a name or a chain"),
        ({"stages": ["raw", {"tune": {"epochs": 2}}]}, "stage {'tune': {'epochs': 2}} must be a name or a chain"),
        ({"stages": ["tune(epochs=2.5)"]}, "tune: epochs 2.5 must be a whole number"),
        ({"stages": ["tune(lr=inf)"]}, "tune: lr inf must be greater than 0, and finite"),
        ({"methods": ["mix+data+size=1e2"]}, "size 100.0 must be a whole number of at least 1 picture"),
        ({"round_to": 2.5}, "round_to 2.5 must be a whole number of at least 1 channel"),
    ],
)
def test_values_of_another_type_get_one_clear_line(options, message):
    with pytest.raises(UserError, match=message) as caught:
        chains(**{"methods": ["fold"], "ratios": [0.5], **options})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["tune(lr=0.0001234567)", "tune(epochs=1234567)", "fold@0.1234567", "l1@0.5 > repair"])
def test_a_spelled_chain_is_read_back_to_the_last_digit(text):
    assert spell_chain(parse_chain(text)) == text


def test_masks_and_units_are_measured_beside_methods_of_channels():
    """Shared parts and round_to do not apply to masks. Their ratio counts weights, so no gap counts them."""
    methods = {"l1": {}, "fold": {}, "lamp": {}, "pattern": {"method": "n_m", "m": 8}, "l1+filters": {}}
    tree = chains(methods, [0.5], ["raw", "repaired", "norm_tuned"], round_to=2, parts=["hidden"])
    net = build_model("resnet18", 4, 3, width=4)
    rows = rows_of(tree, net, batches=[EVERYTHING])
    assert sides(rows) == {"l1": "prune", "fold": "fold"}
    assert [(row.status, row.reason) for row in rows] == [("ok", "")] * len(rows)
    assert [row.method for row in rows] == ["dense", *(label for label in methods for _ in range(3))]
    at = {(row.method, row.stage): row for row in rows}
    dense, lamp = rows[0], at["lamp", "raw"]
    assert lamp.macs == dense.macs > at["l1", "raw"].macs
    weights = sum(p.numel() for p in net.parameters() if p.dim() > 1)
    assert dense.params - lamp.params == round(weights / 2)
    assert 0 < lamp.error < 1
    assert at["l1+filters", "raw"].params == at["l1", "raw"].params, "all groups of this network are filters"
    assert len({at["lamp", stage].loss for stage in tree.stages}) == 3


def test_masks_alone_need_no_channels_but_units_some():
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    example = PICTURES.tensors[0][:1]
    masks = chains(["magnitude"], [0.5], ["raw", "repaired"])
    trace(masks, net, example, Classification(), Traces())
    assert [(row.method, row.status) for row in rows_of(masks, net)] == [("dense", "ok"), ("magnitude", "ok")]
    with pytest.raises(UserError, match="VisionTransformer has no groups of filters"):
        trace(chains(["l1+filters"], [0.5], ["raw"]), vit(), example, Classification(), Traces())


def test_a_name_that_protects_nothing_is_refused_before_anything_is_measured():
    with pytest.raises(UserError, match="protect: no group's name begins with 'layer9'"):
        trace(
            chains(["fold+protect=[layer9]"], [0.5]),
            build_model("resnet20", 4, 3),
            EVERYTHING[0][:1],
            Classification(),
            Traces(),
        )


def test_more_calibration_samples_than_there_are_is_no_number():
    with pytest.warns(RuntimeWarning, match="asks for more samples"):
        rows = rows_of(chains(["l1+data+size=12", "l1+data+size=13"], [0.5]), build_model("resnet20", 4, 3))
    assert [row.status for row in rows] == ["ok", "ok", "failed"]
    assert rows[2].reason == "size=13 asks for more samples than the 12 there are; raise repair_size="


def test_fidelity_is_foretold_where_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(pipeline.stages.stage, "made_pictures", lambda *_: PICTURES.tensors[0])
    net = build_model("resnet20", 4, 3)

    def rows(**options):
        return rows_of(chains(["mix", "auto"], [0.0, 0.5], ["raw", "repaired"], **options), net, batches=[EVERYTHING])

    assert all(row.fidelity is None for row in rows())
    found = {(row.method, row.ratio, row.stage): row for row in rows(predict=True)}
    assert all(row.status == "ok" for row in found.values())
    assert found["mix", 0.0, "raw"].fidelity == pytest.approx(1)
    assert found["mix", 0.5, "raw"].fidelity < 1
    assert found["auto", 0.5, "raw"].fidelity >= found["mix", 0.5, "raw"].fidelity


def test_repair_leaves_what_nothing_was_removed_of_as_it_was(monkeypatch):
    """This holds for any pictures; the reference statistics are merged in the method's own way."""
    net = build_model("resnet20", 4, 3)
    training = [(3 * PICTURES.tensors[0] + 1, PICTURES.tensors[1])]
    methods = {"mix": {"method": "mix"}, "lamp": {"method": "lamp"}, "apart": {"method": "fold", "norm_scale": False}}
    asked = []
    real = pipeline.stages.repair.reference

    def noting(*args):
        asked.append(args[4])
        return real(*args)

    monkeypatch.setattr(pipeline.stages.repair, "reference", noting)
    rows = rows_of(chains(methods, [0.0, 0.5], ["raw", "repaired"]), net, batches=[EVERYTHING], training=training)
    found = {(row.method, row.ratio, row.stage): row for row in rows}
    dense = found["dense", 0.0, "raw"].loss
    for label in methods:
        assert found[label, 0.0, "repaired"].loss == dense, label
        assert found[label, 0.5, "repaired"].loss != pytest.approx(dense, rel=1e-5), label
    assert asked == [True, True, True, True, False, False]


def test_what_a_stage_means_does_not_depend_on_which_others_were_asked_for():
    net = build_model("resnet20", 4, 3)
    rows = partial(rows_of, net=net, batches=[EVERYTHING])
    alone = {stage: rows(chains(["fold"], [0.5], [stage]))[-1] for stage in ("raw", "repaired", "norm_tuned", "tuned")}
    together = rows(chains(["fold"], [0.5], [*reversed(alone), "tune_norms"]))[1:]
    assert [row.stage for row in together] == [*alone, "tune_norms"]
    for row in together[:-1]:
        assert (row.loss, row.acc, row.chain) == (alone[row.stage].loss, alone[row.stage].acc, alone[row.stage].chain)
    assert alone["norm_tuned"].chain == "fold@0.5 > repair > tune_norms"
    assert together[-1].chain == "fold@0.5 > tune_norms"
    assert len({row.loss for row in together}) == 5, "each is another network"


def test_a_stage_that_a_network_has_nothing_for_gives_no_rows_or_is_refused():
    tree = chains(["l1"], [0.5], ["raw", "repaired", "norm_tuned"])
    assert [entry.stage for entry in tree.entries(vit())] == ["raw", "raw", "norm_tuned"]
    assert rows_of(tree, vit())[-1].chain == "l1@0.5 > tune_norms"
    with pytest.raises(UserError, match="repair cannot be done on VisionTransformer: no BatchNorm keeps statistics"):
        trace(chains(["l1"], [0.5], ["repair > tune"]), vit(), PICTURES.tensors[0][:1], Classification(), Traces())


def test_a_stage_that_fails_costs_its_rows_alone(monkeypatch):
    def broken(*args):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(pipeline.stages.repair, "repair_", broken)
    with pytest.warns(RuntimeWarning, match="out of luck"):
        rows = rows_of(chains(["l1"], [0.5], ["raw", "repaired", "norm_tuned"]), build_model("resnet20", 4, 3))
    assert [(row.stage, row.status) for row in rows] == [
        ("raw", "ok"), ("raw", "ok"), ("repaired", "failed"), ("norm_tuned", "failed"),
    ]  # fmt: skip
    assert {row.reason for row in rows[2:]} == {"RuntimeError: out of luck"}
    assert rows[2].params == rows[1].params, "what is known is said"


def test_a_batch_that_cannot_be_measured_fails_every_row():
    """A later batch, too, fails every row, so that no number stands beside it."""
    batches = [EVERYTHING, (PICTURES.tensors[0], PICTURES.tensors[1] + 1)]
    with pytest.warns(RuntimeWarning, match="label"):
        rows = rows_of(chains(["l1"], [0.5], ["raw"]), build_model("resnet20", 4, 3), batches=batches)
    assert [(row.status, row.acc, row.n) for row in rows] == [("failed", None, 0)] * 2


def test_every_split_has_its_rows():
    net, task = build_model("resnet20", 4, 3).eval(), None
    task = settle(net, Classification(), EVERYTHING)
    given = Inputs(PICTURES.tensors[0][:1], {"val": [EVERYTHING], "val/1": [tuple(t[:5] for t in EVERYTHING)]})
    rows = measure(net, chains(["l1"], [0.5]), Host(task, lambda: given, ("val", "val/1")), CONTEXT)
    assert [(row.split, row.method, row.n) for row in rows] == [
        ("val", "dense", 12), ("val", "l1", 12), ("val/1", "dense", 5), ("val/1", "l1", 5),
    ]  # fmt: skip


def test_a_file_is_named_without_what_file_systems_refuse():
    assert Entry("mix+data", 0.5, "repaired").file == "mix+data-r0.5-repaired.safetensors"
    assert "/" not in Entry("a/b", 0.5, "repair > tune(lr=0.1)").file
    assert ">" not in Entry("a/b", 0.5, "repair > tune(lr=0.1)").file


def test_no_two_labels_have_one_file():
    labels, stages = ("a/b", "a_b", "a>b", "a%2Fb", "\u00fc"), ("raw", "repair > tune", "repair_tune")
    files = {Entry(label, 0.5, stage).file for label in labels for stage in stages}
    assert len(files) == len(labels) * len(stages)
    assert Entry("a", 0.5, "repair>tune").file == Entry("a", 0.5, "repair > tune").file, "one chain"


def test_fidelity_that_cannot_be_foretold_costs_a_warning():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    inputs = torch.randn(8, 4), torch.arange(8) % 4
    tree = chains(["fold"], [0.5], ["raw"], predict=True)
    with pytest.warns(RuntimeWarning, match="fidelity cannot be foretold.*networks of pictures"):
        rows = rows_of(tree, net, batches=[inputs])
    assert [row.status for row in rows] == ["ok", "ok"]
    assert rows[1].fidelity is None


def test_a_row_is_about_the_last_compression_of_its_chain(monkeypatch):
    monkeypatch.setattr(pipeline.stages.stage, "made_pictures", lambda *_: PICTURES.tensors[0])
    net, stages = build_model("resnet20", 4, 3), ["raw", "repair", "l1@0.5", "mix+data@0.5 > repair"]
    rows = rows_of(chains(["l1"], [0.5], stages, predict=True), net, batches=[EVERYTHING])[1:]
    raw, repaired, twice, mixed = rows
    assert [row.status for row in rows] == ["ok"] * 4, [row.reason for row in rows]
    once = compress(net, PICTURES.tensors[0][:1], "l1", 0.5).model
    smaller, report = compress(once, PICTURES.tensors[0][:1], "l1", 0.5)
    assert twice.params == sum(p.numel() for p in smaller.parameters()) == mixed.params < raw.params
    assert (twice.macs, twice.error) == (report.macs_after, pytest.approx(report.error))
    assert raw.fidelity == repaired.fidelity
    assert len({row.fidelity for row in rows}) == 3
    told = [(row.kind, row.calibration, row.statistics) for row in rows]
    assert told == [("prune", "none", "none"), ("prune", "none", "data"), ("prune", "none", "none"),
                    ("prune", "data", "data")]  # fmt: skip


@pytest.mark.parametrize("stages", [["raw", "repaired", "norm_tuned"], ["l1@0.5 > repair"]])
def test_smaller_networks_are_in_memory_at_one_ratio_alone(stages, monkeypatch):
    """Those of the ratio before are gone when the next one is made."""
    module = importlib.import_module("pipeline.compression.compress")
    known: list[weakref.ref] = []
    alive: list[int] = []

    def noting(model, *args, **options):
        alive.append(sum(ref() is not None for ref in known))
        made = real(model, *args, **options)
        known.append(weakref.ref(made))
        return made

    real = module.apply
    monkeypatch.setattr(module, "apply", noting)
    net = build_model("resnet20", 4, 3)
    rows = rows_of(chains(["fold", "l1"], [0.3, 0.5, 0.7], stages), net, batches=[EVERYTHING])
    assert {row.status for row in rows} == {"ok"}
    again = any("@" in stage for stage in stages)
    assert alive == [0, 1] * 6 if again else alive == [0] * 6


BESIDE = {
    "sharpness": {"rho_linf": None, "hessian": False, "steps": 2},
    "corruptions": {"names": ["contrast", "gaussian_noise"], "mean": [0.5] * 3, "std": [0.3] * 3},
}


def test_sharpness_and_corruptions_are_columns_beside_the_same_metrics():
    net = build_model("resnet20", 4, 3)
    plain, more = (
        rows_of(chains(["fold"], [0.5], ["raw", "repaired"], **beside), net, batches=[EVERYTHING])
        for beside in ({}, BESIDE)
    )
    for row, other in zip(plain, more, strict=True):
        assert (row.sharpness_sam, row.sharpness_l2, row.corrupted) == (None, None, None)
        assert (row.acc, row.loss, row.n, row.params) == (other.acc, other.loss, other.n, other.params)
        assert other.sharpness_sam > 0
        assert other.sharpness_l2 > 0
        assert (other.sharpness_linf, other.hessian_top) == (None, None)
        assert 0 <= other.corrupted <= 1
    assert len({row.sharpness_sam for row in more}) == 3, "each is another network"


def test_the_column_of_corruptions_is_the_mean_over_them():
    net = build_model("resnet20", 4, 3)

    def value(names):
        asked = {**BESIDE["corruptions"], "names": names}
        return rows_of(chains(["l1"], [0.5], corruptions=asked), net, batches=[EVERYTHING])[1].corrupted

    both, *alone = map(value, (["jpeg", "contrast"], ["jpeg"], ["contrast"]))
    assert both == pytest.approx(sum(alone) / 2)


def test_what_cannot_be_measured_beside_costs_a_warning_and_no_row():
    tree = chains(["l1"], [0.5], sharpness=True, corruptions=["fog"])
    assert tree.needs == {"labels"}
    with pytest.warns(RuntimeWarning) as said:
        rows = rows_of(tree, build_model("resnet20", 4, 3), batches=[EVERYTHING], training=())
    assert [row.status for row in rows] == ["ok", "ok"]
    assert {row.corrupted for row in rows} | {row.hessian_top for row in rows} == {None}
    texts = " ".join(str(one.message) for one in said)
    assert "sharpness cannot be measured: sharpness is measured on training samples" in texts
    assert "corruptions cannot be measured: corruptions must know how pictures are normalised" in texts


@pytest.mark.parametrize(
    ("metric", "chance", "blind", "better", "told"),
    [
        ("acc", 0.1, 0.1, 0.11, "accuracy of 10.0% is no better than chance, 10.0%;"),
        ("perplexity", 512.0, 1.7e11, 511.0, r"perplexity of 1.7e\+11 is no better than chance, 512.0;"),
        ("perplexity", 512.0, float("nan"), 40.0, "perplexity of nan is"),
    ],
)
def test_an_uncompressed_network_that_knows_nothing_is_told(metric, chance, blind, better, told):
    def row(value, method="dense", **options):
        known = {"metric": metric, "chance": chance, metric: value, **options}
        return Row("", "", "digits", 0, 0, 0, method, 0.0, "raw", "test", **known)

    with pytest.warns(RuntimeWarning, match=f"^compression: the uncompressed network's {told}"):
        warn_where_blind([row(blind)], Once())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        silent = [row(better), row(blind, chance=None), row(None, status="failed"), row(blind, "fold")]
        warn_where_blind(silent, Once())
