"""Masks: the promises of every mask of MASKS, and the weights that each keeps, against its definition written out."""

import copy
from itertools import product

import pytest
import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from toy_nets import NETS, Net, picture, randomise_, vgg

from pipeline.compression import MASKS, compress
from pipeline.compression.calibrate.repair import repair_
from pipeline.models import build_model
from pipeline.stages.tune import tune_norms_
from pipeline.tables import UserError
from pipeline.tasks import Classification

GLOBAL = ["magnitude", "lamp", "random_mask"]


def maskable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that a mask may touch, found without the code under test."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    found: dict[int, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | _ConvNd) and id(module.weight) not in embeddings:
            found.setdefault(id(module.weight), f"{name}.weight")
    return {name: model.get_parameter(name) for name in found.values()}


def zeros(model: nn.Module) -> dict[str, int]:
    return {name: int((weight == 0).sum()) for name, weight in maskable(model).items()}


@pytest.mark.parametrize(("name", "method"), list(product(NETS, MASKS)))
def test_a_mask_zeroes_weights_and_nothing_else(name, method):
    build, example = NETS[name]
    model = randomise_(build())
    model.requires_grad_(name != "vgg")
    masked, report = compress(model, example, method, 0.5)
    weights, before, after = maskable(model), model.state_dict(), masked.state_dict()
    assert list(before) == list(after)
    tied = {n for n, p in model.named_parameters(remove_duplicate=False) if any(p is w for w in weights.values())}
    for key, old in before.items():
        assert after[key].shape == old.shape
        changed = after[key] != old
        assert not changed.any() or key in tied, f"{key} is no weight of a linear layer or convolution"
        assert (after[key][changed] == 0).all()
    assert type(masked) is type(model)
    assert [p.requires_grad for p in masked.parameters()] == [p.requires_grad for p in model.parameters()]
    assert all(p.is_leaf for p in masked.parameters())
    assert not any(m._forward_pre_hooks for m in masked.modules())
    with torch.no_grad():
        assert masked(example).shape == model(example).shape
    assert report.params_before - report.params_after == sum(zeros(masked).values()) > 0
    assert report.macs_before == report.macs_after > 0


@pytest.mark.parametrize(
    ("method", "ratio", "name"),
    list(product([m for m in MASKS if m != "n_m"], [0.1, 1 / 3, 0.5, 0.9], ["resnet18", "mobile", "tied"])),
)
def test_the_ratio_is_the_fraction_of_weights(method, ratio, name):
    build, example = NETS[name]
    model = randomise_(build())
    found = zeros(compress(model, example, method, ratio).model)
    sizes = {n: weight.numel() for n, weight in maskable(model).items()}
    if method in GLOBAL:
        assert sum(found.values()) == round(ratio * sum(sizes.values()))
    else:
        assert found == {n: round(ratio * size) for n, size in sizes.items()}


@pytest.mark.parametrize("method", MASKS)
def test_ratio_0_is_the_identity(method):
    model = randomise_(vgg())
    masked, report = compress(model, picture(), method, 0.0)
    assert all(torch.equal(t, masked.state_dict()[n]) for n, t in model.state_dict().items())
    assert (report.error, report.params_after) == (0, report.params_before)


@pytest.mark.parametrize("method", MASKS)
def test_the_input_model_and_the_random_state_are_untouched(method):
    model = randomise_(vgg()).train()
    before = {n: (t, t.clone()) for n, t in model.state_dict(keep_vars=True).items()}
    state = torch.get_rng_state()
    compress(model, picture(), method, [0.3, 0.9])
    assert torch.equal(state, torch.get_rng_state())
    assert all(m.training for m in model.modules())
    assert list(before) == list(model.state_dict())
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert tensor is before[name][0]
        assert torch.equal(tensor, before[name][1])
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("method", MASKS)
def test_many_ratios_are_the_same_as_each_and_a_seed_as_itself(method):
    model = randomise_(vgg())
    for ratio, many in zip((0.3, 0.7), compress(model, picture(), method, (0.3, 0.7), seed=1), strict=True):
        one = compress(model, picture(), method, ratio, seed=1)
        assert one.report == many.report
        assert all(torch.equal(t, many.model.state_dict()[n]) for n, t in one.model.state_dict().items())
    other = compress(model, picture(), method, 0.7, seed=2).model.state_dict()
    same = all(torch.equal(t, other[n]) for n, t in one.model.state_dict().items())
    assert same == (method != "random_mask")


def split(model: nn.Module, masked: nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(|w| that stayed, |w| that went) of every layer."""
    new = maskable(masked)
    return [(w[new[n] != 0].abs().detach(), w[new[n] == 0].abs().detach()) for n, w in maskable(model).items()]


def test_magnitude_keeps_the_largest_weights_of_the_network():
    model = randomise_(vgg())
    layers = split(model, compress(model, picture(), "magnitude", 0.5).model)
    assert torch.cat([kept for kept, _ in layers]).min() >= torch.cat([gone for _, gone in layers]).max()


def test_layer_magnitude_keeps_the_largest_weights_of_every_layer():
    model = randomise_(vgg())
    layers = split(model, compress(model, picture(), "layer_magnitude", 0.5).model)
    assert all(kept.min() >= gone.max() for kept, gone in layers)
    assert torch.cat([kept for kept, _ in layers]).min() < torch.cat([gone for _, gone in layers]).max()


def test_lamp_keeps_the_largest_scores_of_the_paper():
    """Equation 3 of the paper: a square, over the sum of all squares of its layer that are no smaller."""
    model = randomise_(vgg()).double()
    masked = compress(model, picture().double(), "lamp", 0.5).model
    scores, kept = [], []
    for name, weight in maskable(model).items():
        squares = weight.detach().flatten().square()
        scores.append(squares / torch.where(squares >= squares[:, None], squares, 0).sum(1))
        kept.append(maskable(masked)[name].detach().flatten() != 0)
    scores, kept = torch.cat(scores), torch.cat(kept)
    assert scores[kept].min() > scores[~kept].max()


def test_lamp_leaves_a_weight_in_every_layer_where_magnitude_empties_one():
    model = randomise_(vgg())
    with torch.no_grad():
        model[4].weight.mul_(1e-4)
        model[8].weight[1:] = model[8].weight[:1]  # equal weights share no score
    sizes = {name: weight.numel() for name, weight in maskable(model).items()}
    ratio = 1 - len(sizes) / sum(sizes.values())  # as many weights as layers
    emptied = {m: zeros(compress(model, picture(), m, ratio).model) for m in ("lamp", "magnitude")}
    assert emptied["lamp"] == {name: size - 1 for name, size in sizes.items()}
    assert emptied["magnitude"]["4.weight"] == sizes["4.weight"]


def test_a_layer_that_is_zero_already_is_masked_first():
    model = randomise_(vgg())
    with torch.no_grad():
        model[8].weight.zero_()
    for method in ("magnitude", "lamp"):
        masked, report = compress(model, picture(), method, model[8].weight.numel() / sum(
            w.numel() for w in maskable(model).values()
        ))  # fmt: skip
        assert report.error == 0, method
        assert all(torch.equal(t, masked.state_dict()[n]) for n, t in model.state_dict().items())


def grouped():
    """Convolutions in groups, plain and transposed, with numbers of inputs that are no multiple of 4."""
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 10, 3, padding=1, groups=2), nn.ReLU(),
        nn.ConvTranspose2d(10, 18, 2, groups=2), nn.ReLU(), nn.ConvTranspose2d(18, 7, 2), nn.Flatten(),
        nn.Linear(7 * 100, 9), nn.Linear(9, 8, bias=False),
    )  # fmt: skip


def vectors_of_inputs(module: nn.Module, weight: torch.Tensor) -> list[torch.Tensor]:
    """The weights of all inputs of one output, at one place of the kernel, in order."""
    weight = weight.detach()
    if isinstance(module, _ConvTransposeNd):
        weight = torch.cat([group.transpose(0, 1) for group in weight.chunk(module.groups)])
    return list(weight.movedim(1, -1).reshape(-1, weight.shape[1]))


@pytest.mark.parametrize(
    ("ratio", "m", "n"), [(0.5, 4, 2), (0.3, 4, 3), (0.6, 4, 2), (0.95, 4, 1), (0.1, 4, 4), (0.5, 8, 4), (0.75, 2, 1)]
)
def test_n_of_m_are_the_largest_of_every_m_inputs(ratio, m, n):
    model = randomise_(grouped())
    masked = compress(model, picture(), "n_m", ratio, m=m).model
    leftover = 0
    for module, new in zip(model, masked, strict=True):
        if not hasattr(module, "weight"):
            continue
        pairs = zip(vectors_of_inputs(module, module.weight), vectors_of_inputs(new, new.weight), strict=True)
        for old, kept in pairs:
            for start in range(0, len(old), m):
                of, left = old[start : start + m].abs(), kept[start : start + m] != 0
                leftover += len(of) < m
                assert left.sum() == min(n, len(of))
                assert left.all() or of[left].min() >= of[~left].max()
    assert leftover


def test_the_report_says_what_n_of_m_really_removed():
    model = nn.Sequential(nn.Linear(8, 6, bias=False), nn.Linear(6, 2))
    left = [c.report.params_after for c in compress(model, torch.zeros(1, 8), "n_m", [0.1, 0.3, 0.5])]
    assert left == [48 + 14, 36 + 10 + 2, 24 + 8 + 2]


def test_the_report_names_every_layer():
    model = randomise_(vgg())
    masked, report = compress(model, picture(), "layer_magnitude", 0.5)
    assert report.groups == ()
    assert {layer.name: layer.before - layer.after for layer in report.layers} == zeros(masked)
    errors = []
    for layer in report.layers:
        old, new = (net.get_parameter(layer.name).detach() for net in (model, masked))
        errors.append(float((old - new).norm() / old.norm()))
        assert layer.error == pytest.approx(errors[-1], rel=1e-5)
    assert report.error == pytest.approx(sum(errors) / len(errors), rel=1e-5)
    lines = str(report).splitlines()
    assert lines[1].split() == ["layer", "weights", "relative", "error"]
    assert lines[2].split()[:4] == ["0.weight", "216", "->", "108"]
    assert len(lines) == 2 + len(report.layers)


def test_tied_weights_stay_tied_and_those_of_embeddings_whole():
    model = randomise_(NETS["tied"][0]())
    masked = compress(model, NETS["tied"][1], "layer_magnitude", 0.5).model
    assert masked[3].weight is masked[1].weight
    assert (masked[1].weight == 0).sum() == 32
    assert masked[8].weight is masked[0].weight
    assert torch.equal(masked[0].weight, model[0].weight)


def test_channels_last_and_half_precision_stay():
    model = randomise_(build_model("resnet18", 3, 3, width=4)).to(torch.bfloat16, memory_format=torch.channels_last)
    for method in MASKS:
        masked, report = compress(model, picture().bfloat16(), method, 0.5)
        assert report.params_after < report.params_before
        for name, weight in maskable(masked).items():
            assert weight.dtype == torch.bfloat16
            assert weight.dim() < 4 or weight.is_contiguous(memory_format=torch.channels_last), name


def test_projections_of_attention_are_linear_layers():
    model = Net(lambda net, x: net.attention(x, x, x)[0], attention=nn.MultiheadAttention(8, 2, batch_first=True))
    masked = compress(model, torch.randn(1, 4, 8), "n_m", 0.5).model
    assert (masked.attention.in_proj_weight == 0).sum() == 3 * 8 * 8 // 2
    assert (masked.attention.out_proj.weight == 0).sum() == 8 * 8 // 2


class Branching(nn.Module):
    """A network that torch.export cannot trace, with no channels but inputs and outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, x):
        return self.layer(x) if x.sum() > 0 else self.layer(-x)


def test_masks_need_no_trace_and_no_channels():
    masked = compress(Branching(), torch.ones(1, 8), "magnitude", 0.25).model
    assert (masked.layer.weight == 0).sum() == 8


def test_statistics_and_norms_are_repaired_and_zeros_stay(trained, train_data):
    masked = compress(trained, train_data[0][0], "lamp", 0.9).model
    raw, before = zeros(masked), copy.deepcopy(masked.state_dict())
    repair_(masked, (pictures for pictures, _ in train_data[:4]))
    assert not torch.equal(before["bn1.running_mean"], masked.bn1.running_mean)
    tune_norms_(masked, train_data[:4], Classification("multiclass", classes=3))
    assert not torch.equal(before["bn1.weight"], masked.bn1.weight)
    assert zeros(masked) == raw


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (
            "lampp",
            {},
            r"unknown method 'lampp' \(did you mean 'lamp'\?\); choose from: .*bn_scale, .*fold, .*lamp, .*n_m",
        ),
        ("lamp", {"pictures": picture()}, "'lamp', a mask of single weights, has no option 'pictures'; it takes: none"),
        ("magnitude", {"parts": ["hidden"]}, "'magnitude', a mask of single weights, has no option 'parts'"),
        ("n_m", {"protect": ["0"]}, "'n_m', a mask of single weights, has no option 'protect'; it takes: m"),
        ("lamp", {"m": 4}, "'lamp', a mask of single weights, has no option 'm'"),
        ("n_m", {"m": 0}, "m 0 must be at least 1 weight"),
        ("n_m", {"m": "four"}, "m must be a number, got 'four'"),
    ],
)
def test_errors(method, options, message):
    with pytest.raises(UserError, match=message):
        compress(vgg(), picture(), method, 0.5, **options)
    with pytest.raises(UserError, match=r"ratio 1\.0 is out of range: the fraction to remove"):
        compress(vgg(), picture(), "lamp", 1.0)


def test_what_cannot_be_masked_says_why():
    model = vgg()
    with torch.no_grad():
        model[4].weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(UserError, match=r"4\.weight holds NaN"):
        compress(model, picture(), "lamp", 0.5)
    with pytest.raises(UserError, match="Embedding has no linear layer or convolution of its own weights to mask"):
        compress(nn.Embedding(5, 4), torch.tensor([1]), "lamp", 0.5)
