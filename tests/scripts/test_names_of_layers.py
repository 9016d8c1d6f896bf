"""Names of layers that a network does not have are refused before a cell has a folder, whichever option holds them."""

import re
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
from composing import TINY

from callbacks.pacing import Pacing
from pipeline.compression.recipe import SECTIONS
from pipeline.models import build_model
from pipeline.stages.chain import STAGES
from pipeline.stages.distil import Lesson
from scripts.train import start

QUICK = ["experiment=quickstart", *TINY, "model.width=4", "data.train_size=64"]
# {option that holds names: {settings: what is said}}; parts are names of kinds of channels, which a network may lack.
HOLDERS = {
    "protect": {
        ("compression.methods=['fold+protect=[layr1]']",): "begins with 'layr1' (did you mean 'layer1'?)",
        ("shrink.method='fold+protect=[layr1]'",): "begins with 'layr1' (did you mean 'layer1'?)",
        ("compression.stages=['fold+protect=[layr1]@0.2 > repair']",): "begins with 'layr1' (did you mean 'layer1'?)",
        ("chain='fold+protect=[layr1]@0.5'",): "begins with 'layr1' (did you mean 'layer1'?)",
    },
    "layers": {
        ("shrink.method=fold", "shrink.layers={layr1:0.2}"): "begins with 'layr1', which has a ratio (did you mean",
        ("shrink.method=magnitude", "shrink.layers={linaer:0}"): "(did you mean 'linear'?); there are",
        ("shrink.method=fold", "shrink.layers={7:0.2}"): "begins with '7', which has a ratio; there are",
        ("shrink.method=fold", "shrink.layers=[layer1]"): "layers must be {beginning of a layer's name: its own ratio}",
        ("distil.teacher=WISE", "distil.features=1", "distil.layers=[layr1]"): "'layr1' (did you mean 'layer1'?)",
        ("distil.teacher=WISE", "distil.features=1", "distil.layers=[layer1:layr2]"): "teacher has no layer 'layr2'",
        ("distil.teacher=WISE", "distil.features=1", "distil.layers=[1]"): "layers are names, got 1; put it in quotes",
        ("compression.stages=['distil(features=1,layers=[layr1])']",): "'layr1' (did you mean 'layer1'?)",
        ("chain='fold@0.5 > distil(features=1,layers=[layr1])'",): "'layr1' (did you mean 'layer1'?)",
    },
    "parts": {
        ("compression.parts=[hiden]",): "unknown part 'hiden' (did you mean 'hidden'?)",
        ("compression.parts=[width]",): "ResNet has no channels that can be compressed",
        ("shrink.method=fold", "compression.methods=[magnitude]", "compression.parts=[width]"): "ResNet has no",
        ("chain='fold+parts=[width]@0.5'",): "ResNet has no channels that can be compressed",
    },
    "units": {
        ("compression.methods=[fold+neurons]",): "ResNet has no groups of neurons",
        ("shrink.method=fold+neurons",): "ResNet has no groups of neurons",
    },
    "candidates": {("compression.methods=['auto+candidates=[fodl]']",): "unknown candidate 'fodl' (did you mean"},
}  # fmt: skip


@pytest.fixture(scope="module")
def wise(tmp_path_factory) -> Path:
    """The weights of a network, to learn from."""
    file = tmp_path_factory.mktemp("wise") / "wise.pt"
    torch.save(build_model("resnet18", 10, 1, width=4).state_dict(), file)
    return file


@pytest.mark.parametrize("settings", [settings for found in HOLDERS.values() for settings in found], ids=" ".join)
def test_a_wrong_name_of_a_layer_is_one_line_and_leaves_no_folder(settings, wise, tmp_path, capsys, monkeypatch):
    message = next(found[settings] for found in HOLDERS.values() if settings in found)
    taken = {setting.partition("=")[0] for setting in settings}
    rest = [setting for setting in QUICK if setting.partition("=")[0] not in taken]
    said = [setting.replace("WISE", str(wise)) for setting in settings]
    monkeypatch.setattr("sys.argv", ["train"])
    with pytest.raises(SystemExit) as ended:
        start([*rest, *said, f"paths.runs={tmp_path / 'runs'}"])
    assert ended.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.match("error: .*" + re.escape(message), error)
    assert not (tmp_path / "runs").exists()


def test_every_option_that_can_hold_names_is_tried():
    records = [*SECTIONS.values(), *STAGES.values(), Lesson, Pacing]
    holding = {
        f.name
        for record in records
        for f in fields(record)
        if re.search(r"tuple\[str|Mapping\[str", str(get_type_hints(record)[f.name]))
    }
    assert holding <= set(HOLDERS)
    assert {"protect", "layers", "parts"} <= holding
