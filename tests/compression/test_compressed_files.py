"""Compressed networks on disk: a written network comes back, and a file that cannot be read says why in one line."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from toy_nets import NETS, Net, randomise_, torch_attention

from pipeline.compressed import load
from pipeline.compression import Compressed, Report, compress
from pipeline.compression.checkpoint import load_compressed, read_manifest, save_compressed, source_of
from pipeline.compression.merge.modules import resized
from pipeline.models import build_model
from pipeline.tables import UserError

NARROW = {"name": "resnet18", "classes": 10, "channels": 3, "width": 4}


@pytest.fixture(scope="module")
def folded(tmp_path_factory):
    """(compressed network, its file, which names its architecture)."""
    build, example = NETS["resnet18"]
    compressed = compress(randomise_(build()), example, "fold", 0.5)
    path = tmp_path_factory.mktemp("folded") / "net.safetensors"
    save_compressed(compressed, path, {"run": 7}, architecture=NARROW, source={"file": "net.pt"})
    return compressed, path


def assert_same(model: nn.Module, other: nn.Module) -> None:
    """Assert that both have the same tensors, bit for bit, in names, shapes, number formats and memory formats."""
    tensors, others = model.state_dict(), other.state_dict()
    assert list(tensors) == list(others)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, others[name]), name
        assert (tensor.dtype, tensor.stride()) == (others[name].dtype, others[name].stride()), name


@pytest.mark.parametrize("method", ["fold", "l2", "lamp"])
@pytest.mark.parametrize("name", NETS)
def test_round_trip(name, method, tmp_path):
    build, example = NETS[name]
    compressed = compress(randomise_(build()), example, method, 0.5)
    save_compressed(compressed, tmp_path / "net.safetensors")
    full = build().eval()
    before = {n: t.clone() for n, t in full.state_dict().items()}
    model, manifest = load_compressed(tmp_path / "net.safetensors", full)
    assert_same(model, compressed.model)
    assert torch.equal(model(example), compressed.model(example))
    assert all(torch.equal(t, before[n]) for n, t in full.state_dict().items()), "the given network was changed"
    assert {n: g["labels"] for n, g in manifest["groups"].items()} == {
        g.name: g.labels.tolist() for g in compressed.report.groups
    }


def test_a_fresh_process_needs_the_file_alone_and_no_pickle(folded):
    compressed, path = folded
    program = (
        "import pickle, sys, torch\n"
        "from pipeline.compressed import load\n"
        "pickle.load = pickle.loads = pickle.Unpickler = torch.load = None\n"
        "model, manifest = load(sys.argv[1])\n"
        "assert not model.training\n"
        "print(manifest['about'], model(torch.ones(1, 3, 8, 8)).tolist())\n"
    )
    done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, timeout=120)
    expected = compressed.model(torch.ones(1, 3, 8, 8)).tolist()
    assert done.stdout.strip() == f"{{'run': 7}} {expected}", done.stderr


def test_loading_by_architecture_draws_and_downloads_nothing(folded, tmp_path, monkeypatch):
    compressed, path = folded
    save_compressed(compressed, tmp_path / "odd.safetensors", architecture={"name": "resnet19"})
    with pytest.raises(UserError, match=r"unknown model 'resnet19' \(did you mean 'resnet"):
        load(tmp_path / "odd.safetensors")
    save_compressed(compressed, tmp_path / "half.safetensors", architecture={"name": "resnet18", "width": 4})
    with pytest.raises(UserError, match=r"the architecture in .*half\.safetensors: .*missing.* 'classes'"):
        load(tmp_path / "half.safetensors")
    state = torch.get_rng_state()
    model, _ = load(path)
    assert_same(model, compressed.model)
    assert torch.equal(state, torch.get_rng_state())
    timm = {"name": "timm", "classes": 5, "channels": 3, "architecture": "resnet18", "width": 4, "pretrained": True}
    save_compressed(compressed, tmp_path / "net.safetensors", architecture=timm)
    asked = {}
    monkeypatch.setattr("pipeline.compressed.build_model", lambda **given: asked.update(given) or NETS["resnet18"][0]())
    load(tmp_path / "net.safetensors")
    assert asked == {**timm, "pretrained": None}
    save_compressed(compressed, tmp_path / "bare.safetensors")
    with pytest.raises(UserError, match=r"bare\.safetensors does not say its architecture; .*load_compressed"):
        load(tmp_path / "bare.safetensors")


def test_manifest_says_what_was_done(folded):
    compressed, path = folded
    manifest, report = read_manifest(path), compressed.report
    assert load(path)[1] == manifest
    assert (manifest["method"], manifest["ratio"], manifest["architecture"]) == ("fold", 0.5, NARROW)
    for count in ("params", "macs"):
        assert manifest[count] == getattr(report, f"{count}_after")
        assert manifest[f"{count}_before"] == getattr(report, f"{count}_before")
    assert manifest["source"] == {"file": "net.pt"}
    assert manifest["versions"]["torch"] in torch.__version__
    for group in report.groups:
        kept = manifest["groups"][group.name]
        assert (kept["before"], kept["after"], kept["error"]) == (group.before, group.after, group.error)
    # To any other reader the file is the state_dict.
    assert load_file(path).keys() == compressed.model.state_dict().keys()


def test_source_is_what_sha256sum_says(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"abc")
    assert source_of(tmp_path / "a.pt") == {
        "file": "a.pt",
        "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
    }
    first = source_of(tmp_path)
    (tmp_path / "b.pt").write_bytes(b"abc")
    assert source_of(tmp_path) != first
    (tmp_path / "b.pt").unlink()
    assert source_of(tmp_path) == first


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_number_format_is_the_files(dtype, tmp_path):
    build, example = NETS["resnet18"]
    model = randomise_(build()).to(dtype)
    compressed = compress(model, example.to(dtype), "fold", 0.5)
    save_compressed(compressed, tmp_path / "net.safetensors")
    assert_same(load_compressed(tmp_path / "net.safetensors", build())[0], compressed.model)


def test_memory_format_is_the_files(tmp_path):
    """The file decides also on weights that kept their shape, and on networks whose weights are in the usual format."""
    build, example = NETS["resnet18"]
    compressed = compress(randomise_(build()).to(memory_format=torch.channels_last), example, "fold", 0.5)
    save_compressed(compressed, tmp_path / "net.safetensors")
    model, _ = load_compressed(tmp_path / "net.safetensors", build())
    assert_same(model, compressed.model)
    assert not model.layer1[0].conv1.weight.is_contiguous()


def by_hand(model: nn.Module, full: nn.Module, **report) -> Compressed:
    """`model` as if a method outside this package had made it from `full`."""
    params = [sum(p.numel() for p in m.parameters()) for m in (full, model)]
    return Compressed(model, Report("hand", 0.5, (), (), *params, 0, 0, **report))


def with_buffers() -> nn.Module:
    def forward(net, x):
        return (net.body(x) * net.mask)[:, net.order] * net.scale

    return Net(
        forward, body=nn.Linear(4, 3), order=torch.arange(3), mask=torch.ones(3, dtype=torch.bool),
        empty=torch.zeros(0, 2), scale=torch.tensor(1.0),
    )  # fmt: skip


def test_buffers_that_are_no_floats(tmp_path):
    model = with_buffers()
    model.order.copy_(torch.tensor([2, 0, 1]))
    model.mask[1] = False
    save_compressed(by_hand(model, model), tmp_path / "net.safetensors")
    assert_same(load_compressed(tmp_path / "net.safetensors", with_buffers())[0], model)


def test_views_of_one_tensor_are_saved_as_two(tmp_path):
    """safetensors alone refuses tensors that share memory."""
    model = with_buffers()
    both = torch.arange(6.0)
    model.body.bias = nn.Parameter(both[:3])
    model.scale = both[5]
    save_compressed(by_hand(model, model), tmp_path / "net.safetensors")
    assert_same(load_compressed(tmp_path / "net.safetensors", with_buffers())[0], model)


class Heads(nn.Module):
    """Heads that keep their width as a Python number, and the scale that follows from it."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.scale = 4, 0.5
        self.query = nn.Linear(6, 8)

    def forward(self, x):
        return self.query(x).unflatten(-1, (-1, self.width)) * self.scale


def test_numbers_of_modules_follow(tmp_path):
    full = nn.Sequential(nn.Identity(), Heads())
    tensors = {"1.query.weight": torch.randn(4, 6), "1.query.bias": torch.randn(4)}
    numbers = {"1.width": 2, "1.scale": 0.5**0.5}
    narrow = resized(full, tensors, numbers)
    save_compressed(by_hand(narrow, full, numbers=numbers), tmp_path / "net.safetensors")
    model, _ = load_compressed(tmp_path / "net.safetensors", full)
    x = torch.randn(3, 6)
    assert (model[1].width, model[1].scale, model[1].query.out_features) == (2, 0.5**0.5, 4)
    assert torch.equal(model(x), narrow(x))
    assert model(x).shape == (3, 2, 2)
    other = nn.Sequential(nn.Identity(), Heads())
    del other[1].scale
    with pytest.raises(UserError, match=r"sets the number 1\.scale, which this Sequential has not"):
        load_compressed(tmp_path / "net.safetensors", other)


@pytest.mark.parametrize("part", ["width", "head"])
@pytest.mark.parametrize(("build", "example"), [NETS["vit"], (torch_attention, torch.randn(2, 5, 16))])
def test_smaller_attention(build, example, part, tmp_path):
    """Modules keep attention's sizes as numbers, and torch's own layer becomes a NarrowMultiheadAttention."""
    compressed = compress(randomise_(build()), example, "fold", 0.5, parts=["hidden", part])
    assert compressed.report.numbers
    save_compressed(compressed, tmp_path / "net.safetensors")
    model, manifest = load_compressed(tmp_path / "net.safetensors", build().eval())
    assert manifest["numbers"] == compressed.report.numbers
    assert_same(model, compressed.model)
    assert torch.equal(model(example), compressed.model(example))


def test_the_file_may_change_once_it_is_loaded(folded, tmp_path):
    compressed, path = folded
    copied = tmp_path / "net.safetensors"
    copied.write_bytes(path.read_bytes())
    model, _ = load(copied)
    with open(copied, "r+b") as file:  # in place, as copying another file over it does
        file.seek(copied.stat().st_size // 2)
        file.write(bytes(copied.stat().st_size // 2))
    assert_same(model, compressed.model)


# what cannot be read


def refused(path, model=None) -> str:
    """The error line that a user sees when loading the file."""
    with pytest.raises(UserError) as caught:
        load(path) if model is None else load_compressed(path, model)
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 400
    return line


def test_any_damage_is_found(folded, tmp_path):
    """A file is cut off anywhere, or one byte is changed anywhere: in a weight, too, where safetensors sees nothing."""
    content = folded[1].read_bytes()
    path = tmp_path / "net.safetensors"
    generator = torch.Generator().manual_seed(0)

    def draw(limit: int) -> int:
        return int(torch.randint(limit, (), generator=generator))

    header = int.from_bytes(content[:8], "little") + 8
    for size in (0, 4, 8, header // 2, header, *(draw(len(content)) for _ in range(5)), len(content) - 1):
        path.write_bytes(content[:size])
        assert str(path) in refused(path), size
    path.write_bytes(content + b"more")
    assert str(path) in refused(path)
    for place in (
        *range(8),
        *(draw(header) for _ in range(60)),
        *(header + draw(len(content) - header) for _ in range(20)),
    ):
        damaged = bytearray(content)
        damaged[place] ^= 1 << draw(8)
        path.write_bytes(damaged)
        refused(path, NETS["resnet18"][0]())


def rewritten(path, folder, **changes):
    """The file with other values in its manifest."""
    with safe_open(path, "pt") as file:
        manifest = json.loads(file.metadata()["foldability"])
    changed = folder / "changed.safetensors"
    save_file(load_file(path), changed, {"foldability": json.dumps({**manifest, **changes})})
    return changed


@pytest.mark.parametrize(
    ("changes", "fix"),
    [
        ({"format": 6}, "has format 6, this version reads 2 to 5; update foldability"),
        ({"format": 1}, "has format 1, this version reads 2 to 5; compress and save the checkpoint again"),
        ({"format": None}, "has format None, this version reads 2 to 5; compress and save the checkpoint again"),
        ({"ratio": 0.9}, "is damaged: its contents are not those of its checksum; copy it again"),
    ],
)
def test_other_formats(changes, fix, folded, tmp_path):
    path = rewritten(folded[1], tmp_path, **changes)
    assert refused(path) == f"{path} {fix}"


def test_no_file_and_other_files(tmp_path):
    path = tmp_path / "net.safetensors"
    assert refused(path) == f"no compressed network {path}"
    save_file({"a": torch.zeros(2)}, path)
    assert refused(path) == f"{path} does not say how it was compressed: it is no file of save_compressed"
    torch.save({"a": torch.zeros(2)}, path)
    assert "is damaged or no safetensors file" in refused(path)


def narrow(**changes):
    return build_model(**{**NARROW, **changes})


def untied():
    net = NETS["tied"][0]()
    net[3].weight = nn.Parameter(net[3].weight.detach().clone())
    return net


@pytest.mark.parametrize(
    ("saved", "model", "match"),
    [
        ("resnet18", lambda: narrow(classes=7), r"holds linear\.bias as \(10,\), which in this ResNet is \(7,\)"),
        ("resnet18", lambda: narrow(width=2), "was a network of 44,622 parameters, and this ResNet has 11,420"),
        ("resnet18", lambda: narrow(width=8), "was a network of 44,622 parameters, and this ResNet has 176,402"),
        ("resnet18", lambda: NETS["vgg"][0](), "holds bn1.bias, which this Sequential has not"),
        ("vgg", lambda: NETS["vgg"][0]()[:-1], "holds 11.bias, which this Sequential has not"),
        ("vgg", lambda: nn.Sequential(*NETS["vgg"][0](), nn.Linear(5, 5)), "lacks 12.bias of this Sequential"),
        ("tied", untied, r"and this Sequential differ in whether 3\.weight is one tensor with 1\.weight"),
    ],
)  # fmt: skip
def test_wrong_architecture(saved, model, match, tmp_path):
    build, example = NETS[saved]
    path = tmp_path / "net.safetensors"
    compressed = compress(randomise_(build()), example, "l2", 0.5)
    save_compressed(compressed, path)
    line = refused(path, model())
    assert line.endswith("; load it into its architecture at full size")
    with pytest.raises(UserError, match=match):
        load_compressed(path, model())
    save_compressed(compressed, path, architecture={"name": saved, "width": 4})
    assert refused(path, model()).endswith(f"; load it into {saved} of {{'width': 4}}")


# what cannot be written


class Remembers(nn.Linear):
    def get_extra_state(self):
        return {"scale": 3}

    def set_extra_state(self, state):
        pass


def test_state_that_is_no_tensor(tmp_path):
    model = nn.Sequential(Remembers(2, 2))
    with pytest.raises(UserError, match=r"0\._extra_state of Sequential is no tensor"):
        save_compressed(by_hand(model, model), tmp_path / "net.safetensors")


def test_about_must_be_json(folded, tmp_path):
    compressed, path = folded
    with pytest.raises(UserError, match=r"about of a compressed network must be plain JSON values: .*PosixPath"):
        save_compressed(compressed, tmp_path / "net.safetensors", {"run": path})
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_leaves_the_file_before(folded, tmp_path, monkeypatch):
    compressed, path = folded
    copied = tmp_path / "net.safetensors"
    copied.write_bytes(path.read_bytes())

    def fail(tensors, part, metadata):
        part.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("pipeline.compression.checkpoint.save_file", fail)
    with pytest.raises(OSError, match="No space"):
        save_compressed(compressed, copied)
    assert [file.name for file in tmp_path.iterdir()] == ["net.safetensors"]
    assert copied.read_bytes() == path.read_bytes()
