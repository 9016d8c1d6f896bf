"""Mistakes on the command line are answered in one line, before anything is made."""

import subprocess
import sys

import pytest

from pipeline.tables import UserError
from scripts.arguments import checked

REFUSED = {
    "optim.lrr=3": r"unknown setting 'optim.lrr'; did you mean optim.lr\?",
    "lr=0.1": r"unknown setting 'lr'; did you mean optim.lr\?",
    "foo": r"'foo' is no setting; write NAME=VALUE, such as optim.lr=0.1",
    "+foo=1": r"unknown setting 'foo'; --help lists them",
    "+optim.lr=3": r"optim.lr is a setting already; write optim.lr=..., without the plus",
    "model=resnet81": r"unknown model 'resnet81' \(did you mean 'resnet18'\?\); choose from: clip_vit",
    "compression.ratios=0.1,0.2": r"has several values: a list is compression.ratios=\[0.1,0.2\]; a sweep .* needs -m",
    "optim.lr=0.1 optim.lr=0.2": r"optim.lr is given twice: optim.lr=0.1 and optim.lr=0.2; keep one",
    "model=resnet18 model=resnet20": r"model is given twice",
    "model.width=[": r"model.width=\[ cannot be read .*; put a value with such signs in quotes",
    "name=a=b": r"name=a=b cannot be read .*; put a value with such signs in quotes: name=\"'...'\"",
    "data.documents=3": r"unknown setting 'data.documents'",
    "optim.sam=[0.1]": r"optim.sam holds settings of its own \(.*rho.*\), got optim.sam=\[0.1\]; write optim.sam.",
    "paths=runs": r"paths holds settings of its own \(runs\), got paths=runs; write paths.runs=...",
    "trainer.max_epoch=3": r"did you mean trainer.max_epochs\? \(\+trainer.max_epoch=... hands on an option",
}


@pytest.mark.parametrize("arguments", REFUSED)
def test_what_is_typed_wrong_is_refused(arguments):
    with pytest.raises(UserError, match=REFUSED[arguments]):
        checked(arguments.split(), "train")


TAKEN = [
    "experiment=quickstart optim.lr=0.1",
    "-m optim.lr=0.1,0.2",
    "--multirun model=resnet18,resnet20 optim.lr=0.1,0.2",
    "sweep=resnet18_adam_cifar10 optim.lr=0.1,0.2",
    "data=c4 data.documents=3",
    "+trainer.fast_dev_run=true",
    "hydra.launcher.n_jobs=3",
    "~compression.methods +compression.methods={mlp:{method:fold}}",
    "model=language_model model.architecture=gpt2",
    "wandb.mode=disabled trainer.precision=bf16-mixed compression.stages=[raw]",
]


@pytest.mark.parametrize("arguments", TAKEN)
def test_what_is_right_is_taken_as_it_is(arguments):
    assert checked(arguments.split(), "train") == sorted(arguments.split(), key=lambda a: not a.startswith("-"))


@pytest.mark.parametrize("path", ["/a b/c", "lr=0.1,wd=0.pt", "größe.npz", "it's.pt", "{x}.pt", "~/data", "null"])
def test_a_path_may_hold_any_sign(path):
    from scripts.arguments import parsed

    [argument] = checked([f"checkpoint={path}"], "train")
    assert parsed(argument).value() == (None if path == "null" else path)


def test_the_command_says_what_it_can_do_and_refuses_with_exit_code_2():
    def run(*arguments):
        return subprocess.run([sys.executable, "-m", "scripts.cli", *arguments], capture_output=True, text=True)

    overview = run().stdout
    assert all(f"foldability {name}" in overview for name in ("train", "features"))
    features = run("features", "--help").stdout
    assert "usage: foldability features" in features
    assert "--data-root" in features
    page = run("compress", "--help").stdout
    assert "checkpoints='nets/**/*.pt'" in page
    assert "checkpoint_prefix: null # beginning of the network's names" in page
    refused = run("train", "optim.lrr=3")
    assert refused.returncode == 2
    assert refused.stderr.splitlines() == [
        "error: unknown setting 'optim.lrr'; did you mean optim.lr? (+optim.lrr=... hands on an option that the config "
        "does not list)"
    ]
    assert "error: unknown command 'trian' (did you mean 'train'?); choose from: certify" in run("trian").stderr


def test_completion_is_a_script_of_bash():
    from scripts.cli import completion

    script = (
        completion() + '\nCOMP_WORDS=(foldability train optim.sam.r) COMP_CWORD=2; _foldability; echo "${COMPREPLY[@]}"'
    )
    found = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert found.stdout.strip() == "optim.sam.rho="
    first = completion() + '\nCOMP_WORDS=(foldability fe) COMP_CWORD=1; _foldability; echo "${COMPREPLY[@]}"'
    assert subprocess.run(["bash", "-c", first], capture_output=True, text=True).stdout.strip() == "features"
