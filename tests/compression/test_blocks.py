"""Block by block: readers give the block's own answer to the inputs that reach it, in bounded memory."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_batches import UNEVEN, distance
from torch import nn
from toy_nets import kept_half, pruned, randomise_, relative_error

from pipeline.compression import METHODS, Plan, Projection, channel_groups, compress
from pipeline.compression.calibrate.batches import batches_of
from pipeline.compression.calibrate.blocks import blocks_of, compensate_blocks_, kept_inputs, relative, solve_block_
from pipeline.compression.calibrate.compensate import compensate_, observe
from pipeline.compression.certify import differences, found, stated
from pipeline.compression.choose.cluster import greedy_order
from pipeline.compression.choose.weights import GroupWeights
from pipeline.compression.group import Axis, ChannelGroup, ChannelGroups
from pipeline.compression.merge.modules import apply, named_tensors
from pipeline.compression.plan import told
from pipeline.compression.report import step_of
from pipeline.tables import UserError

TOKENS, WIDE = 13, 12


class Gated(nn.Module):
    """The feed-forward part of a LLaMA."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, WIDE), nn.Linear(8, WIDE), nn.Linear(WIDE, 8)

    def forward(self, *, x, scale=1.0):
        return self.down(F.silu(self.gate(x)) * self.up(x)) * scale


class Language(nn.Module):
    """Token ids through three blocks, called by keyword, in a list that no forward calls."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(TOKENS, 8), nn.Linear(8, TOKENS)
        self.blocks = nn.ModuleList(Gated() for _ in range(3))

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(x=F.rms_norm(x, (8,)), scale=0.5)
        return self.head(x)


def texts(count=30, length=9, seed=0):
    return torch.randint(TOKENS, (count, length), generator=torch.Generator().manual_seed(seed))


def language(dtype=torch.float64):
    return randomise_(Language()).to(dtype)


def solved(model, pictures, **options):
    groups = channel_groups(model, texts(1), ["hidden"])
    plan = Plan(groups, pruned(groups))
    smaller = apply(model, groups, plan.projections)
    names = compensate_blocks_(smaller, model, plan, batches_of(pictures), **options)
    return smaller, names


def test_a_block_is_the_smallest_module_that_is_called():
    model = language()
    groups = channel_groups(model, texts(1), ["hidden"])
    assert [group.gated for group in groups] == [True] * 3
    found = blocks_of(model, groups, batches_of(texts()))
    assert found == {f"blocks.{i}": [i] for i in range(3)}
    within = relative(groups[1], "blocks.1")
    assert [axis.tensor for axis in within.reads] == ["down.weight"]
    # Two layers that follow each other in a list have no module of their own around them.
    flat = randomise_(nn.Sequential(nn.ModuleList([nn.Linear(4, 6)])[0], nn.ReLU(), nn.Linear(6, 2)))
    x = torch.randn(5, 4)
    assert blocks_of(flat, channel_groups(flat, x), batches_of(x)) == {"": [0]}


def test_every_reader_gives_its_own_answer_to_the_inputs_that_reach_it():
    """Without ridge the error of a reader is orthogonal to its inputs, both measured in the smaller network."""
    model, ids = language(), texts(80)
    smaller, names = solved(model, ids, ridge=1e-12)
    assert names == [f"blocks.{i}.down.weight" for i in range(3)]
    given = {}
    for i, block in enumerate(smaller.blocks):
        block.register_forward_pre_hook(lambda m, a, kw, i=i: given.__setitem__(i, kw), with_kwargs=True)
        block.down.register_forward_pre_hook(lambda m, a, i=i: given.__setitem__(("in", i), a[0].flatten(0, 1)))
    with torch.no_grad():
        smaller(ids)
        for i, (dense, small) in enumerate(zip(model.blocks, smaller.blocks, strict=True)):
            wanted, found = (block(**given[i]).flatten(0, 1) for block in (dense, small))
            inputs = given["in", i]
            left = inputs.T @ (wanted - found)
            assert left.norm() < 1e-6 * inputs.norm() * wanted.norm()
            assert relative_error(wanted, found) > 1e-3  # half of the channels are gone


def test_batches_of_any_size_say_the_same():
    model, ids = language(), texts()
    whole, parts = (solved(model, given)[0].state_dict() for given in (ids, list(ids.split(UNEVEN))))
    assert distance(parts, whole) < 1e-9


def of_block(block, group, projection):
    """(the smaller block, its plan)"""
    plan = Plan(ChannelGroups((group,)), [projection])
    return apply(block, plan.groups, plan.projections), plan


def stood_for(size):
    """Every odd channel is a multiple of the even one before it."""
    scales = torch.where(torch.arange(size) % 2 == 0, 1.0, -0.7)
    return Projection(torch.arange(size) // 2, torch.arange(0, size, 2), scales)


@pytest.mark.parametrize("projection", [kept_half, stood_for])
@pytest.mark.parametrize("ridge", [None, 1e-9])
def test_second_moments_solve_a_block_as_its_rows_do(projection, ridge):
    x = torch.randn(40, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for block in (randomise_(nn.Sequential(nn.Linear(8, WIDE), nn.GELU(), nn.Linear(WIDE, 8))), randomise_(Gated())):
        block = block.double()
        given = {"x": x} if isinstance(block, Gated) else x
        (group,) = channel_groups(block, given)
        smaller, plan = of_block(block, group, projection(WIDE))
        by_rows, _ = of_block(block, group, projection(WIDE))
        assert list(map(len, kept_inputs(smaller, block, plan, given).values())) == [WIDE // 2]
        before = {name: t.clone() for name, t in smaller.state_dict().items()}
        names = solve_block_(smaller, block, plan, batches_of(given), ridge)
        seen = observe(block, plan.groups, given)
        assert names == compensate_(by_rows, block, plan, seen, ridge=ridge, target="same")
        assert distance(smaller.state_dict(), before) > 1e-3
        assert distance(smaller.state_dict(), by_rows.state_dict()) < 1e-9


class Shares(nn.Module):
    """Two layers, between which every channel is divided by the norm of all."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, WIDE), nn.Linear(WIDE, 8)

    def forward(self, x):
        hidden = self.first(x)
        return self.last(hidden / hidden.norm(dim=-1, keepdim=True))


def test_a_block_whose_readers_get_anything_else_is_solved_from_what_they_get():
    """Means of channels, statistics of a norm, and values that change with the number of channels."""
    x = torch.randn(40, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plain = randomise_(nn.Sequential(nn.Linear(8, WIDE), nn.GELU(), nn.Linear(WIDE, 8))).double()
    normed = randomise_(nn.Sequential(nn.Linear(8, WIDE), nn.BatchNorm1d(WIDE), nn.Linear(WIDE, 8))).double().eval()
    shares = randomise_(Shares()).double()
    channels = torch.arange(WIDE)[:, None]
    both = tuple(Axis(f"first.{kind}", 0, channels) for kind in ("weight", "bias"))
    own = ChannelGroup("first", WIDE, both, (Axis("last.weight", 1, channels),))
    means = Projection(torch.arange(WIDE) // 2)
    for block, group, projection in (
        (plain, channel_groups(plain, x)[0], means),
        (normed, channel_groups(normed, x)[0], kept_half(WIDE)),
        (shares, own, kept_half(WIDE)),
    ):
        smaller, plan = of_block(block, group, projection)
        by_rows, _ = of_block(block, group, projection)
        assert kept_inputs(smaller, block, plan, x) == {}
        solve_block_(smaller, block, plan, batches_of(x))
        compensate_(by_rows, block, plan, observe(block, plan.groups, x), target="same")
        assert distance(smaller.state_dict(), by_rows.state_dict()) < 1e-12


@pytest.mark.parametrize("method", ["l1", "l2", "random", "fpgm"])
def test_a_method_that_looks_at_no_activations_states_the_same_errors_whatever_it_is_calibrated_on(method):
    """They are errors of weights, so that they can be computed again from weights."""
    model, ids = language(torch.float32), texts()
    raw, solved_on = (compress(model, ids, method, 0.5, pictures=given).report for given in (None, ids))
    assert [row.error for row in raw.groups] == [row.error for row in solved_on.groups]
    step = told([step_of(replace(solved_on, recipe=f"{method}+data"))])[0]
    again = found(step, model, channel_groups(model, ids))
    for line in stated(step):
        assert not list(differences(line, again[line.name]))


def test_a_method_that_looks_at_activations_states_errors_that_weights_do_not_tell():
    model, ids = language(torch.float32), texts()
    step = told([step_of(compress(model, ids, "obs", 0.5, pictures=ids).report)])[0]
    assert set(found(step, model, channel_groups(model, ids)).values()) == {None}


def test_where_the_network_is_one_block_it_is_mended():
    model = randomise_(
        nn.Sequential(nn.Linear(4, 12), nn.GELU(), nn.Linear(12, 8), nn.GELU(), nn.Linear(8, 3))
    ).double()
    x = torch.randn(60, 4, dtype=torch.float64)
    groups = channel_groups(model, x)
    plan = Plan(groups, pruned(groups))
    smaller = [apply(model, groups, plan.projections) for _ in range(2)]
    compensate_blocks_(smaller[0], model, plan, batches_of(x), ridge=1e-10)
    compensate_(smaller[1], model, plan, observe(model, groups, x), ridge=1e-10)
    assert distance(smaller[0].state_dict(), smaller[1].state_dict()) < 1e-6


def test_nothing_moves_at_ratio_0_and_the_model_stays():
    model = language(torch.float32)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    same = compress(model, texts(1), "obs", 0.0, pictures=texts()).model.state_dict()
    smaller = compress(model, texts(1), "obs", 0.5, pictures=texts()).model
    for state in (same, model.state_dict()):
        assert all(torch.equal(state[name], t) for name, t in before.items())
    assert smaller.blocks[0].down.weight.shape == (8, WIDE // 2)
    assert not any(module._forward_pre_hooks for module in smaller.modules())


def test_tokens_are_solved_for_the_same_and_pictures_are_mended():
    model, ids = language(), texts()
    usual = compress(model, ids, "l2", 0.5, pictures=ids).model.state_dict()
    for target, alike in (("same", True), ("mend", False), ("dense", False)):
        found = compress(model, ids, "l2", 0.5, pictures=ids, target=target).model.state_dict()
        assert (distance(found, usual) < 1e-12) == alike


@pytest.mark.parametrize("method", ["fold", "mix", "special", "random_fold", "obs", "wanda", "l2"])
def test_every_method_reads_second_moments(method):
    model, ids = language(), texts()
    with torch.no_grad():
        raw, calibrated = (
            relative_error(model(ids), compress(model, ids, method, 0.5, pictures=given, parts=["hidden"]).model(ids))
            for given in (None, ids)
        )
    assert calibrated < raw


def test_gated_channels_that_compute_multiples_of_one_another_fold_without_loss():
    """The product of the factors may be scaled by any number that the reader takes back."""
    model = language()
    with torch.no_grad():
        for block in model.blocks:
            for twin, own, a in ((6, 0, 3.0), (7, 1, -0.5), (8, 0, 0.2), (9, 4, 1.0), (10, 2, -7.0), (11, 3, 1.0)):
                block.gate.weight[twin], block.gate.bias[twin] = block.gate.weight[own], block.gate.bias[own]
                block.up.weight[twin], block.up.bias[twin] = a * block.up.weight[own], a * block.up.bias[own]
                block.down.weight[:, twin] = torch.randn(8)
    ids = texts()
    with torch.no_grad():
        for pictures in (None, ids):
            folded = compress(model, ids, "fold", 0.5, pictures=pictures, ridge=1e-12 if pictures is not None else None)
            assert relative_error(model(ids), folded.model(ids)) < 1e-5
            assert max(row.error for row in folded.report.groups) < 1e-6
        # The mean of the factors of such channels is far from any of them.
        groups = channel_groups(model, ids)
        means = [Projection(row.labels) for row in folded.report.groups]
        assert relative_error(model(ids), apply(model, groups, means)(ids)) > 0.1


def test_representatives_are_chosen_one_after_the_other_for_what_they_add():
    shown = torch.rand(20, 20, generator=torch.Generator().manual_seed(0)).numpy()
    chosen = []
    for r in greedy_order(shown):
        worth = {c: shown[:, [*chosen, c]].max(1).sum() for c in range(20) if c not in chosen}
        assert worth[r] >= max(worth.values()) - 1e-9
        chosen.append(r)


def test_what_has_no_means_is_not_given_to_k_means():
    with pytest.raises(
        UserError, match=r"kmeans needs means, and channels of blocks\.0\.gate are products of two: use fold"
    ):
        compress(language(), texts(), "kmeans", 0.5)


@pytest.mark.parametrize("seen", [True, False])
def test_folding_gated_channels_never_loses_more_than_keeping_as_many(seen):
    """What is read of a representative is a gift: at the same rank, and in the same features."""
    model, ids = language(torch.float32), texts(60)
    groups = channel_groups(model, ids)
    inputs = observe(model, groups, ids).inputs if seen else {}
    for group in groups:
        weights = GroupWeights(group, {n: t.detach() for n, t in named_tensors(model).items()}, inputs=inputs)
        order = weights.gram.diagonal().argsort(descending=True)
        for k in range(1, group.size):
            labels = torch.full((group.size,), -1)
            labels[order[:k].sort().values] = torch.arange(k)
            pruned_to = weights.error(Projection(labels))
            assert weights.error(METHODS["special"](weights, [k])[k]) <= pruned_to + 1e-9
            assert weights.error(METHODS["fold"](weights, [k])[k]) <= 1.02 * pruned_to


def test_a_network_in_training_mode_is_solved_in_evaluation_mode_and_left_in_its_own():
    """No dropout, and no statistics of BatchNorm, move while blocks are found."""
    model = nn.Sequential(nn.Linear(4, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(), nn.Linear(12, 3)).double()
    x = torch.randn(40, 4, dtype=torch.float64)
    groups = channel_groups(model.eval(), x)
    plan = Plan(groups, pruned(groups))
    states = []
    for training in (False, True):
        smaller = apply(model.train(training), groups, plan.projections)
        compensate_blocks_(smaller, model, plan, batches_of(x))
        assert smaller.training == model.training == training
        states.append(smaller.state_dict())
    assert distance(states[1], states[0]) < 1e-12
