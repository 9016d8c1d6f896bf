"""Training on the answers of another network: what is learned, what is kept of it, and what is refused."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from composing import TINY, composed, composed_compress, shrunk
from lightning import LightningDataModule
from torch import nn

from pipeline.cells import read_record
from pipeline.compression import compress
from pipeline.compression.checkpoint import save_compressed
from pipeline.data.text.tokenizers import Bytes, train_bpe
from pipeline.results import read
from pipeline.tables import UserError
from pipeline.training import Training
from scripts.build_data import build_data
from scripts.build_network import architecture_of, build_net
from scripts.build_training import build_task
from scripts.compress import run as compress_run
from scripts.naming import cell_of
from scripts.teachers import check_tokenizer, learning, teacher
from scripts.train import run

QUICK = ["experiment=quickstart", "model.width=4", "data.test_size=50", *TINY]


@pytest.fixture(scope="module")
def wise(tmp_path_factory) -> Path:
    """The checkpoint of a training, to learn from."""
    return run(composed(*QUICK, "model.width=6", f"paths.runs={tmp_path_factory.mktemp('wise')}")) / "last.ckpt"


def large(wise: Path, width: int = 6) -> list[str]:
    return ["distil.teacher=large", f"teachers={{large:{{checkpoint:{wise},model:{{name:resnet18,width:{width}}}}}}}"]


def longer(epochs: int) -> list[str]:
    return [*(o for o in QUICK if "max_epochs" not in o), f"trainer.max_epochs={epochs}"]


@pytest.mark.parametrize("features", [[], ["distil.features=1", "distil.layers=[layer1,layer4]"]])
def test_the_checkpoint_holds_no_tensor_of_the_teacher(wise, tmp_path, features):
    chain = ["chain='fold@0.5 > repair'", "profile.runtimes=[]"] * bool(features)
    config = composed(*QUICK, *large(wise), *features, *chain, f"paths.runs={tmp_path}")
    folder = run(config)
    kept = torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]
    data = build_data(config)
    own = build_net({**config, "checkpoint": None}, data).state_dict()
    assert {name.removeprefix("net.") for name in kept if name.startswith("net.")} == set(own)
    others = {name for name in kept if not name.startswith("net.")}
    assert others == ({"regressors.0.weight", "regressors.1.weight"} if features else set())
    again = build_net({**config, "checkpoint": str(folder / "last.ckpt")}, data)
    assert all(torch.equal(t, kept[f"net.{name}"]) for name, t in again.state_dict().items())
    assert not chain or set(read(folder / "chains.parquet")["status"]) == {"ok"}
    dense = read(folder / "rows.parquet").filter(method="dense", split="test")
    assert dense["task"].item() == "classification"


def test_without_labels_the_loss_is_the_distance_from_the_teacher(wise):
    config = composed(*QUICK, *large(wise))
    data = build_data(config)
    module = learning(build_task(config, data), config, data)
    teacher = build_net({**config, "checkpoint": str(wise), "model": {"name": "resnet18", "width": 6}}, data).eval()
    pictures, labels = data.train_data.__getitems__(range(16))
    module.train()
    said, taught = module.net(pictures), teacher(pictures).detach()
    kl = nn.functional.kl_div((said / 4).log_softmax(1), (taught / 4).softmax(1), reduction="batchmean")
    found = module.task.loss(said, (pictures, labels.flip(0)))
    torch.testing.assert_close(found, 16 * kl)
    module.backward(found)
    assert not any(p.grad is None for p in module.net.parameters())


def test_a_run_that_is_cut_off_goes_on_bit_for_bit_with_its_regressors(wise, tmp_path, monkeypatch):
    options = [*large(wise), "distil.features=1", "distil.layers=[layer1,layer2]", "compression.every_n_epochs=0"]
    whole = run(composed(*longer(2), *options, f"paths.runs={tmp_path / 'whole'}"))
    config = composed(*longer(2), *options, f"paths.runs={tmp_path / 'cut'}")
    real, epochs = Training.training_step, []

    def step(self, *args):
        epochs.append(self.current_epoch)
        if epochs == [0, 1]:
            raise RuntimeError("cut off")
        return real(self, *args)

    monkeypatch.setattr(Training, "training_step", step)
    with pytest.raises(RuntimeError, match="cut off"):
        run(config)
    resumed = run(config)
    assert epochs == [0, 1, 1]
    a, b = (torch.load(folder / "last.ckpt", weights_only=True)["state_dict"] for folder in (whole, resumed))
    assert any(name.startswith("regressors") for name in a)
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


def test_a_teacher_of_the_same_layers_needs_no_names(wise):
    config = composed(*QUICK, *large(wise), "distil.features=1")
    data = build_data(config)
    shapes = [tuple(r.weight.shape) for r in learning(build_task(config, data), config, data).regressors.values()]
    assert len(shapes) > 8
    assert set(shapes) == {(6 * n, 4 * n) for n in (1, 2, 4, 8)}
    config = composed(*QUICK, "model.width=6", f"distil.teacher={wise}", "distil.features=1")
    data = build_data(config)
    module = learning(build_task(config, data), config, data)
    assert not module.regressors, "the widths are alike"
    pictures, labels = data.train_data.__getitems__(range(4))
    module.eval()
    far = module.task.loss(module.net(pictures), (pictures, labels))
    module.net.load_state_dict(build_net({**config, "checkpoint": str(wise)}, data).state_dict())
    assert module.task.loss(module.net(pictures), (pictures, labels)) < 1e-6 < far


def test_a_language_model_learns_from_another(story, tmp_path):
    text = ["model=llama_tiny", "data=text", f"data.root={story}", "compression.stages=[raw]", *TINY]
    first = run(shrunk(composed(*text, f"paths.runs={tmp_path}"), {"text": story, "cache": str(tmp_path / "cache")}))
    lesson = [f"distil.teacher={first / 'last.ckpt'}", "distil.labels=0.5", f"paths.runs={tmp_path}", "seed=1"]
    folder = run(shrunk(composed(*text, *lesson), {"text": story, "cache": str(tmp_path / "cache")}))
    assert folder != first
    dense = read(folder / "rows.parquet").filter(method="dense", split="test")
    assert dense["metric"].item() == read(first / "rows.parquet")["metric"][0]
    assert read_record(folder)["state"] == "done"


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> Path:
    """The checkpoint of a training on the text beside it, read as bytes."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "text.txt").write_text(
        "<|endoftext|>".join(f"the cat of number {i} sat on a mat " * 8 for i in range(40))
    )
    trained = run(reads(folder, None)[0] | {"paths": {"runs": str(folder / "runs")}}) / "last.ckpt"
    return trained.rename(folder / "last.ckpt")


def reads(folder: Path, taught_by: Path | None) -> tuple[dict, LightningDataModule]:
    """(a config with the text in this folder, whose teacher is a file; its data)"""
    lesson = [] if taught_by is None else [f"distil.teacher={taught_by}"]
    config = composed(
        "model=llama_tiny", "data=text", f"data.root={folder}", "compression.stages=[raw]", *lesson, *TINY
    )
    config = shrunk(config, {"text": folder / "text.txt", "cache": str(folder / "cache")})
    return config, build_data(config)


class Swapped(Bytes):
    """As many ids as bytes, which stand for other bytes."""

    def encode(self, texts):
        return [(255 - ids, sizes) for ids, sizes in Bytes.encode(self, texts)]


@pytest.mark.parametrize("compressed", [False, True])
def test_a_teacher_of_another_tokenizer_with_as_many_ids_is_refused(reader, tmp_path, compressed):
    config, data = reads(reader.parent, reader)
    file = str(reader)
    if compressed:
        small = compress(build_net({**config, "checkpoint": file}, data).eval(), data.example, "fold", 0.5)
        file = str(tmp_path / "small.safetensors")
        save_compressed(small, file, {data.unit: data.preparation()}, architecture=architecture_of(config, data))
    teacher(file, config, data, torch.device("cpu"))
    data.tokenizer = Swapped(identity="swapped")
    with pytest.raises(UserError, match="has another tokenizer than the data, bytes") as caught:
        teacher(file, config, data, torch.device("cpu"))
    assert "\n" not in str(caught.value)


def test_a_folder_of_hugging_face_says_its_tokenizer(reader, tmp_path):
    """By its words, because one tokenizer may be written down in two ways."""
    _, data = reads(reader.parent, None)
    text = (reader.parent / "text.txt").read_text()
    trained, other = train_bpe([text], 300), train_bpe([text[::-1]], 300)
    data.tokenizer = trained
    trained.backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    check_tokenizer("t", None, str(tmp_path), data)
    data.tokenizer = other
    with pytest.raises(UserError, match="teacher 't' has another tokenizer"):
        check_tokenizer("t", None, str(tmp_path), data)


def test_a_teacher_that_does_not_say_its_tokenizer_is_told_of(reader, tmp_path):
    weights = tmp_path / "weights.pt"
    torch.save(torch.load(reader, weights_only=True)["state_dict"], weights)
    config, data = reads(reader.parent, weights)
    with pytest.warns(RuntimeWarning, match="does not say its tokenizer; it is taken to be that of the data, bytes"):
        teacher(str(weights), config, data, torch.device("cpu"))


def test_on_two_processes_answers_and_features_are_learned_as_on_one(tmp_path):
    script = Path(__file__).parent / "taught_on_two_processes.py"
    result = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, timeout=300)
    assert "one lesson" in result.stdout, result.stdout + result.stderr


def test_a_cell_is_named_by_the_weights_of_its_teacher_and_only_where_it_has_one(wise, tmp_path):
    plain = composed(*QUICK)
    old = {key: value for key, value in plain.items() if key != "distil"}
    assert cell_of(plain) == cell_of(old) == cell_of(composed(*QUICK, "distil.temperature=2"))
    taught = composed(*QUICK, *large(wise))
    assert cell_of(taught) != cell_of(plain)
    assert cell_of(composed(*QUICK, *large(wise), "distil.temperature=2")) != cell_of(taught)
    copy = tmp_path / "copy.ckpt"
    copy.write_bytes(wise.read_bytes())
    assert cell_of(composed(*QUICK, *large(copy))) == cell_of(taught), "wherever the file lies"
    assert cell_of(composed(*QUICK, *large(wise, width=8))) != cell_of(taught)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["distil.teacher=/nowhere.pt"], r"no checkpoint /nowhere\.pt"),
        (["distil.teacher=t", "teachers={t:{model:{name:resnet18,width:8}}}"], "teacher 't' has no trained weights"),
        (["distil.teacher=t", "teachers={t:[a]}"], r"teachers\.t must be"),
        (["distil.loss=mse"], "unknown loss 'mse'"),
        (["distil.labels=1"], "distil: labels 1 must be in 0 <= labels < 1"),
        (["distil.layers=layer1", "distil.features=1"], r"distil: layers must be a list, such as \[layer1\]"),
        (["distil.teacher=WISE", "distil.features=1", "distil.layers=[layer7]"], "no layer 'layer7'"),
        (["distil.teacher=WISE", "distil.features=1", "compile=true"], "which compile changes; leave one of them out"),
        (
            ["distil.teacher=WISE", "distil.features=1", "shrink.method=l1"],
            r"which shrink\.method changes; leave one of them out",
        ),
        (["compression.stages=[raw,'distil(teacher=nonsense)']"], "teacher 'nonsense' is not there: a stage behind"),
        (["compression.stages=['tune > qat(bits=4,teacher=nonsense)']"], "teacher 'nonsense' is not there: a stage"),
        (["compression.stages=[raw,{distil:{teacher:nonsense}}]"], "stage {'distil': .*} must be a name or a chain"),
        (
            ["compression.stages=['distil(teacher=t)']", "teachers={t:{checkpoint:t.pt}}"],
            "teacher 't' is not there.*give the stages as chain=",
        ),
        *(
            ([f"compression.stages=['{stage}']"], "on=self trains on texts, and the task is classification")
            for stage in ("tune(on=self)", "tune_norms(on=self)", "distil(on=self)", "qat(bits=4,on=self)")
        ),
        (["compression.methods=['l1+data+size=99999']"], "size=99999 asks for more samples than repair_size="),
        (["compression.stages=['fold+data+size=99999@0.5']"], "size=99999 asks for more samples than repair_size="),
    ],
)
def test_what_cannot_be_learned_is_refused_before_anything_is_written(overrides, message, wise, tmp_path):
    if "distil.teacher=WISE" in overrides:
        overrides = [*large(wise), *overrides[1:]]
    with pytest.raises(UserError, match=message) as caught:
        run(composed(*QUICK, *overrides, f"paths.runs={tmp_path / 'runs'}"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_a_wrong_teacher_is_refused_before_anything_is_written_of_a_checkpoint(wise, tmp_path):
    stages = ["stages=['distil(teacher=nonsense)']", f"paths.runs={tmp_path / 'runs'}"]
    config = composed_compress(f"checkpoint={wise}", "model=resnet18", "model.width=6", "data=digits", *stages)
    with pytest.raises(UserError, match="teacher 'nonsense' is not there"):
        compress_run(config)
    assert not (tmp_path / "runs").exists()


def test_a_teacher_of_other_classes_is_refused_before_anything_is_written(cifar_folder, wise, tmp_path, monkeypatch):
    import scripts.teachers

    class Other(nn.Module):
        def forward(self, pictures: torch.Tensor) -> torch.Tensor:
            return pictures.new_zeros(len(pictures), 7)

    monkeypatch.setattr(scripts.teachers, "teacher", lambda *_: Other())
    with pytest.raises(UserError, match=r"distil\.teacher 'large': the teacher says 7 classes and the network 10"):
        run(composed(*QUICK, *large(wise), f"paths.runs={tmp_path / 'runs'}"))
    assert not (tmp_path / "runs").exists()
