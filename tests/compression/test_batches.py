"""Data in batches, however it is cut, gives the same results as all of it at once."""

import copy
import threading
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from toy_nets import NETS, Net, picture, pruned, randomise_

from pipeline.compression import Plan, channel_groups, compress
from pipeline.compression.calibrate import outputs
from pipeline.compression.calibrate.batches import SAMPLES, TOKENS, VALUES, Batches, batches_of
from pipeline.compression.calibrate.compensate import compensate_, observe
from pipeline.compression.calibrate.outputs import Outputs
from pipeline.compression.calibrate.predict import judge
from pipeline.compression.calibrate.repair import reference, repair_, statistics
from pipeline.compression.calibrate.rows import ROWS
from pipeline.compression.choose.gradients import Gradients
from pipeline.compression.merge.modules import apply
from pipeline.tables import UserError

UNEVEN = [1, 4, 13, 2, 10]


def linear():
    return nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 4))


KINDS = {
    "resnet18": NETS["resnet18"][0],
    "mobile": NETS["mobile"][0],
    "vit": NETS["vit"][0],
    "linear": linear,
}


def data(kind, count=30, dtype=torch.float32):
    shape = {"vit": (3, 16, 16), "linear": (8,)}.get(kind, (3, 8, 8))
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def compensated(model, groups, pictures, rows=ROWS, **options):
    projections = pruned(groups)
    smaller = apply(model, groups, projections)
    compensate_(smaller, model, Plan(groups, projections), observe(model, groups, pictures, rows), **options)
    return smaller.state_dict()


def distance(found, wanted):
    """The largest relative difference between two dicts of tensors."""
    floats = [name for name, t in wanted.items() if t.is_floating_point()]
    return max(float((found[n] - wanted[n]).norm() / wanted[n].norm().clamp(min=1e-6)) for n in floats)


def test_an_example_is_one_batch_and_large_ones_are_cut():
    x, mask = torch.randn(2 * SAMPLES + 6, 3), torch.ones(3, 3)
    for given in (x, (x, mask), {"x": x, "mask": mask}):
        batches = batches_of(given)
        assert batches.count == len(x)
        assert [one.samples for one in batches.outlines] == [SAMPLES, SAMPLES, 6]
        assert batches_of(batches) is batches
    assert [batch["mask"].shape for batch in batches] == [(3, 3)] * 3
    assert torch.equal(torch.cat([batch["x"] for batch in batches]), x)
    assert [len(batch) for batch in batches_of(torch.zeros(5, VALUES // 2))] == [2, 2, 1]
    tokens = torch.zeros(8, TOKENS // 4, dtype=torch.long)
    assert [len(batch) for batch in batches_of([tokens, tokens[:3]])] == [4, 4, 3]


@pytest.mark.parametrize(
    ("pictures", "message"),
    [
        ([], "pictures hold no samples"),
        (torch.zeros(0, 3), "pictures hold no samples"),
        ((x for x in [torch.ones(1)]), r"a generator can be read once: give list\(...\) of it"),
        ([[torch.ones(2, 3)]], "a batch of pictures is a list: give what the network is called with"),
        (["a"], "a batch of pictures is a str"),
        (3, "must be network inputs or batches of them, got int"),
    ],
)
def test_what_is_no_batches_is_refused(pictures, message):
    with pytest.raises(UserError, match=message):
        batches_of(pictures)


def test_data_that_changes_between_passes_is_refused():
    class Noise:
        def __iter__(self):
            return iter([torch.randn(4, 8)])

    model = randomise_(linear())
    with pytest.raises(UserError, match=r"not the same in every pass .*shuffle=False"):
        compress(model, torch.zeros(1, 8), "l2", 0.5, pictures=Noise())


@pytest.mark.parametrize(("dtype", "limit", "solved"), [(torch.float32, 1e-5, 5e-4), (torch.float64, 1e-10, 1e-10)])
@pytest.mark.parametrize("kind", KINDS)
def test_uneven_batches_say_what_one_does(kind, dtype, limit, solved):
    """In float32 solved readers differ from those of one batch as these do from float64: by up to 2e-4."""
    model, x = randomise_(KINDS[kind]()).to(dtype), data(kind, dtype=dtype)
    groups = channel_groups(model, x[:1])
    whole, parts = observe(model, groups, x), observe(model, groups, list(x.split(UNEVEN)))
    for name in ("inputs", "outputs", "statistics"):
        found, wanted = getattr(parts, name), getattr(whole, name)
        assert found.keys() == wanted.keys()
        assert not wanted or distance(found, wanted) < limit
    assert distance(*(compensated(model, groups, seen.pictures) for seen in (parts, whole))) < solved


@pytest.mark.parametrize("target", ["mend", "dense"])
def test_a_bounded_number_of_rows_is_that_of_one_batch(target):
    """There are more pixels than rows to keep: the same ones are drawn, whichever batch they are in."""
    model, x = randomise_(KINDS["resnet18"]()).double(), data("resnet18", dtype=torch.float64)
    groups = channel_groups(model, x[:1])
    seen = observe(model, groups, list(x.split(UNEVEN)), rows=300)
    assert max(len(rows) for rows in seen.inputs.values()) == 300
    states = [compensated(model, groups, given, rows=300, target=target) for given in (seen.pictures, x)]
    assert distance(*states) < 1e-8


def test_texts_of_several_lengths_are_rows_of_one():
    model, x = randomise_(linear()).double(), data("linear", 44, torch.float64)
    groups = channel_groups(model, x[:1])
    lengths = [(2, 6), (1, 4), (4, 6), (2, 2)]
    cut = [part.reshape(n, t, 8) for part, (n, t) in zip(x.split([n * t for n, t in lengths]), lengths, strict=True)]
    assert distance(compensated(model, groups, cut), compensated(model, groups, x[None])) < 1e-10


def test_layers_that_see_the_same_in_every_batch():
    """A position bias has rows of its own, as many for one sample as for many (Swin V2)."""

    def forward(net, x):
        return net.head(F.relu(net.stem(x)) + net.b(F.relu(net.a(net.places))).sum())

    parts = {"stem": nn.Linear(8, 6), "a": nn.Linear(2, 10), "b": nn.Linear(10, 1), "head": nn.Linear(6, 4)}
    model = Net(forward, **parts)
    model.register_buffer("places", torch.randn(9, 2))
    model, x = randomise_(model).double(), data("linear", dtype=torch.float64)
    groups = channel_groups(model, x[:1])
    assert any(axis.tensor == "b.weight" for group in groups for axis in group.reads)
    states = [compensated(model, groups, given) for given in (list(x.split(UNEVEN)), x)]
    assert distance(*states) < 1e-8


@pytest.mark.parametrize("parts", [1, 3])
def test_inputs_are_those_of_the_call_though_the_forward_changes_them_in_place_behind_it(parts):
    def forward(net, x):
        hidden = net.up(x).relu()
        hidden.mul_(net.gate(hidden).sigmoid())
        return net.down(hidden)

    model = randomise_(Net(forward, up=nn.Linear(8, 12), gate=nn.Linear(12, 1), down=nn.Linear(12, 4))).eval()
    x = data("linear")
    seen = observe(model, channel_groups(model, x[:1]), list(x.chunk(parts)))
    assert distance(seen.inputs, {"gate.weight": model.up(x).relu().detach()}) < 1e-5


@pytest.mark.parametrize("method", ["mix", "obs", "taylor", "fisher", "auto"])
def test_methods_look_at_all_batches(method):
    model, x = randomise_(KINDS["resnet18"]()).eval(), data("resnet18", 40)
    groups = channel_groups(model, x[:1])
    loader = DataLoader(TensorDataset(x), 7, collate_fn=lambda rows: torch.stack([row for (row,) in rows]))
    found, wanted = (compress(model, x[:1], method, 0.5, groups=groups, pictures=given) for given in (loader, x))
    for one, other in zip(found.report.groups, wanted.report.groups, strict=True):
        assert torch.equal(one.labels, other.labels)
    assert distance(found.model.state_dict(), wanted.model.state_dict()) < 5e-4


@pytest.mark.parametrize("method", ["mix", "fold"])
@pytest.mark.parametrize("kind", ["resnet18", "mobile"])
def test_where_nothing_is_removed_nothing_changes_to_the_bit(kind, method):
    model, x = randomise_(KINDS[kind]()), 3 * data(kind) + 1
    smaller, _ = compress(model, x[:1], method, 0.0, pictures=list(x.split(UNEVEN)))
    same = copy.deepcopy(model)
    repair_(same, x.split(10), reference(model, statistics(model, x.split(10))))
    for net in (smaller, same):
        assert all(torch.equal(t, model.state_dict()[name]) for name, t in net.state_dict().items())


@pytest.mark.parametrize("cut", [30, 7])
def test_norms_before_all_that_is_compressed_stay_to_the_bit(cut):
    model = randomise_(
        nn.Sequential(
            nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(24, 4),
        )
    )  # fmt: skip
    x = 3 * data("resnet18") + 1
    smaller, report = compress(model, x[:1], "fold", 0.5, protect=["0"], pictures=list(x.split(cut)))
    old, new = model.state_dict(), smaller.state_dict()
    assert [group.after for group in report.groups] == [5, 4, 3]
    assert torch.equal(new["1.running_mean"], old["1.running_mean"])
    assert torch.equal(new["1.running_var"], old["1.running_var"])


def notes_of_state(model, notes):
    def note(layer, given):
        if threading.current_thread() is not threading.main_thread():
            notes.append((torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled(), torch.is_grad_enabled()))

    model.register_forward_pre_hook(note)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_threads_compute_as_the_caller_does(mode):
    model, x = randomise_(linear()), data("linear")
    groups, notes = channel_groups(model, x[:1]), []
    projections = pruned(groups)
    smaller = apply(model, groups, projections)
    with mode(), torch.autocast("cpu", torch.bfloat16):
        seen = observe(model, groups, list(x.split(UNEVEN)))
        notes_of_state(smaller[0], notes)
        compensate_(smaller, model, Plan(groups, projections), seen)
    assert set(notes) == {(True, mode is torch.inference_mode, False)}
    assert len(notes) == len(UNEVEN)


def test_an_error_in_one_batch_ends_all():
    model, x = randomise_(linear()).train(), data("linear")
    groups = channel_groups(model, x[:1])
    projections, seen = pruned(groups), observe(model, groups, list(x.split(UNEVEN)))
    smaller, before = apply(model, groups, projections), threading.active_count()

    def fail(layer, given):
        if len(given[0]) == UNEVEN[2]:
            raise KeyError("this one")

    smaller[2].register_forward_hook(lambda layer, given, output: fail(layer, given))
    with pytest.raises(KeyError, match="this one"):
        compensate_(smaller, model, Plan(groups, projections), seen)
    assert threading.active_count() == before
    assert all(module.training for module in smaller.modules())
    assert not smaller[0]._forward_pre_hooks


def test_a_forward_that_calls_layers_as_its_input_says_is_refused():
    def forward(net, x):
        for layer in (net.a, net.b, net.c) if x[0, 0] < 9 else (net.a, net.c, net.b):
            x = F.relu(layer(x))
        return x

    parts = {name: nn.Linear(8, 8) for name in "abc"}
    model, x = randomise_(Net(forward, **parts)), data("linear", 8)
    groups = channel_groups(nn.Sequential(OrderedDict(parts)), x[:1])
    other = x.clone()
    other[0, 0] = 10
    with pytest.raises(UserError, match=r"the forward calls .* where other batches call .*in one order"):
        observe(model, groups, [x, other])


def test_a_head_that_nothing_waits_for_is_computed_for_a_few_samples_alone():
    model, sizes = randomise_(linear()), []
    x = data("linear", 64)
    groups = channel_groups(model, x[:1])
    groups = [g for g in groups if any(axis.tensor == "2.weight" for axis in g.reads)]
    model[4].register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    observe(model, groups, x)
    assert sizes
    assert max(sizes) <= 3


def text(classes=5):
    return nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, classes))


def tokens(output):
    return output.flatten(0, 1)


def test_a_token_counts_as_a_picture_does():
    model, x = randomise_(text()), torch.randn(6, 7, 8)
    other = randomise_(text(), seed=1)
    with pytest.raises(UserError, match=r"puts out \(6, 7, 5\): say answers=: which part of the output are the"):
        judge(model, x)
    judged = judge(model, x, tokens)(other)
    assert judged == pytest.approx(judge(model, x.flatten(0, 1))(other))
    assert judged == pytest.approx(judge(model, list(x.split([1, 3, 2])), tokens)(other))
    with pytest.raises(UserError, match=r"answers= must return a tensor \(rows, classes\), got \(6, 7, 5\)"):
        Outputs(model, x, lambda output: output)
    for allocate in ("uniform", "macs"):
        options = {"pictures": x, "answers": tokens, "candidates": ["l2", "mix"], "allocate": allocate}
        assert compress(model, x[:1], "auto", 0.5, **options).report.method.startswith("auto (")


def test_of_many_outputs_the_same_rows_of_every_network_are_kept(monkeypatch):
    model, other, x = randomise_(text()), randomise_(text(), seed=1), torch.randn(40, 30, 8)
    whole = judge(model, x, tokens)(other)
    monkeypatch.setattr(outputs, "VALUES", 2000)
    some = Outputs(model, x, tokens)
    assert 1800 < sum(rows.numel() for rows in some.kept) <= 2000
    assert all(torch.equal(given, wanted) for given, wanted in some.beside(model))
    assert judge(model, x, tokens)(other) == pytest.approx(whole, abs=0.1)


def test_gradients_of_a_text_are_those_of_all_its_tokens(monkeypatch):
    """Each token draws a label: the gradient of a text is the sum over its tokens."""
    monkeypatch.setattr(torch, "multinomial", lambda p, count, generator: p.argmin(1, keepdim=True))
    model, x = randomise_(text()).double(), torch.randn(3, 7, 8, dtype=torch.float64)
    groups = channel_groups(model, x[:1])
    for pictures in (x, list(x.split([1, 2]))):
        found = Gradients(model, groups, pictures, answers=tokens).gates
        each = Gradients(model, groups, x.flatten(0, 1)).gates
        for read, gates in found.items():
            torch.testing.assert_close(gates, each[read].unflatten(0, (3, 7)).sum(1))
    with pytest.raises(UserError, match=r"got \(1, 7, 5\): say answers="):
        Gradients(model, groups, x).gates  # noqa: B018


def test_statistics_of_batches_of_any_form():
    model, x = randomise_(NETS["vgg"][0]()), picture(batch=8)

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = model

        def forward(self, pixels):
            return self.net(pixels)

    wanted = statistics(Named(), x.split(4))
    for form in (lambda part: (part,), lambda part: {"pixels": part}):
        found = statistics(Named(), map(form, x.split(4)))
        assert all(torch.equal(found[name], t) for name, t in wanted.items())


def test_batches_know_their_number():
    batches = Batches([torch.ones(3, 2), (torch.ones(2, 2),)])
    assert len(batches) == 2
    assert batches.count == 5
