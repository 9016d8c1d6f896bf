"""A smaller model of transformers becomes a folder that from_pretrained reads, or one line says why it cannot."""

import pytest
import torch
from tiny_models import LANGUAGE_MODELS, TEXTS, write_huggingface_vit, write_language_model

from pipeline.compression import compress
from pipeline.models import build_model
from pipeline.models.huggingface_folder import export_huggingface
from pipeline.tables import UserError

transformers = pytest.importorskip("transformers")
IDS = torch.randint(31, (2, 12), generator=torch.Generator().manual_seed(0))


def smaller(folder, kind="llama", parts=("hidden",), method="l2"):
    net = build_model("language_model", **TEXTS, architecture=str(write_language_model(folder, kind))).eval()
    return compress(net, IDS[:1], method, 0.5, parts=parts).model


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
@pytest.mark.parametrize("parts", [("hidden",), ("head",), ("hidden", "head")])
def test_a_smaller_language_model_is_a_folder(kind, parts, tmp_path):
    if "head" in parts and kind == "gpt2":
        pytest.skip("GPT-2's config has no number of channels beside that of the stream")
    net = smaller(tmp_path / "full", kind, parts)
    assert export_huggingface(net, IDS[:1], tmp_path / "small") < 1e-6
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, net(IDS))
    assert again.generate(IDS[:1, :4], max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (1, 7)


def test_an_image_classifier_is_a_folder_too(tmp_path):
    net = build_model("huggingface", 5, 3, architecture=str(write_huggingface_vit(tmp_path / "full"))).eval()
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    net = compress(net, x, "fold", 0.5, parts=("hidden",)).model
    export_huggingface(net, x, tmp_path / "small")
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "small").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(x).logits, net(x))


def test_sizes_that_differ_from_layer_to_layer_are_refused(tmp_path):
    net = build_model("language_model", **TEXTS, architecture=str(write_language_model(tmp_path / "full"))).eval()
    net = compress(net, IDS[:1], "l2+protect=[model.model.layers.0]+parts=[hidden]", 0.5).model
    with pytest.raises(UserError, match="the config of LlamaForCausalLM cannot say these sizes"):
        export_huggingface(net, IDS[:1], tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_other_networks_are_refused(tmp_path):
    with pytest.raises(UserError, match="Linear is no model of transformers; export it as onnx or program"):
        export_huggingface(torch.nn.Linear(2, 2), torch.ones(1, 2), tmp_path / "small")
