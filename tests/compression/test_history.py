"""The history of a network travels with it: through copies, further compressions and files."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from toy_nets import NETS, randomise_, torch_attention

from pipeline.compressed import load
from pipeline.compression import Compressed, compress
from pipeline.compression.checkpoint import (
    OF_A_STEP,
    digest_of,
    is_compressed,
    load_compressed,
    read_manifest,
    save_compressed,
)
from pipeline.compression.compress import step_of
from pipeline.compression.copies import bare_copy
from pipeline.compression.plan import Step, history, remember_

NARROW = {"name": "resnet18", "classes": 10, "channels": 3, "width": 4}
CHAINS = {
    "resnet18": [("fold", 0.3, {}), ("l1", 0.5, {}), ("lamp", 0.5, {})],
    "mobile": [("lamp", 0.5, {}), ("l2", 0.3, {}), ("fold", 0.5, {})],
    "tied": [("fold", 0.5, {}), ("l1", 0.5, {})],
    "vit": [("fold", 0.3, {"parts": ["hidden", "width"]}), ("l1", 0.5, {}), ("l2", 0.5, {"parts": ["width"]})],
    "attention": [("fold", 0.5, {"parts": ["width"]}), ("l1", 0.5, {})],
}
MORE = {"attention": (torch_attention, torch.randn(2, 5, 16))}


def chained(name: str) -> tuple[Compressed, list[Step]]:
    """The network after its chain, and the steps as the reports tell them."""
    build, example = {**NETS, **MORE}[name]
    model, steps = randomise_(build()), []
    for method, ratio, options in CHAINS[name]:
        compressed = compress(model, example, method, ratio, **options)
        model = compressed.model
        steps.append(step_of(compressed.report))
    return compressed, steps


@pytest.mark.parametrize("name", CHAINS)
def test_a_network_compressed_several_times_and_tuned_reloads_with_its_chain(name, tmp_path):
    build, example = {**NETS, **MORE}[name]
    compressed, steps = chained(name)
    assert history(compressed.model) == tuple(steps)
    with torch.no_grad():
        next(compressed.model.parameters()).mul_(1.5)
    tuned = Step("tune", {"epochs": 3})
    remember_(compressed.model, tuned)
    path = tmp_path / "net.safetensors"
    save_compressed(compressed, path)
    full = build().eval()
    model, manifest = load_compressed(path, full)
    assert history(full) == ()
    assert history(model) == (*steps, tuned)
    tensors, others = compressed.model.state_dict(), model.state_dict()
    assert list(tensors) == list(others)
    assert all(torch.equal(tensors[n], others[n]) for n in tensors)
    assert torch.equal(model(example), compressed.model(example))
    report = compressed.report
    assert (manifest["method"], manifest["ratio"]) == (report.method, report.ratio)
    assert (manifest["params"], manifest["macs"]) == (report.params_after, report.macs_after)
    assert manifest["params_before"] == sum(p.numel() for p in full.parameters()) > report.params_before
    assert manifest["macs_before"] == steps[0].about["macs_before"]
    assert manifest["chain"] == [{"stage": step.stage, **step.about} for step in (*steps, tuned)]
    # The loaded network is compressed, saved and loaded again.
    again = compress(model, example, "random", 0.25)
    save_compressed(again, path)
    last, _ = load_compressed(path, full)
    assert history(last) == (*steps, tuned, step_of(again.report))
    assert torch.equal(last(example), again.model(example))


def test_a_fresh_process_reads_the_chain_without_pickle(tmp_path):
    compressed, _ = chained("resnet18")
    save_compressed(compressed, tmp_path / "net.safetensors", architecture=NARROW)
    program = (
        "import pickle, sys, torch\n"
        "from pipeline.compressed import load\n"
        "from pipeline.compression.plan import history\n"
        "pickle.load = pickle.loads = pickle.Unpickler = torch.load = None\n"
        "model, manifest = load(sys.argv[1])\n"
        "print([step.stage for step in history(model)], model(torch.ones(1, 3, 8, 8)).tolist())\n"
    )
    command = [sys.executable, "-c", program, tmp_path / "net.safetensors"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    expected = compressed.model(torch.ones(1, 3, 8, 8)).tolist()
    assert done.stdout.strip() == f"['fold', 'l1', 'lamp'] {expected}", done.stderr


def test_copies_keep_the_history_and_have_their_own():
    build, example = NETS["resnet18"]
    model = randomise_(build())
    first, second = Step("tune", {"epochs": 1}), Step("repair")
    remember_(model, first)
    for copied in (copy.deepcopy(model), bare_copy(model), bare_copy(torch.compile(model))):
        assert history(copied) == (first,)
        remember_(copied, second)
        assert history(copied) == (first, second)
    smaller, report = compress(model, example, "fold", 0.5)
    masked, mask = compress(smaller, example, "magnitude", 0.5)
    assert history(model) == (first,)
    assert history(smaller) == (first, step_of(report))
    assert history(masked) == (first, step_of(report), step_of(mask))
    compiled = torch.compile(model)
    remember_(compiled, second)
    assert history(model) == history(compiled) == (first, second)


def test_of_auto_one_step_is_remembered_with_what_it_chose():
    build, example = NETS["resnet18"]
    smaller, report = compress(randomise_(build()), example, "auto", 0.5, candidates=["fold", "l2"])
    assert history(smaller) == (step_of(report),)
    assert history(smaller)[0].stage == "auto+candidates=[fold,l2]"
    assert history(smaller)[0].about["method"] in ("auto (fold)", "auto (l2)")


def test_steps_are_json():
    compressed, steps = chained("mobile")
    for step in steps:
        assert json.loads(json.dumps(step.about)) == step.about
    assert steps[0].about["layers"].keys() == {row.name for row in _lamp().report.layers}
    assert steps[0].about["groups"] == {}
    assert {n: g["labels"] for n, g in steps[2].about["groups"].items()} == {
        g.name: g.labels.tolist() for g in compressed.report.groups
    }


def _lamp() -> Compressed:
    build, example = NETS["mobile"]
    return compress(randomise_(build()), example, "lamp", 0.5)


@pytest.mark.parametrize("name", ["resnet18", "vit"])
def test_files_of_format_2_still_load(name, tmp_path):
    """Files of format 2 hold the fields of one compression at the top level, and no chain."""
    build, example = NETS[name]
    compressed = compress(randomise_(build()), example, "fold", 0.5, parts=["hidden", "width"])
    path = tmp_path / "net.safetensors"
    save_compressed(compressed, path, architecture=NARROW)
    with safe_open(path, "pt") as file:
        manifest = json.loads(file.metadata()["foldability"])
    del manifest["chain"]
    tensors, text = load_file(path), json.dumps({**manifest, "format": 2})
    save_file(tensors, path, {"foldability": text, "sha256": digest_of(text, tensors)})
    model, found = load_compressed(path, build().eval())
    assert torch.equal(model(example), compressed.model(example))
    assert history(model) == (Step("fold", step_of(compressed.report).about),)
    assert found.pop("chain") == [{"stage": "fold", "method": "fold", **{key: manifest[key] for key in OF_A_STEP}}]
    assert found == {**manifest, "format": 2}
    again = compress(model, example, "l1", 0.5)
    save_compressed(again, path)
    assert [step["stage"] for step in read_manifest(path)["chain"]] == ["fold", "l1"]
    assert torch.equal(load_compressed(path, build().eval())[0](example), again.model(example))


def test_which_files_are_compressed_networks(tmp_path):
    compressed, _ = chained("tied")
    save_compressed(compressed, tmp_path / "net.safetensors")
    save_file({"a": torch.zeros(2)}, tmp_path / "plain.safetensors")
    torch.save({"a": torch.zeros(2)}, tmp_path / "net.pt")
    found = [path for path in (*tmp_path.iterdir(), tmp_path, tmp_path / "none") if is_compressed(path)]
    assert found == [tmp_path / "net.safetensors"]


def test_a_network_without_a_history_has_the_chain_of_its_report(tmp_path):
    build, example = NETS["resnet18"]
    model, report = compress(randomise_(build()), example, "fold", 0.5)
    rebuilt = copy.deepcopy(model)
    del rebuilt.compression_history
    save_compressed(Compressed(rebuilt, report), tmp_path / "net.safetensors", architecture=NARROW)
    assert history(load(tmp_path / "net.safetensors")[0]) == (step_of(report),)
