"""What a measurement keeps and shares: traces by what is compressed, pictures where they fit."""

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pipeline.measure
from pipeline.compression import channel_groups, compress
from pipeline.measure import Inputs, Measurement, passes
from pipeline.models import build_model
from pipeline.tables import UserError

CONTEXT = {"cell": "c", "model": "m", "data": "d", "seed": 0, "epoch": 0, "step": 0, "split": "test"}
PICTURES = TensorDataset(torch.randn(12, 3, 8, 8), torch.arange(12) % 4)


def vit() -> nn.Module:
    return VisionTransformer(img_size=8, patch_size=4, embed_dim=16, depth=1, num_heads=2, num_classes=4).eval()


def rows_of(measurement: Measurement, net: nn.Module) -> list:
    loader = DataLoader(PICTURES, 5)
    inputs = Inputs(PICTURES.tensors[0][:1], passes(loader, tuple, PICTURES.tensors[0][:1]), [])
    return measurement.rows(net, lambda: inputs, CONTEXT)


def test_methods_with_parts_of_their_own_share_a_trace_of_the_same_parts(monkeypatch):
    traced = []

    def counting(net, example, parts):
        traced.append(parts)
        return real(net, example, parts)

    real = pipeline.measure.channel_groups
    monkeypatch.setattr(pipeline.measure, "channel_groups", counting)
    methods = {"mlp": {"method": "l2"}, "again": {"method": "l1"}, "heads": {"method": "l2", "parts": ["head"]}}
    measurement = Measurement(methods, [0.5], ["raw"], parts=["hidden"])
    assert not measurement.traced
    for net in (vit(), vit()):
        rows = rows_of(measurement, net)
        assert [row.status for row in rows] == ["ok"] * 4, [row.reason for row in rows]
        dense, mlp, again, heads = (row.params for row in rows)
        assert len({dense, mlp, heads}) == 3
        assert mlp == again
    assert traced == [("hidden",), ("head",)]
    assert measurement.traced
    measurement.trace(vit(), PICTURES.tensors[0][:1])
    assert len(traced) == 4, "another network may have another graph"


def test_fewer_heads_and_narrower_ones_are_traced_apart():
    """Their tensors have the same shapes, but channels of one are not those of the other."""
    example, measurement = PICTURES.tensors[0][:1], Measurement(["l1"], [0.5], ["raw"], parts=["width"])
    fewer, narrower = (compress(vit(), example, "l1", 0.5, parts=[part]).model for part in ("head", "width"))
    assert [t.shape for t in fewer.parameters()] == [t.shape for t in narrower.parameters()]
    for net in (fewer, narrower):
        found = measurement.groups("l1", net, example)
        assert [group.name for group in found] == [group.name for group in channel_groups(net, example, ["width"])]
    assert len(measurement.groups("l1", fewer, example)) < len(measurement.groups("l1", narrower, example))


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
        Measurement(methods, [0.5], ["raw"], parts=parts)


def test_pictures_are_kept_where_they_fit_and_streamed_where_not(monkeypatch):
    moved = []

    def move(batch):
        moved.append(len(batch[0]))
        return tuple(batch)

    loader, example = DataLoader(PICTURES, 5), PICTURES.tensors[0][:1]
    size = PICTURES.tensors[0].numel() * 4
    both = {}
    for kept in (True, False):
        monkeypatch.setattr(pipeline.measure, "KEPT", size if kept else size - 1)
        moved.clear()
        batches = passes(loader, move, example)
        both[kept] = [list(batches), list(batches)]
        assert moved == [5, 5, 2] * (1 if kept else 2)
    torch.testing.assert_close(both[True], both[False], rtol=0, atol=0)


def test_streamed_pictures_give_the_same_rows(monkeypatch):
    net = vit()
    kept = rows_of(Measurement(["fold"], [0.5], ["raw"]), net)
    monkeypatch.setattr(pipeline.measure, "KEPT", 0)
    streamed = rows_of(Measurement(["fold"], [0.5], ["raw"]), net)
    assert [(row.acc, row.loss, row.n) for row in kept] == [(row.acc, row.loss, row.n) for row in streamed]


def test_a_label_says_how_a_method_is_compensated(monkeypatch):
    """Synthetic pictures are made once a network; unlabelled ones are the training samples of repair."""
    made = []
    monkeypatch.setattr(
        pipeline.measure, "synthesize", lambda net, example, seed: made.append(seed) or PICTURES.tensors[0]
    )
    labels = ["fold", "fold+ar", "fold+synthetic", "l1+synthetic", "obs+data", "l1+grail", "l2+data+params", "l2+macs"]
    measurement = Measurement(labels, [0.5], ["raw"], seed=3)
    assert measurement.mends
    assert measurement.folds == {"fold": True}
    net = build_model("resnet20", 4, 3)
    mending = [tuple(PICTURES.tensors)]
    rows = measurement.rows(net, lambda: Inputs(PICTURES.tensors[0][:1], mending, mending), CONTEXT)
    assert [row.status for row in rows] == ["ok"] * 9, [row.reason for row in rows]
    assert [row.method for row in rows] == ["dense", *labels]
    assert made == [3]
    losses = [row.loss for row in rows]
    assert len(set(losses)) == len(losses), "each is another network"
    assert not Measurement(["fold", "fold+synthetic"], [0.5], ["raw"]).mends


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
        Measurement(methods, [0.5], ["raw"])


def test_masks_and_units_are_measured_beside_methods_of_channels():
    """Shared parts and round_to are not for masks; their ratio is no other method's, so no gap counts them."""
    methods = {"l1": {}, "fold": {}, "lamp": {}, "pattern": {"method": "n_m", "m": 8}, "l1+filters": {}}
    measurement = Measurement(methods, [0.5], ["raw", "repaired", "norm_tuned"], round_to=2, parts=["hidden"])
    assert measurement.folds == {"l1": False, "fold": True}
    net = build_model("resnet18", 4, 3, width=4)
    mending = [tuple(PICTURES.tensors)]
    measurement.trace(net, PICTURES.tensors[0][:1])
    rows = measurement.rows(net, lambda: Inputs(PICTURES.tensors[0][:1], mending, mending), CONTEXT)
    assert [(row.status, row.reason) for row in rows] == [("ok", "")] * len(rows)
    assert [row.method for row in rows] == ["dense", *(label for label in methods for _ in range(3))]
    at = {(row.method, row.stage): row for row in rows}
    dense, lamp = rows[0], at["lamp", "raw"]
    assert lamp.macs == dense.macs > at["l1", "raw"].macs
    weights = sum(p.numel() for p in net.parameters() if p.dim() > 1)
    assert dense.params - lamp.params == round(weights / 2)
    assert 0 < lamp.error < 1
    assert at["l1+filters", "raw"].params == at["l1", "raw"].params, "all groups of this network are filters"
    assert len({at["lamp", stage].loss for stage in measurement.stages}) == 3


def test_masks_alone_need_no_channels_but_units_some():
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    example = PICTURES.tensors[0][:1]
    masks = Measurement(["magnitude"], [0.5], ["raw", "repaired"])
    masks.trace(net, example)
    assert [(row.method, row.status) for row in rows_of(masks, net)] == [("dense", "ok"), ("magnitude", "ok")]
    with pytest.raises(UserError, match="VisionTransformer has no groups of filters"):
        Measurement(["l1+filters"], [0.5], ["raw"]).trace(vit(), example)


def test_fidelity_is_foretold_where_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(pipeline.measure, "synthesize", lambda net, example, seed: PICTURES.tensors[0])
    net = build_model("resnet20", 4, 3)
    mending = [tuple(PICTURES.tensors)]

    def rows(**options):
        measurement = Measurement(["mix", "auto"], [0.0, 0.5], ["raw", "repaired"], **options)
        return measurement.rows(net, lambda: Inputs(PICTURES.tensors[0][:1], mending, mending), CONTEXT)

    assert all(row.fidelity is None for row in rows())
    found = {(row.method, row.ratio, row.stage): row for row in rows(predict=True)}
    assert all(row.status == "ok" for row in found.values())
    assert found["mix", 0.0, "raw"].fidelity == pytest.approx(1)
    assert found["mix", 0.5, "raw"].fidelity < 1
    assert found["auto", 0.5, "raw"].fidelity >= found["mix", 0.5, "raw"].fidelity


def test_repair_leaves_what_nothing_was_removed_of_as_it_was():
    """Whatever the pictures are like; and a method's own way of merging is that of its reference."""
    net = build_model("resnet20", 4, 3)
    mending = [(3 * PICTURES.tensors[0] + 1, PICTURES.tensors[1])]
    methods = {"mix": {"method": "mix"}, "lamp": {"method": "lamp"}, "apart": {"method": "fold", "norm_scale": False}}
    measurement = Measurement(methods, [0.0, 0.5], ["raw", "repaired"])
    given = Inputs(PICTURES.tensors[0][:1], [tuple(PICTURES.tensors)], mending)
    found = {(row.method, row.ratio, row.stage): row for row in measurement.rows(net, lambda: given, CONTEXT)}
    dense = found["dense", 0.0, "raw"].loss
    for label in methods:
        assert found[label, 0.0, "repaired"].loss == pytest.approx(dense, rel=1e-5), label
        assert found[label, 0.5, "repaired"].loss != pytest.approx(dense, rel=1e-5), label
    asked = []
    real = pipeline.measure.reference

    def noting(*args):
        asked.append(args[4] if len(args) > 2 else None)
        return real(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.measure, "reference", noting)
        measurement.rows(net, lambda: given, CONTEXT)
    assert asked == [True, True, None, None, False, False]


def test_fidelity_that_cannot_be_foretold_costs_a_warning():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    inputs = torch.randn(8, 4), torch.arange(8) % 4
    measurement = Measurement(["fold"], [0.5], ["raw"], predict=True)
    with pytest.warns(RuntimeWarning, match="fidelity cannot be foretold.*networks of pictures"):
        rows = measurement.rows(net, lambda: Inputs(inputs[0][:1], [inputs], []), CONTEXT)
    assert [row.status for row in rows] == ["ok", "ok"]
    assert rows[1].fidelity is None
