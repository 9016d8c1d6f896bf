"""A weight that a mask removed stays zero in every stage behind it, in files, and in a training that goes on."""

from pathlib import Path

import pytest
import torch
from chains_to_kill import LABELS, PICTURES, ground, net, rows_of
from lightning import Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pipeline.chains import network_of, nodes
from pipeline.compression import compress
from pipeline.compression.checkpoint import load_compressed, save_compressed
from pipeline.stages import parse_chain
from pipeline.tasks import Classification
from pipeline.training import Training

BEHIND = "tune(lr=0.01) > distil(lr=0.01,features=1) > repair > tune_norms > quantize(bits=4) > repair"


def zeros(model: nn.Module) -> dict[str, torch.Tensor]:
    """{weight of a layer: where it is zero}"""
    return {name: p == 0 for name, p in model.named_parameters() if p.dim() > 1}


@pytest.mark.parametrize(
    "text", [f"magnitude@0.5 > {BEHIND}", "n_m@0.5 > tune(lr=0.01) > quantize(bits=4,rounding=gptq) > repair"]
)
def test_a_mask_holds_through_every_later_stage_and_reload(tmp_path, text):
    chain = parse_chain(text)
    rows = rows_of([text], ground(tmp_path))
    assert {row.status for row in rows} == {"ok"}, [row.reason for row in rows]
    fresh = ground(tmp_path)  # knows nothing but the files
    made = {beginning: network_of(beginning, fresh) for beginning in nodes([chain])}
    masked = zeros(made[chain[:1]])
    assert 0.45 < sum(int(z.sum()) for z in masked.values()) / sum(z.numel() for z in masked.values()) < 0.55
    for beginning, found in made.items():
        for name, zero in masked.items():
            assert not found.get_parameter(name)[zero].any(), f"{beginning[-1]}: {name}"
    tuned, before = made[chain[:2]], made[chain[:1]]
    assert not torch.equal(tuned.get_parameter("0.weight"), before.get_parameter("0.weight")), "the others learn"


def test_a_mask_holds_where_a_file_is_trained_on(tmp_path: Path):
    masked, _ = compress(net(), PICTURES[:1], "magnitude", 0.5)
    save_compressed(masked, tmp_path / "masked.safetensors")
    loaded, _ = load_compressed(tmp_path / "masked.safetensors", net().train())
    before = {name: p.detach().clone() for name, p in loaded.named_parameters()}
    module = Training(
        loaded,
        Classification("multiclass", "logits", classes=4),
        {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.1},
        {"name": "constant"},
    )
    trainer = Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    data = DataLoader(TensorDataset(PICTURES, LABELS), 16)
    trainer.fit(module, data, data)
    for name, zero in zeros(masked).items():
        weight = module.net.get_parameter(name)
        assert not weight[zero].any(), name
        assert not torch.equal(weight, before[name]), name
