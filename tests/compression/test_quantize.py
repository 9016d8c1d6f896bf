"""Grids of few bits: all that is said of them follows from a definition of thirty lines."""

import copy
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from pipeline.compressed import load
from pipeline.compression import compress
from pipeline.compression.calibrate.batches import Batches
from pipeline.compression.calibrate.compensate import input_moments
from pipeline.compression.checkpoint import digest_of, load_compressed, read_whole, save_compressed, stored_size
from pipeline.compression.copies import bare_copy
from pipeline.compression.plan import Step, remember_
from pipeline.compression.quantize.grids import (
    BITS,
    FITS,
    KINDS,
    Scheme,
    as_weight,
    grid_of,
    nearest,
    values,
)
from pipeline.compression.quantize.network import grids_of, on_grids, quantize_, sites
from pipeline.compression.quantize.packing import packed, packed_size, unpacked
from pipeline.compression.quantize.rounding import gptq
from pipeline.compression.quantize.stored import PACKED
from pipeline.models import build_model
from pipeline.tables import UserError

RESNET = {"name": "resnet20", "classes": 10, "channels": 3}


class Reference:
    """The definition, number by number: scale = range / levels, zero exact, half a scale of error inside the range."""

    def __init__(self, weights: list[float], bits: int, symmetric: bool) -> None:
        largest = max(abs(w) for w in weights)
        self.low, self.high = (-largest, largest) if symmetric else (min(0.0, *weights), max(0.0, *weights))
        self.levels = 2**bits - 1
        self.scale = (self.high - self.low) / self.levels or 1.0
        self.zero = round(-self.low / self.scale)

    def rounded(self, weight: float) -> float:
        code = min(max(round(weight / self.scale) + self.zero, 0), self.levels)
        return (code - self.zero) * self.scale


def rows(columns: int = 37) -> torch.Tensor:
    """Rows of all sorts: of both signs, of one, far from zero, almost zero, zero, of one value."""
    drawn = torch.randn(6, columns, generator=torch.Generator().manual_seed(0))
    return torch.stack(
        [drawn[0], drawn[1].abs(), -drawn[2].abs() - 9, drawn[3] * 1e-30, drawn[4] * 0, drawn[5] * 0 + 3]
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", BITS)
def test_rows_are_rounded_as_the_definition_says(bits, kind):
    weight = rows()
    found = values(grid := grid_of(weight, Scheme(bits, kind=kind, fit="minmax")), nearest(grid, weight))
    for row, rounded, scale in zip(weight.tolist(), found.tolist(), grid.scale.flatten().tolist(), strict=True):
        one = Reference(row, bits, kind == "symmetric")
        assert scale == pytest.approx(one.scale, rel=1e-6)
        assert one.rounded(0.0) == 0.0
        for before, after in zip(row, rounded, strict=True):
            assert abs(one.rounded(before) - before) <= one.scale * 0.500001
            # A number in the middle of two values may go to either: the formats round it apart.
            middle = abs(abs(before / one.scale) % 1 - 0.5) < 1e-4
            assert after == pytest.approx(one.rounded(before), rel=1e-5, abs=1.001 * one.scale * middle)


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("per", ["channel", "tensor", "group"])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_zero_is_exact_and_errors_inside_the_range_are_half_a_scale(bits, per, kind, fit):
    weight = rows()
    weight[:, ::5] = 0
    grid = grid_of(weight, Scheme(bits, per, 8, kind, fit))
    codes = nearest(grid, weight)
    found = values(grid, codes)
    assert int(codes.max()) < 2**bits
    assert (found[weight == 0] == 0).all()
    scale, zero = (
        grid.scale.repeat_interleave(grid.group, 1)[:, :37],
        grid.zero.repeat_interleave(grid.group, 1)[:, :37],
    )
    inside = (weight >= -zero.float() * scale) & (weight <= (2**bits - 1 - zero.float()) * scale)
    assert ((found - weight).abs() <= scale * 0.50001)[inside].all()
    assert inside[weight == 0].all()
    assert inside.float().mean() > 0.3
    assert torch.equal(values(grid, nearest(grid, found)), found)


@pytest.mark.parametrize("bits", BITS)
def test_least_squares_is_never_worse_than_the_whole_range(bits):
    weight = torch.randn(8, 288, generator=torch.Generator().manual_seed(1))
    errors = {}
    for fit in FITS:
        grid = grid_of(weight, Scheme(bits, fit=fit))
        errors[fit] = (values(grid, nearest(grid, weight)) - weight).square().sum(1)
    assert (errors["mse"] <= errors["minmax"] * (1 + 1e-5)).all()
    assert bits > 4 or errors["mse"].sum() < 0.95 * errors["minmax"].sum()


@pytest.mark.parametrize("per", ["channel", "tensor", "group"])
@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(70, 5),
        nn.Conv2d(6, 4, 3),
        nn.ConvTranspose2d(6, 4, 3),
        nn.Conv1d(8, 8, 3, groups=4),
        nn.Embedding(9, 5),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_layers_have_scales_for_their_outputs(layer, per):
    (site,) = sites(layer).values()
    outputs = 1 if per == "tensor" else layer.weight.shape[1 if isinstance(layer, nn.ConvTranspose2d) else 0]
    grids, _ = quantize_(layer, {"weight": Scheme(3, per)})
    groups = -(-layer.weight.numel() // layer.weight.shape[site.dim] // 64) if per == "group" else 1
    assert grids["weight"].scale.shape == (outputs, groups)
    found, codes = on_grids(layer)["weight"]
    assert found is grids["weight"]
    assert int(codes.max()) < 8
    assert len(codes.unique()) > 4
    again = as_weight(values(found, codes), layer.weight, site.dim)
    assert torch.equal(again, layer.weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_number_formats_find_their_codes_again(dtype):
    weight = nn.Parameter(torch.randn(16, 100, generator=torch.Generator().manual_seed(2)).to(dtype))
    for bits in BITS:
        layer = nn.Linear(100, 16).to(dtype)
        layer.weight = nn.Parameter(weight.detach().clone())
        quantize_(layer, {"weight": Scheme(bits)})
        assert "weight" in on_grids(layer)
        assert layer.weight.dtype == dtype


@pytest.mark.parametrize("bits", range(1, 9))
def test_packed_codes_come_back_and_take_their_bits(bits, monkeypatch):
    monkeypatch.setattr("pipeline.compression.quantize.packing.AT_ONCE", 64)
    for count in (1, 7, 8, 64, 65, 129, 1000):
        codes = torch.randint(2**bits, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))
        found = packed(codes, bits)
        assert found.dtype == torch.uint8
        assert len(found) == packed_size(count, bits) == -(-count * bits // 8)
        assert torch.equal(unpacked(found, bits, count), codes)
    whole = sum(int(code) << (bits * i) for i, code in enumerate(codes[:8]))
    assert int.from_bytes(found[:bits].numpy().tobytes(), "little") == whole


def inputs_of(rank: int = 6, columns: int = 48) -> torch.Tensor:
    """Inputs that go together, as those of trained layers do."""
    generator = torch.Generator().manual_seed(3)
    mixed = torch.randn(500, rank, generator=generator) @ torch.randn(rank, columns, generator=generator)
    return mixed + 0.1 * torch.randn(500, columns, generator=generator)


@pytest.mark.parametrize("per", ["channel", "tensor", "group"])
def test_gptq_changes_outputs_less_than_rounding_to_the_nearest(per, monkeypatch):
    x, weight = inputs_of(), torch.randn(10, 48, generator=torch.Generator().manual_seed(4))
    grid = grid_of(weight, Scheme(3, per, 16))
    codes = gptq(grid, weight, x.T @ x)
    assert int(codes.max()) < 8
    errors = [float(((values(grid, one) - weight) @ x.T).square().sum()) for one in (codes, nearest(grid, weight))]
    assert errors[0] < 0.5 * errors[1]
    monkeypatch.setattr("pipeline.compression.quantize.rounding.BLOCK", 7)
    assert torch.equal(gptq(grid, weight, x.T @ x), codes), "blocks change the order of the work alone"


def test_gptq_on_inputs_that_do_not_go_together_is_rounding_to_the_nearest():
    weight = torch.randn(10, 48, generator=torch.Generator().manual_seed(5))
    grid = grid_of(weight, Scheme(3))
    moments = torch.diag(torch.rand(48, generator=torch.Generator().manual_seed(6)) + 0.1)
    moments[7, 7] = 0  # an input that is never seen
    assert torch.equal(gptq(grid, weight, moments), nearest(grid, weight))
    assert torch.equal(gptq(grid, weight, torch.zeros(48, 48)), nearest(grid, weight))


def test_gptq_follows_the_papers_formula_column_by_column():
    """Eq. 2 and 3 without Cholesky factor or blocks: rows of the inverse are removed one by one."""
    x, weight = inputs_of(columns=12), torch.randn(4, 12, generator=torch.Generator().manual_seed(7)).double()
    moments = (x.T @ x).double()
    grid = grid_of(weight, Scheme(3))
    left, inverse = (
        weight.clone(),
        torch.linalg.inv(moments + 0.01 * moments.diagonal().mean() * torch.eye(12).double()),
    )
    expected = torch.empty_like(weight, dtype=torch.uint8)
    for i in moments.diagonal().argsort(descending=True).tolist():
        expected[:, i] = nearest(grid, left)[:, i]
        error = (left[:, i] - values(grid, nearest(grid, left))[:, i]) / inverse[i, i]
        left -= error[:, None] * inverse[i]
        inverse = inverse - inverse[:, i, None] * inverse[i] / inverse[i, i]
        inverse[i, :] = inverse[:, i] = 0
    assert torch.equal(gptq(grid, weight, moments), expected)


class Net(nn.Module):
    """Convolutions with patches, points and groups, a transposed one, a tied weight, and a layer nobody calls."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.point = nn.Conv2d(8, 8, 1)
        self.up = nn.ConvTranspose2d(8, 6, 2)
        self.last = nn.Linear(6, 4)
        self.tied = nn.Linear(6, 4)
        self.tied.weight = self.last.weight
        self.unused = nn.Linear(5, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.up(self.point(self.grouped(self.norm(self.first(x)).relu()))).mean((2, 3)))


PICTURES = torch.randn(20, 3, 6, 6, generator=torch.Generator().manual_seed(8))


def test_moments_are_those_of_what_a_layer_is_multiplied_with():
    net = Net().eval()
    layers = {"first": net.first, "point": net.point, "last": net.last}
    with torch.no_grad():
        found = input_moments(net, layers, Batches(list(PICTURES.split(6))))
        patches = nn.functional.unfold(PICTURES, 3, padding=1).transpose(1, 2).reshape(-1, 27)
        points = net.grouped(net.norm(net.first(PICTURES)).relu()).movedim(1, -1).reshape(-1, 8)
    torch.testing.assert_close(found["first"], patches.T @ patches / 20, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["point"], points.T @ points / 20, rtol=1e-4, atol=1e-4)
    assert found["last"].shape == (6, 6)


def test_gptq_takes_the_layers_it_knows_and_tells_of_the_others():
    net = Net().eval()
    near = copy.deepcopy(net)
    schemes = dict.fromkeys(sites(net), Scheme(3))
    assert list(schemes) == [f"{n}.weight" for n in ("first", "grouped", "point", "up", "last", "unused")]
    _, rest = quantize_(net, schemes, Batches([PICTURES]))
    assert rest == ["grouped.weight", "up.weight", "unused.weight"]
    quantize_(near, schemes)
    same = {name for name in schemes if torch.equal(net.get_parameter(name), near.get_parameter(name))}
    assert same == set(rest)
    assert on_grids(net).keys() == on_grids(near).keys() == schemes.keys()
    assert net.tied.weight is net.last.weight


def test_copies_keep_grids_and_a_weight_that_leaves_its_grid_is_told_apart():
    net = Net().eval()
    quantize_(net, dict.fromkeys(sites(net), Scheme(4)))
    twin = bare_copy(net)
    assert grids_of(twin) == grids_of(net)
    with torch.no_grad():
        twin.first.weight[0, 0, 0, 0] += 1e-3
        twin.up.weight = nn.Parameter(twin.up.weight[:4].clone())  # inputs gone
        twin.last.weight = nn.Parameter(twin.last.weight[:3].clone())  # outputs gone
        twin.grouped.weight[2] = 0  # a masked channel: zero is on the grid
    assert set(on_grids(twin)) == {"grouped.weight", "point.weight", "up.weight", "unused.weight"}
    assert set(on_grids(net)) == set(sites(net))


def test_attention_and_embeddings_have_weights_too():
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    assert set(sites(layer)) == {
        "self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight",
    }  # fmt: skip
    quantize_(layer, dict.fromkeys(sites(layer), Scheme(3)))
    assert all(len(row.unique()) <= 8 for row in layer.self_attn.in_proj_weight)
    assert set(on_grids(layer)) == set(sites(layer))


def test_options_that_are_not_there_are_refused():
    for options, said in (
        ({"bits": 1}, "bits 1 must be a whole number from 2 to 8"),
        ({"bits": 4.5}, r"bits 4\.5 must be"),
        ({"group": 0}, "group 0 must be a whole number of at least 1"),
        ({"per": "row"}, "unknown per 'row'.*channel, group, tensor"),
        ({"kind": "odd"}, "unknown grid 'odd'.*affine, symmetric"),
        ({"fit": "l1"}, "unknown range 'l1'.*minmax, mse"),
    ):
        with pytest.raises(UserError, match=said):
            Scheme(**options)


def quantized_resnet(bits: int) -> nn.Module:
    """ResNet-20 for ten classes, channels last, on grids but for the last layer; it has gone through one stage."""
    torch.manual_seed(0)
    net = build_model("resnet20", 10, 3).eval().to(memory_format=torch.channels_last)
    schemes = {name: Scheme(bits) for name in sites(net)}
    del schemes["linear.weight"]
    quantize_(net, schemes)
    remember_(net, Step("quantize"))
    return net


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_file_holds_the_bits_and_gives_the_weights_back_bit_for_bit(bits, tmp_path):
    net = quantized_resnet(bits)
    save_compressed(net, tmp_path / "net.safetensors", architecture=RESNET)
    size = (tmp_path / "net.safetensors").stat().st_size
    weights = sum(site.weight.numel() for site in sites(net).values())
    others = sum(t.numel() * t.element_size() for t in net.state_dict().values()) - 4 * weights
    channels = sum(len(site.weight) for site in sites(net).values())
    least = weights * bits / 8 + others + 5 * channels  # a scale of four bytes, and a zero of one
    assert least < size < least + 640 * 4 + 2_500, "the last layer is floats, and the manifest is deflated"
    loaded, manifest = load_compressed(tmp_path / "net.safetensors", build_model("resnet20", 10, 3).eval())
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
        assert tensor.stride() == loaded.state_dict()[name].stride(), name
    assert set(manifest["grids"]) == set(on_grids(net)) == set(on_grids(loaded)) == {*sites(net)} - {"linear.weight"}
    assert 0 <= size - stored_size(net) < 2_500
    assert stored_size(loaded) == stored_size(net)


def test_a_file_of_format_4_is_read_where_every_vector_is_a_tensor_of_its_own(tmp_path):
    net = quantized_resnet(4)
    save_compressed(net, path := tmp_path / "net.safetensors", architecture=RESNET)
    stored, manifest = read_whole(path)
    vectors = {name: net.state_dict()[name] for name in manifest.pop("vectors")}
    assert len(vectors) == 19 * 5 + 1  # five of each norm, and the shift of the last layer
    bytes_of_vectors = sum(t.numel() * t.element_size() for t in vectors.values())
    stored = {**stored, PACKED: stored[PACKED][:-bytes_of_vectors].clone(), **vectors}
    text = json.dumps({**manifest, "format": 4})
    save_file(stored, path, {"foldability": text, "sha256": digest_of(text, stored)})
    loaded, _ = load(path)
    assert all(torch.equal(t, loaded.state_dict()[name]) for name, t in net.state_dict().items())


def test_a_damaged_manifest_that_is_deflated_is_one_line(tmp_path):
    save_compressed(quantized_resnet(4), path := tmp_path / "net.safetensors", architecture=RESNET)
    with safe_open(path, "pt") as file:
        said, stored = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for broken in (said["foldability"][:-9], "c~ \n"):
        save_file(stored, path, {**said, "foldability": broken})
        with pytest.raises(UserError, match=r"its manifest cannot be inflated.*copy it again"):
            load(path)


def test_four_bits_are_an_eighth_of_the_floats():
    """Of the weights: ResNet-20's norms and scales, which stay numbers, are a fiftieth of it."""
    net = quantized_resnet(4)
    floats = sum(t.numel() * t.element_size() for t in net.state_dict().values())
    assert 1 / 8 < stored_size(net) / floats < 1 / 8 + 0.02


def test_a_file_holds_a_weight_that_left_its_grid_as_it_is(tmp_path):
    net = quantized_resnet(4)
    with torch.no_grad():
        net.conv1.weight += 1e-4
    save_compressed(net, tmp_path / "net.safetensors", architecture=RESNET)
    loaded, manifest = load(tmp_path / "net.safetensors")
    assert torch.equal(loaded.conv1.weight, net.conv1.weight)
    assert "conv1.weight" not in manifest["grids"]
    assert len(manifest["grids"]) == 18


def test_tied_and_half_precision_weights_come_back(tmp_path):
    net = Net().eval().bfloat16()
    quantize_(net, dict.fromkeys(sites(net), Scheme(5, "group", 8)))
    remember_(net, Step("quantize"))
    save_compressed(net, tmp_path / "net.safetensors")
    loaded, manifest = load_compressed(tmp_path / "net.safetensors", Net().eval())
    assert all(torch.equal(t, loaded.state_dict()[name]) for name, t in net.state_dict().items())
    assert loaded.last.weight.dtype == torch.bfloat16
    assert loaded.tied.weight is loaded.last.weight
    assert manifest["tied"] == {"tied.weight": "last.weight"}


def test_folding_a_quantized_network_gives_floats_again(tmp_path):
    folded = compress(quantized_resnet(4), torch.zeros(1, 3, 16, 16), "fold", 0.5).model
    whole = sites(quantized_resnet(4))
    kept = {name for name, site in sites(folded).items() if site.weight.shape == whole[name].weight.shape}
    assert set(on_grids(folded)) <= kept
    save_compressed(folded, tmp_path / "net.safetensors", architecture=RESNET)
    loaded, _ = load(tmp_path / "net.safetensors")
    assert all(torch.equal(t, loaded.state_dict()[name]) for name, t in folded.state_dict().items())
