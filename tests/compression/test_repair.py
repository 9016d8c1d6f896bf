"""Statistics from data without labels, norm parameters from data with them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toy_nets import NETS, conv_norms, picture, randomise_, relative_error, vgg, vit

from pipeline.compression import Projection, channel_groups, compress
from pipeline.compression.calibrate.repair import follow_, reference, repair_, set_statistics_, statistics
from pipeline.stages.tune import tune_norms_
from pipeline.tables import UserError
from pipeline.tasks import Classification

TASK = Classification("multiclass", classes=4)


def batches(count=3):
    return [torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(i)) + i for i in range(count)]


def test_statistics_of_the_first_norm_are_exact():
    model = randomise_(conv_norms())
    with torch.no_grad():
        outputs = [model.conv1(x) for x in batches()]
    assert repair_(model, batches())
    mean = torch.cat(outputs).mean((0, 2, 3))
    var = torch.stack([y.var((0, 2, 3)) for y in outputs]).mean(0)
    assert torch.allclose(model.norm1.running_mean, mean, atol=1e-5)
    assert torch.allclose(model.norm1.running_var, var, rtol=1e-4)


def test_everything_else_is_as_before():
    model = randomise_(vgg()).train()
    model[5].eval()
    model[1].momentum = 0.3
    before = {n: t.clone() for n, t in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    rng = torch.get_rng_state()
    assert repair_(model, batches())
    assert torch.equal(rng, torch.get_rng_state())  # no dropout was drawn
    assert model[1].momentum == 0.3
    assert [m.training for m in model.modules()] == modes
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert changed == {"1.running_mean", "1.running_var"}
    assert not any(t.requires_grad for t in model.buffers())


def test_order_of_batches_does_not_matter():
    first, second = randomise_(conv_norms()), randomise_(conv_norms())
    repair_(first, batches())
    repair_(second, batches()[::-1])
    for name, tensor in first.norm1.state_dict().items():
        assert torch.allclose(tensor, second.norm1.state_dict()[name], rtol=1e-4, atol=1e-5)


def test_without_norms_nothing_happens():
    model = NETS["embedded"][0]()
    assert repair_(model, iter([])) is False
    assert tune_norms_(model, iter([]), TASK) is False


def test_no_batches_is_an_error_that_changes_nothing():
    model = randomise_(vgg())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match="at least one batch"):
        repair_(model, [])
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_a_batch_that_fails_leaves_no_mode_behind():
    model = randomise_(vgg())
    with pytest.raises(RuntimeError):
        repair_(model, [picture(), torch.randn(2, 1, 8, 8)])
    assert model[1].momentum == 0.1
    assert not any(m.training for m in model.modules())
    with pytest.raises(RuntimeError):
        tune_norms_(model, [(torch.randn(2, 1, 8, 8), torch.zeros(2, dtype=torch.int64))], TASK)
    assert all(p.requires_grad for p in model.parameters())


def test_a_trained_network_needs_no_repair(trained, train_data):
    model = copy.deepcopy(trained)
    pictures = torch.cat([x for x, _ in train_data])
    with torch.no_grad():
        before = model(pictures)
        repair_(model, [x for x, _ in train_data])
        after = model(pictures)
    assert relative_error(before, after) < 0.5  # the trained statistics are of the last few batches alone
    assert (before.argmax(1) == after.argmax(1)).float().mean() > 0.95


def test_a_pruned_network_gains_by_it(trained, train_data):
    pictures, labels = (torch.cat(parts) for parts in zip(*train_data, strict=True))
    model = compress(trained, pictures[:1], "l1", 0.5).model
    with torch.no_grad():
        before = F.cross_entropy(model(pictures), labels)
        repair_(model, [x for x, _ in train_data])
        assert F.cross_entropy(model(pictures), labels) < before


def test_repair_against_the_whole_network_is_about_what_compression_changed(trained, train_data):
    """If nothing is removed nothing changes, also on pictures unlike those of training."""
    pictures = [3 * x + 1 for x, _ in train_data[:2]]
    seen, groups = statistics(trained, pictures), channel_groups(trained, pictures[0][:1])
    same, plain = copy.deepcopy(trained), copy.deepcopy(trained)
    repair_(same, pictures, reference(trained, seen))
    repair_(plain, pictures)
    for name, value in trained.state_dict().items():
        torch.testing.assert_close(same.state_dict()[name], value, msg=name)
    assert not torch.allclose(plain.state_dict()[next(iter(seen))], trained.state_dict()[next(iter(seen))])
    smaller, report = compress(trained, pictures[0][:1], "l1", 0.5, groups=groups)
    usual = reference(trained, seen, groups, [Projection(row.labels) for row in report.groups])
    first, again = copy.deepcopy(smaller), copy.deepcopy(smaller)
    repair_(first, pictures, usual)
    with torch.no_grad():  # statistics before repair do not matter, as after compensation
        for name in seen:
            again.get_buffer(name).fill_(7)
    repair_(again, pictures, usual)
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in first.state_dict().items())


def test_what_other_pictures_do_to_all_statistics_does_not_count():
    """If other pictures turn every activation y into a y + b, statistics follow as on the training pictures."""
    norm = nn.BatchNorm2d(8, eps=0)
    g = torch.Generator().manual_seed(0)
    (var, mean), (wanted_var, wanted_mean) = (
        (torch.rand(8, generator=g) + 0.5, torch.randn(8, generator=g)) for _ in range(2)
    )
    a, b = torch.rand(8, generator=g) + 0.5, torch.randn(8, generator=g)
    set_statistics_(norm, [var, mean])
    follow_(norm, [a**2 * wanted_var, a * wanted_mean + b], [a**2 * var, a * mean + b])
    torch.testing.assert_close(norm.running_var, wanted_var)
    torch.testing.assert_close(norm.running_mean, wanted_mean)


def test_channels_that_the_pictures_do_not_show_keep_their_statistics():
    model = randomise_(vgg()).eval()
    kept = model[1].running_var.clone(), model[1].running_mean.clone()
    blank = [torch.zeros(4, 3, 8, 8)]
    groups = channel_groups(model, blank[0][:1])
    same = [Projection(torch.arange(g.size)) for g in groups]
    seen = statistics(model, blank)
    with torch.no_grad():
        model[0].bias += 5
    repair_(model, blank, reference(model, seen, groups, same))
    assert torch.equal(model[1].running_var, kept[0])
    assert torch.equal(model[1].running_mean, kept[1])


@pytest.mark.parametrize("build", [vgg, vit])
def test_tuning_trains_the_norms_alone(build):
    size = 16 if build is vit else 8
    model = randomise_(build()).train()
    next(iter(model.parameters())).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(16, 3, size, size, generator=generator), torch.randint(5, (16,), generator=generator)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    modes = [m.training for m in model.modules()]

    def loss():
        twin = copy.deepcopy(model).eval()
        with torch.no_grad():
            return F.cross_entropy(twin(x), y)

    start = loss()
    with torch.no_grad():  # as in a validation loop
        assert tune_norms_(model, [(x, y)] * 10, TASK, lr=1e-2)
    assert loss() < start
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert changed
    assert all("norm" in n or n in ("1.weight", "1.bias") for n in changed)
    assert flags == {n: p.requires_grad for n, p in model.named_parameters()}
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
