"""Pictures make up for what compression takes away: readers and statistics that follow, and methods that look."""

from functools import cache

import pytest
import torch
from timm.layers import Conv2dSame
from torch import nn
from toy_nets import NETS, duplicated, pruned, randomise_, relative_error

from pipeline.compression import METHODS, Plan, Projection, channel_groups, compress, synthesize
from pipeline.compression.calibrate import synthetic
from pipeline.compression.calibrate.compensate import compensate_, matrix, observe
from pipeline.compression.calibrate.rows import sees_patches
from pipeline.compression.choose.cluster import fold_labels, kept_energy, mixed_labels, surgeon_order
from pipeline.compression.choose.weights import GroupWeights
from pipeline.compression.merge.modules import apply, named_tensors
from pipeline.compression.merge.tensors import compressed_tensors
from pipeline.models import build_model
from pipeline.tables import UserError


def compensated(model, groups, projections, pictures, **options):
    smaller = apply(model, groups, projections)
    solved = compensate_(smaller, model, Plan(groups, projections), observe(model, groups, pictures), **options)
    return smaller, solved


def test_channels_that_are_sums_of_others_are_not_missed():
    model = randomise_(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))).double()
    with torch.no_grad():
        for tensor in (model[0].weight, model[0].bias):
            tensor[2] = 2 * tensor[0] - tensor[1]
    x = torch.randn(50, 4, dtype=torch.float64)
    groups, labels = channel_groups(model, x), Projection(torch.tensor([0, 1, -1]))
    smaller, solved = compensated(model, groups, [labels], x, ridge=1e-14)
    assert solved == ["1.weight"]
    assert smaller[1].weight.shape == (2, 2)
    with torch.no_grad():
        assert relative_error(model(x), smaller(x)) < 1e-10
        assert relative_error(model(x), apply(model, groups, [labels])(x)) > 0.1


@pytest.mark.parametrize("name", [name for name, (_, example) in NETS.items() if example.is_floating_point()])
def test_what_was_lossless_stays_so(name):
    """Duplicates fold without loss: readers and statistics come out as before, on pictures unlike those of training."""
    model, example, groups, projections = duplicated(name)
    pictures = torch.randn(32, *example.shape[1:]).to(example)
    smaller, _ = compensated(model, groups, projections, pictures, ridge=1e-9)
    with torch.no_grad():
        assert relative_error(model(pictures), smaller(pictures)) < 1e-3


@pytest.mark.parametrize("fold", [True, False])
def test_every_reader_is_the_least_squares_solution(fold):
    """The residual of a reader's output is orthogonal to its inputs: the normal equations, tap by tap."""
    model = randomise_(build_model("resnet18", 10, 3, width=4)).double()
    pictures = torch.randn(32, 3, 16, 16, dtype=torch.float64)
    groups, tensors = channel_groups(model, pictures[:1]), {n: t.detach() for n, t in named_tensors(model).items()}
    weights = [GroupWeights(g, tensors) for g in groups]
    projections = (
        [METHODS["fold"](w, [w.group.size // 2])[w.group.size // 2] for w in weights] if fold else pruned(groups)
    )
    smaller, solved = compensated(model, groups, projections, pictures, ridge=1e-12)
    assert {"linear.weight", "layer2.0.shortcut.0.weight", "layer4.1.conv2.weight"} <= set(solved)
    written = {**tensors, **compressed_tensors(tensors, groups, projections, reads=False)}
    before, after = (inputs_of(net, solved, pictures) for net in (model, smaller))

    def left(weights, name):
        """The error of a reader's output and the error's product with its inputs, both relative to the output."""
        wanted = before[name] @ matrix(written[name], 1, taps=True)
        rest = wanted - after[name] @ matrix(weights[name], 1, taps=True)
        product = (after[name].T @ rest).norm() / after[name].norm() / wanted.norm()
        return float(rest.norm() / wanted.norm()), float(product)

    plain = apply(model, groups, projections).state_dict()
    for name in solved:
        error, product = left(smaller.state_dict(), name)
        assert product < 1e-6, name
        assert error < left(plain, name)[0], name


@torch.no_grad()
def inputs_of(model, weights, pictures):
    """{weight: (rows, inputs x taps)}, the inputs of its layer, by torch's own unfold; no more than ROWS."""
    found = {}

    def keep(name):
        def hook(layer, given):
            x = given[0]
            if x.dim() == 4:
                x = torch.nn.functional.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
                x = x.movedim(1, 2).flatten(0, 1)
            found[name] = x

        return hook

    handles = [model.get_submodule(n.rpartition(".")[0]).register_forward_pre_hook(keep(n)) for n in weights]
    model.eval()(pictures)
    for handle in handles:
        handle.remove()
    return found


CONVOLUTIONS = {
    "1d": (nn.Conv1d(4, 3, 3, stride=2, padding=1), (6, 4, 9)),
    "same": (nn.Conv2d(4, 3, (5, 3), padding="same", dilation=(2, 1)), (6, 4, 7, 8)),
    "reflect": (nn.Conv2d(4, 3, 3, padding=1, padding_mode="reflect"), (6, 4, 5, 5)),
    "strided": (nn.Conv2d(4, 3, 1, stride=2), (6, 4, 5, 6)),
    "3d": (nn.Conv3d(4, 3, (1, 3, 2), padding=(0, 1, 0)), (4, 4, 3, 4, 5)),
    "transposed": (nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1), (6, 4, 3, 3)),
    "circular": (nn.Conv2d(4, 3, (2, 3), padding=1, padding_mode="circular"), (6, 4, 4, 5)),
    "pointwise": (nn.Conv2d(4, 3, 1), (6, 4, 3, 3)),
    "padded within": (Conv2dSame(4, 3, 3, stride=2), (6, 4, 2, 2)),
}
PIXELS = ("transposed", "pointwise", "padded within")  # convolutions that are solved for one factor a channel


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_every_kind_of_convolution_is_solved(kind):
    """A channel that is a weighted sum of two others at every pixel is dropped: its reader can restore everything.

    The outputs in `Seen` are those of the layer, less its bias, in their order where all of them are kept.
    """
    conv, shape = CONVOLUTIONS[kind]
    first = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[len(shape)](shape[1], 4, 1)
    model = randomise_(nn.Sequential(first, conv)).double()
    with torch.no_grad():
        for tensor in (first.weight, first.bias):
            tensor[2] = 2 * tensor[0] - tensor[1]
    x = torch.randn(shape, dtype=torch.float64)
    groups = channel_groups(model, x[:1])
    smaller, solved = compensated(model, groups, [Projection(torch.tensor([0, 1, -1, 2]))], x, ridge=1e-14)
    assert solved == ["1.weight"]
    assert sees_patches(conv) == (kind not in PIXELS)
    with torch.no_grad():
        outputs = (model(x) - conv.bias.view(-1, *[1] * (len(shape) - 2))).movedim(1, -1).flatten(0, -2)
        for seen in observe(model, groups, x).outputs.values():
            torch.testing.assert_close(seen.T, outputs)
        assert relative_error(model(x), smaller(x)) < 1e-9


def test_neighbours_tell_what_the_pixel_does_not():
    """A dropped channel that equals another one, a pixel further on, costs nothing if the reader sees both pixels."""
    model = nn.Sequential(nn.Conv2d(1, 2, (1, 3), padding=(0, 1), bias=False), nn.Conv2d(2, 2, (1, 5), bias=False))
    model = randomise_(model).double()
    with torch.no_grad():
        model[0].weight[:] = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]).view(2, 1, 1, 3)
        model[1].weight[..., [0, 4]] = 0
    x = torch.randn(20, 1, 4, 12, dtype=torch.float64)
    groups = channel_groups(model, x[:1])
    smaller, _ = compensated(model, groups, [Projection(torch.tensor([0, -1]))], x, ridge=1e-14)
    with torch.no_grad():
        assert relative_error(model(x), smaller(x)) < 1e-9


def test_statistics_follow_what_the_smaller_network_computes():
    """On noise of another spread than the training pictures, statistics change as compression changed them there."""
    model = randomise_(build_model("resnet20", 10, 3))
    pictures = 3 * torch.randn(64, 3, 16, 16)
    groups = channel_groups(model, pictures[:1])
    same = [Projection(torch.arange(g.size)) for g in groups]
    smaller, solved = compensated(model, groups, same, pictures)
    assert not solved
    for (name, old), (_, new) in zip(model.named_buffers(), smaller.named_buffers(), strict=True):
        torch.testing.assert_close(new, old, msg=name)
    smaller, _ = compensated(model, groups, pruned(groups), pictures)
    norm = "layer1.0.bn2.running_var"
    assert not torch.allclose(smaller.state_dict()[norm], model.state_dict()[norm])


def test_compensation_brings_back_accuracy(trained):
    """For every method the outputs come nearer, on pictures that were not used to solve readers."""
    generator = torch.Generator().manual_seed(0)
    pictures, others = (torch.randn(200, 3, 8, 8, generator=generator) for _ in range(2))
    for method in ("fold", "mix", "l2", "obs"):
        plain, _ = compress(trained, pictures[:1], method, 0.5)
        better, report = compress(trained, pictures[:1], method, 0.5, pictures=pictures)
        assert report.params_after == sum(p.numel() for p in plain.parameters())
        with torch.no_grad():
            wanted = trained(others)
            assert relative_error(wanted, better(others)) < 0.9 * relative_error(wanted, plain(others)), method


@cache
def traced(name):
    build, example = NETS[name]
    model = randomise_(build()).eval()
    return model, example, channel_groups(model, example)


@pytest.mark.parametrize(
    ("method", "seen"), [(m, seen) for m in METHODS for seen in (False, True) if seen or not METHODS[m].gradients]
)
def test_every_method_on_every_kind_of_network(method, seen):
    for name in ("resnet18", "vit", "mobile", "shuffled"):
        model, example, groups = traced(name)
        pictures = torch.randn(16, *example.shape[1:]) if seen else None
        smaller, report = compress(model, example, method, 0.5, groups=groups, pictures=pictures)
        for row in report.groups:
            assert row.after == max(1, int(row.before * 0.5 + 1e-9)) == len(row.labels[row.labels >= 0].unique())
            merges = bool(torch.bincount(row.labels[row.labels >= 0]).max() > 1)
            assert not merges or METHODS[method].kind != "prune"
            assert not (row.labels < 0).any() or METHODS[method].kind == "prune" or method == "mix"
        again, _ = compress(model, example, method, 0.5, groups=groups, pictures=pictures)
        with torch.no_grad():
            assert torch.equal(smaller(example), again(example))


def test_mix_is_never_worse_than_folding_or_pruning():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(30, 8, generator=generator).double()
    rows[:10] *= 0.1
    rows[10:20] += rows[10] * 2
    gram = (rows @ rows.T).numpy()
    sizes = [1, 5, 12, 29, 30]
    mixed, folded = mixed_labels(gram, sizes), fold_labels(gram, sizes)
    strictly = 0
    for k in sizes:
        kept = sorted(gram.diagonal())[::-1][:k]
        energy = kept_energy(gram, mixed[k])
        assert len(set(mixed[k]) - {-1}) == k
        assert energy >= max(kept_energy(gram, folded[k]), sum(kept)) * (1 - 1e-12)
        strictly += energy > 1.0001 * max(kept_energy(gram, folded[k]), sum(kept))
    assert strictly >= 2


def test_the_brain_surgeon_drops_what_is_missed_least():
    """The reference solves the readers of every candidate from scratch."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(100, 6, generator=generator).double() @ torch.randn(6, 6, generator=generator).double()
    v = torch.randn(4, 6, generator=generator).double()
    moments = (a.T @ a / 100).numpy()
    order = surgeon_order(moments, (v.T @ v).numpy())
    assert sorted(order) == list(range(6))

    def loss(kept):
        solved = torch.linalg.lstsq(a[:, kept], a @ v.T).solution
        return float((a[:, kept] @ solved - a @ v.T).square().sum())

    left = list(range(6))
    for q in order[:-1]:
        best = min(left, key=lambda c: loss([i for i in left if i != c]))
        assert q == best
        left.remove(q)


def test_synthetic_pictures_have_the_statistics_that_the_network_knows():
    model = randomise_(build_model("resnet20", 10, 3))
    for _ in range(5):  # statistics of pictures that are not noise
        model.train()(torch.rand(64, 3, 16, 16) * 2 + 1)
    model.eval()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    example = torch.zeros(1, 3, 16, 16)
    noise, pictures = (synthesize(model, example, 32, steps) for steps in (0, 30))
    assert pictures.shape == noise.shape == (32, 3, 16, 16)
    assert not pictures.requires_grad
    assert torch.equal(pictures, synthesize(model, example, 32, 30))
    assert not torch.equal(pictures, synthesize(model, example, 32, 30, seed=1))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())

    def mismatch(x):
        seen = observe(model, [], x).statistics
        return sum(float((seen[n] / model.state_dict()[n]).log().abs().mean()) for n in seen if n.endswith("var"))

    assert mismatch(pictures) < 0.7 * mismatch(noise)


def test_synthetic_pictures_are_made_in_batches_so_that_memory_does_not_grow_with_their_number(monkeypatch):
    monkeypatch.setattr(synthetic, "BATCH", 16)
    sizes = set()

    class Watched(nn.Conv2d):
        def forward(self, x):
            sizes.add(len(x))
            return super().forward(x)

    model = nn.Sequential(Watched(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    model.train()(torch.rand(64, 3, 8, 8) + 1)
    sizes.clear()
    pictures = synthesize(model, torch.zeros(1, 3, 8, 8), 40, 3)
    assert len(pictures) == 40
    assert sizes == {16, 8}
    assert torch.equal(pictures[:16], synthesize(model, torch.zeros(1, 3, 8, 8), 16, 3))  # the first stay the same
    assert not torch.equal(pictures[:16], pictures[16:32])
    sizes.clear()
    assert (
        synthesize(nn.Sequential(model, nn.AvgPool2d(4), nn.BatchNorm2d(4)), torch.zeros(1, 3, 8, 8), 17, 3)
        .isfinite()
        .all()
    )
    assert sizes == {17}, "one picture of one pixel has no variance"


def test_networks_without_statistics_get_noise_and_tokens_an_error():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    pictures = synthesize(model, torch.zeros(1, 3, 4, 4), 500)
    assert pictures.mean().abs() < 0.05
    assert abs(pictures.std() - 1) < 1e-3
    with pytest.raises(UserError, match="pass unlabelled data"):
        synthesize(model, torch.zeros(1, 8, dtype=torch.long))


def test_a_wrong_word_for_what_readers_are_solved_for_is_refused():
    model, x = randomise_(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))), torch.randn(5, 4)
    for ridge in (None, 1e-3):
        with pytest.raises(UserError, match=r"unknown target 'dens'.*choose from: dense, mend, same"):
            compress(model, x, "l1", 0.5, pictures=x, target="dens", ridge=ridge)


@pytest.mark.gpu
def test_on_a_gpu_as_on_the_cpu():
    model, pictures = randomise_(build_model("resnet20", 10, 3)).eval(), torch.randn(64, 3, 16, 16)
    here, there = (
        compress(model.to(device), pictures[:1].to(device), "mix", 0.5, pictures=pictures.to(device))
        for device in ("cpu", "cuda")
    )
    for ours, theirs in zip(here.report.groups, there.report.groups, strict=True):
        assert torch.equal(ours.labels, theirs.labels)
    with torch.no_grad():
        assert relative_error(here.model.cpu()(pictures), there.model.cpu()(pictures)) < 1e-2
