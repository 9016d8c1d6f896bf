"""Language modelling is a task like another: the numbers of the network's own library, and every part that measures."""

import math

import lightning
import pytest
import torch
from lightning import LightningModule, Trainer
from torch.utils.data import DataLoader

from callbacks import CompressionCallback
from pipeline.compression.calibrate.texts import written_texts
from pipeline.compression.recipe import Calibration
from pipeline.entries import chains
from pipeline.evaluate import evaluate, settle
from pipeline.measure import Host, Inputs, measure
from pipeline.stages import Supplies, parse_chain
from pipeline.stages.tune import samples_on
from pipeline.tables import UserError
from pipeline.tasks import METRICS, Classification, Language

transformers = pytest.importorskip("transformers")
CONTEXT = {"cell": "c", "model": "llama", "data": "made", "seed": 0, "epoch": 0, "step": 0}
VOCABULARY, IDS = 31, torch.randint(31, (20, 12), generator=torch.Generator().manual_seed(0))


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, use_cache=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def measured(net, batches) -> tuple[dict[str, float], int]:
    task = settle(net, Language(), batches[0])
    totals = evaluate(net, task, batches, check=True)
    return task.values(totals), task.count(totals)


def test_numbers_are_those_of_the_network_s_own_loss_over_uneven_batches():
    """Padding, tokens behind borders and the first of each sequence do not count."""
    net, mask = llama(), torch.ones_like(IDS)
    mask[3, 7:] = mask[11, 2:] = 0
    labels = IDS.masked_fill(mask == 0, -100)
    labels[5, 4] = -100  # behind a border
    whole_set = {"input_ids": IDS, "attention_mask": mask, "labels": labels, "bytes": torch.full((20,), 40)}
    batches = [{name: t[rows] for name, t in whole_set.items()} for rows in (slice(0, 7), slice(7, 20))]
    found, n = measured(net, batches)
    with torch.no_grad():
        whole = net(input_ids=IDS, attention_mask=mask, labels=labels)
    counted = labels[:, 1:] != -100
    right = (whole.logits[:, :-1].argmax(2) == labels[:, 1:]) & counted
    assert n == 20
    assert found["loss"] == pytest.approx(float(whole.loss), rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(float(whole.loss)), rel=1e-6)
    assert found["token_acc"] == pytest.approx(float(right.sum() / counted.sum()))
    bits = float(whole.loss) * int(counted.sum()) / math.log(2) / (40 * 20)
    assert found["bits_per_byte"] == pytest.approx(bits, rel=1e-6)


def test_tokens_that_are_all_alike_have_the_perplexity_that_the_task_calls_chance():
    class Blind(torch.nn.Module):
        def forward(self, ids):
            return torch.zeros(*ids.shape, VOCABULARY)

    assert settle(Blind(), Language(), IDS).chance == VOCABULARY
    assert measured(Blind(), [IDS])[0]["perplexity"] == pytest.approx(VOCABULARY)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_large_vocabulary_is_measured_by_parts_and_no_copy_of_the_logits_is_kept(smoothing, monkeypatch):
    scores = torch.randn(20, IDS.shape[1], VOCABULARY, generator=torch.Generator().manual_seed(0), dtype=torch.bfloat16)
    batch = {"input_ids": IDS, "attention_mask": (torch.arange(IDS.shape[1]) < 9).long().expand_as(IDS)}

    def learned() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
        own, kept = scores.clone().requires_grad_(), {}

        def keep(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = Language().loss(own, batch, smoothing)
        (first,) = torch.autograd.grad(loss, own, create_graph=True)
        (second,) = torch.autograd.grad(first.float().square().sum(), own)  # as the sharpness of a loss asks for
        return torch.stack([loss.detach(), *Language().totals(own, batch)]), first.detach(), second, sum(kept.values())

    whole = learned()
    monkeypatch.setattr("pipeline.tasks.parts.PART", 3 * VOCABULARY)
    by_parts = learned()
    assert all(map(torch.equal, by_parts[:3], whole[:3]))
    assert by_parts[3] < 1.5 * scores.nbytes < 2 * scores.nbytes < whole[3]


def test_a_tensor_of_ids_is_a_batch_too():
    net = llama()
    found, n = measured(net, [IDS[:7], IDS[7:]])
    with torch.no_grad():
        assert found["loss"] == pytest.approx(float(net(input_ids=IDS, labels=IDS).loss), rel=1e-6)
    assert n == 20
    assert math.isnan(found["bits_per_byte"])


def test_text_without_sense_costs_what_it_should():
    """A network that knows nothing says log(V) a token, however bad it is."""
    net = llama()
    net.lm_head.weight.data.zero_()
    found, _ = measured(net, [IDS])
    assert found["perplexity"] == pytest.approx(VOCABULARY, rel=1e-5)
    net.lm_head.weight.data.normal_(0, 1e8)
    assert measured(net, [IDS])[0]["perplexity"] == math.inf


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (IDS.float(), r"\(N, T\) token ids.*float32"),
        (IDS[0], r"got \(12,\)"),
        ({"input_ids": IDS, "labels": IDS + 5}, "token id 3[0-9] is none of the 31 .* its own tokenizer"),
        ({"attention_mask": IDS}, "without token ids"),
    ],
)
def test_what_cannot_be_measured_is_refused(batch, message):
    class Given(torch.nn.Module):
        def forward(self, *args, **kwargs):
            return {"logits": torch.zeros(20, 12, VOCABULARY)}

    with pytest.raises(UserError, match=message):
        settle(Given(), Language(), batch)


class Mine(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = llama()

    def training_step(self, batch, batch_idx):
        return self.net(input_ids=batch, labels=batch).loss

    def validation_step(self, batch, batch_idx):
        self.log("mine", self.net(input_ids=batch, labels=batch).loss, batch_size=batch.numel() - len(batch))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-2)


@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
def test_the_callback_measures_a_language_model(tmp_path):
    """Fold, prune, compensate, allocate, predict and tune by the same chains as pictures."""
    lightning.seed_everything(1, verbose=False)
    texts = DataLoader(IDS, 6)
    measured = CompressionCallback(
        methods=["fold", "l1", "l2+data", "obs+data+params", "taylor+data", "auto+data"], ratios=[0.25, 0.5],
        stages=["raw", "repaired", "norm_tuned", "tuned"], parts=["hidden"], task=Language(), repair_data=IDS,
        repair_size=20, batch_size=10, rows=tmp_path / "rows.parquet",
    )  # fmt: skip
    trainer = Trainer(
        default_root_dir=tmp_path, max_epochs=2, accelerator="cpu", callbacks=[measured], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Mine(), texts, texts)
    rows = measured.rows
    assert set(rows["status"]) == {"ok"}, set(rows["reason"])
    assert set(rows["stage"]) == {"raw", "norm_tuned", "tuned"}, "RMSNorm has no statistics to repair"
    assert set(rows["metric"]) == {"perplexity"}
    assert set(rows["n"]) == {20}
    last = rows.filter(rows["epoch"] == 2)
    dense = last.row(0, named=True)
    assert dense["loss"] == pytest.approx(float(trainer.callback_metrics["mine"]), rel=1e-5)
    assert float(trainer.callback_metrics["compress/dense/perplexity"]) == pytest.approx(math.exp(dense["loss"]))
    at = {(r["method"], r["ratio"], r["stage"]): r for r in last.to_dicts()}
    assert at["l2+data", 0.25, "raw"]["loss"] < at["fold", 0.5, "raw"]["loss"]
    assert at["fold", 0.5, "tuned"]["loss"] != at["fold", 0.5, "raw"]["loss"]
    area = float(trainer.callback_metrics["foldability/fold_raw"])
    losses = [dense["loss"], at["fold", 0.25, "raw"]["loss"], at["fold", 0.5, "raw"]["loss"]]
    assert area == pytest.approx((losses[0] / 2 + losses[1] + losses[2] / 2) / 2, rel=1e-6), "over log-perplexity"
    assert METRICS["perplexity"].log
    gap, pruned = (float(trainer.callback_metrics[f"foldability/{name}_raw"]) for name in ("gap", "l1"))
    assert gap == pytest.approx(pruned - area, abs=1e-5), "lower is better"


def test_own_texts_train_a_compressed_model_without_data():
    """It fits them better afterwards, and no labelled sample is asked for."""
    net = llama()
    with torch.no_grad():
        net.lm_head.weight.mul_(20)  # predictions that say something
    tree = chains(["l2"], [0.5], ["raw", "tune(on=self,epochs=5,lr=0.0003)", "tune_norms(on=self)"], parts=["hidden"])
    assert not tree.needs
    texts = written_texts(net, IDS[:1], answers=Language().answers)  # those that the chain writes, too
    host = Host(Language(), lambda: Inputs(IDS[:1], {"test": [texts]}, []), ("test",))
    raw, tuned, norms = (row for row in measure(net, tree, host, CONTEXT) if row.method == "l2")
    assert tuned.perplexity < raw.perplexity
    assert norms.perplexity < raw.perplexity
    assert norms.chain == "l2+parts=[hidden]@0.5 > tune_norms(on=self)"


def test_a_stage_says_how_many_texts_it_learns_from_and_they_are_those_that_calibrate():
    supplies = Supplies(llama(), IDS[:1], Language())
    learned = torch.cat(list(samples_on("self", supplies, 12)))
    assert learned.shape == (12, IDS.shape[1])
    assert torch.equal(learned, supplies.pictures(Calibration("self", 12)))
    assert len(supplies.made) == 1, "the texts are written once"


def test_own_texts_are_for_language_alone():
    with pytest.raises(UserError, match="on=self trains on texts, and the task is classification: choose on=data"):
        samples_on("self", Supplies(torch.nn.Linear(2, 2), torch.zeros(1, 2), Classification()))
    with pytest.raises(UserError, match=r"unknown on 'own'.*choose from: data, self"):
        parse_chain("tune(on=own)")
