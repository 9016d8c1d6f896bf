"""The scripts that train and compress networks of pictures do so for language models: no path of their own."""

import polars as pl
import pytest
import torch
from composing import TINY, composed, composed_compress, shrunk
from tiny_models import write_language_model

from callbacks import Throughput
from pipeline.compressed import load
from pipeline.data.text.tokenizers import train_bpe
from pipeline.results import read
from pipeline.tables import UserError
from scripts.build_data import build_data, data_options
from scripts.build_network import build_net, task_of
from scripts.compress import run
from scripts.naming import cell_of
from scripts.train import run as train

transformers = pytest.importorskip("transformers")
TEXT = ["data=text", "data.context=16", "data.eval_batch_size=4", "data.test_fraction=0.2"]


@pytest.fixture
def text(story, tmp_path):
    return [*TEXT, f"data.root={story}", "data.separator='<|endoftext|>'", f"data.cache={tmp_path / 'cache'}"]


@pytest.fixture
def folder(story, tmp_path):
    """A language model as Hugging Face keeps it, with the tokenizer that it was trained with."""
    folder = write_language_model(tmp_path / "llama", vocab_size=300)
    train_bpe([story.read_text()], 290).backend.save(str(folder / "tokenizer.json"))
    return folder


def compressed(folder, text, tmp_path, *overrides):
    few = ["ratios=[0.5]", "methods=[fold,l1,l2+data]", "profile.seconds=0.01", f"paths.runs={tmp_path / 'runs'}"]
    return composed_compress(f"checkpoint={folder}", "model=language_model", *text, *few, *overrides)


def test_a_folder_of_hugging_face_is_compressed_in_one_command(folder, text, tmp_path, capsys):
    config = compressed(folder, text, tmp_path, "export=[huggingface]")
    cell = run(config)
    shown = capsys.readouterr().out
    assert "windows of 16 tokens" in shown
    assert "Dense perplexity" in shown
    assert "batch 8" in shown
    assert "Smaller networks, 1 in all" in shown
    rows = read(cell / "rows.parquet")
    assert set(rows["status"]) == {"ok"}, set(rows["reason"])
    assert set(rows["task"]) == {"language"}
    data = build_data(config)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    batches = list(data.test_dataloader())
    with torch.no_grad():
        counts = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
        losses = [float(theirs(batch["input_ids"], labels=batch["labels"]).loss) for batch in batches]
    mean = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    assert rows.filter(method="dense")["loss"].item() == pytest.approx(mean, rel=1e-5)
    small, manifest = load(cell / "compressed/fold-r0.5-raw.safetensors")
    assert manifest["about"]["windows"]["tokenizer"] == str(folder)
    again = transformers.AutoModelForCausalLM.from_pretrained(cell / "compressed/fold-r0.5-raw").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(data.example).logits, small(data.example))
    assert small.generate(data.example[:, :4], max_new_tokens=2, do_sample=False, pad_token_id=0).shape == (1, 6)


@pytest.mark.parametrize("chains", [[], ["chain=l1@0.5"]])
def test_a_model_that_is_surer_of_wrong_tokens_than_chance_is_told(folder, text, tmp_path, chains):
    """As where its tokenizer is another one of the same size."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight.mul_(1000)
    model.save_pretrained(folder)
    given = chains or ["methods=[fold]", "ratios=[0.5]"]
    few = ["profile.seconds=0.01", f"paths.runs={tmp_path / 'runs'}"]
    config = composed_compress(f"checkpoint={folder}", "model=language_model", *text, *few, *given)
    with pytest.warns(RuntimeWarning, match=r"uncompressed .* perplexity of \S+ is no better than chance, 300\.0;"):
        run(config)


def test_a_text_is_read_by_the_models_own_tokenizer(folder, text, tmp_path):
    options = data_options(compressed(folder, text, tmp_path))
    assert (options["tokenizer"], options["vocabulary"]) == (str(folder), None)
    named = data_options(compressed(folder, text, tmp_path, "data.tokenizer=bytes", "data.vocabulary=null"))
    assert named["tokenizer"] == "bytes"
    assert data_options(composed("experiment=llama_tiny"))["tokenizer"] == "bpe"
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"llama has no tokenizer \(tokenizer.json\); give the one"):
        data_options(compressed(folder, text, tmp_path))


def test_a_gguf_file_brings_its_weights_as_architecture(tmp_path):
    (tmp_path / "net.gguf").write_bytes(b"GGUF")
    config = composed_compress(f"checkpoint={tmp_path / 'net.gguf'}", "model=language_model", "data=pydoc")
    assert (config["checkpoint"], config["model"]["architecture"]) == (None, str(tmp_path / "net.gguf"))
    assert config["profile"]["batch_sizes"] == [1, 8]
    cell = cell_of(config)
    (tmp_path / "net.gguf").write_bytes(b"GGUF of other weights")
    assert cell_of(config) != cell


def test_a_tiny_llama_trains_and_what_it_keeps_loads(story, tmp_path, capsys):
    options = [option for option in TINY if "limit_train" not in option]
    overrides = ["compression.save=true", "compression.every_n_epochs=0", f"paths.runs={tmp_path}"]
    config = composed("experiment=llama_tiny", *options, *overrides, "+data.root=x")
    config = shrunk(config, {"text": story, "cache": str(tmp_path / "cache")})
    config["data"].update({"name": "text", "root": str(story), "train_size": 16})
    cell = train(config)
    shown = capsys.readouterr().out
    assert "16 windows to train on" in shown
    assert "Dense perplexity" in shown
    metrics = pl.read_csv(cell / "metrics/version_0/metrics.csv")
    assert metrics["train/tokens_per_second"].drop_nulls().item() > 0
    rows = read(cell / "rows.parquet").filter(method="fold")
    model, manifest = load(cell / "compressed/epoch001/fold-r0.5-raw.safetensors")
    assert manifest["params"] == sum(p.numel() for p in model.parameters()) == rows["params"].item()
    trained = {**config, "checkpoint": str(cell / "last.ckpt"), "profile": {}, "export": [], "device": "cpu"}
    net = build_net(trained, build_data(config))
    assert manifest["params_before"] == sum(p.numel() for p in net.parameters())


def test_a_training_that_was_cut_off_goes_on_within_an_epoch(story, tmp_path, monkeypatch):
    def configured(runs):
        options = [option for option in TINY if "limit_" not in option]
        every = ["save_every_n_steps=4", "compression.every_n_epochs=0", f"paths.runs={tmp_path / runs}"]
        config = composed("experiment=llama_tiny", *options, *every, "trainer.max_epochs=2")
        config = shrunk(config, {"text": story, "cache": str(tmp_path / "cache")})
        config["data"].update({"name": "text", "root": str(story), "train_size": 80, "batch_size": 8})
        return config

    whole = train(configured("whole"))
    seen = []

    def batch_end(self, trainer, *args):
        seen.append(trainer.global_step)
        if trainer.global_step == 16 and len(seen) == 16:
            raise KeyError("cut off")

    monkeypatch.setattr(Throughput, "on_train_batch_end", batch_end)
    with pytest.raises(KeyError):
        train(configured("cut"))
    cut = train(configured("cut"))
    assert seen == [*range(1, 17), *range(13, 21)], "on from the last file, of step 12, in the second epoch"
    states = [torch.load(folder / "last.ckpt", weights_only=True)["state_dict"] for folder in (whole, cut)]
    assert all(torch.equal(t, states[1][name]) for name, t in states[0].items())
    assert whole.name == cut.name, "when files are kept is no part of a cell"


# Names that cells had before there were tasks.
CELLS = {
    "quickstart": "afbc895df2",
    "cifar10_vit": "27739b9cf0",
}


@pytest.mark.parametrize("experiment", CELLS)
def test_cells_of_pictures_keep_the_names_that_they_had(experiment):
    assert cell_of(composed(f"experiment={experiment}")) == f"{experiment}-{CELLS[experiment]}"
    assert cell_of(composed(f"experiment={experiment}", "task=classification")).endswith(CELLS[experiment])
    assert not cell_of(composed(f"experiment={experiment}", "compile=true")).endswith(CELLS[experiment])
    for beside in ("sharpness=true", "sharpness={rho:0.1}", "corruptions=[fog]"):
        assert not cell_of(composed(f"experiment={experiment}", f"compression.{beside}")).endswith(CELLS[experiment])


def test_a_task_that_does_not_fit_the_data_is_refused():
    config = composed("experiment=quickstart", "task=language")
    with pytest.raises(UserError, match="task 'language' is not for pictures; leave it out for 'classification'"):
        task_of(config, build_data(config))
    with pytest.raises(UserError, match=r"unknown task 'languages' .*did you mean 'language'"):
        task_of(composed("experiment=quickstart", "task.name=languages"), build_data(config))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=llama_tiny", "data=digits"], "model 'llama' reads text, the data are pictures"),
        (
            ["model=resnet18", "data=pydoc", "data.tokenizer=bytes"],
            "model 'resnet18' reads pictures, the data",
        ),
        (["experiment=llama_tiny", "data.mixup=0.2"], "has no option 'mixup'"),
    ],
)
def test_models_and_data_that_do_not_fit_are_refused(overrides, message, tmp_path):
    cache = [f"data.cache={tmp_path}"] * ("data=digits" not in overrides)
    config = composed(*overrides, *cache)
    if config["data"]["name"] == "pydoc":
        config["data"]["vocabulary"] = None
    with pytest.raises(UserError, match=message):
        build_net(config, build_data(config))
