"""Checkpoints as training code leaves them: under any prefix, pruned by masks, normalised, sparse, with settings."""

import argparse
import pathlib

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from pipeline.models.checkpoint import load_into, read_state
from pipeline.tables import UserError


def net(classes: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, classes)).eval()


def read_back(content, tmp_path, prefix=None) -> nn.Module:
    """A new network with the weights of a file with this content."""
    torch.save(content, tmp_path / "net.pt")
    found = net()
    load_into(found, read_state(tmp_path / "net.pt"), "net.pt", prefix)
    return found


def assert_same(found: nn.Module, trained: nn.Module) -> None:
    x = torch.randn(2, 3, 3, 3)
    torch.testing.assert_close(found(x), trained.eval()(x))


@pytest.mark.parametrize(
    "prefix", ["encoder.", "trainer.student_net.", "_fsdp_wrapped_module.", "algorithm.featurizer."]
)
def test_any_prefix_that_makes_all_names_fit(prefix, tmp_path):
    trained = net()
    weights = {prefix + name: tensor for name, tensor in trained.state_dict().items()}
    assert_same(read_back({"state_dict": weights}, tmp_path), trained)


def test_averaged_models(tmp_path):
    trained = net()
    averaged = torch.optim.swa_utils.AveragedModel(trained)
    assert_same(read_back(averaged.state_dict(), tmp_path), trained)


def test_wrappers_of_inner_modules(tmp_path):
    trained = net()
    weights = {
        f"{name[:2]}_checkpoint_wrapped_module._orig_mod.{name[2:]}": t for name, t in trained.state_dict().items()
    }
    assert_same(read_back(weights, tmp_path), trained)


def test_of_two_networks_the_user_chooses(tmp_path):
    student, teacher = net(), net()
    both = {f"student.{name}": t for name, t in student.state_dict().items()}
    both |= {f"teacher.{name}": t for name, t in teacher.state_dict().items()}
    with pytest.raises(
        UserError, match=r"two networks that fit, under 'student.' and 'teacher.'; choose with checkpoint_p"
    ):
        read_back(both, tmp_path)
    assert_same(read_back(both, tmp_path, "teacher."), teacher)
    with pytest.raises(
        UserError, match=r"no name that begins with checkpoint_prefix 'pupil.'; one is 'student.0.weight'"
    ):
        read_back(both, tmp_path, "pupil.")


def pruned(trained: nn.Sequential) -> None:
    prune.l1_unstructured(trained[0], "weight", 0.5)
    prune.random_unstructured(trained[3], "bias", 1)


def old_weight_norm(trained: nn.Sequential) -> None:
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(trained[0])


def old_spectral_norm(trained: nn.Sequential) -> None:
    nn.utils.spectral_norm(trained[3])


FORMS = {
    "masks": pruned,
    "weight norm": lambda trained: parametrizations.weight_norm(trained[0]),
    "weight norm over all": lambda trained: parametrizations.weight_norm(trained[3], dim=None),
    "weight norm of old": old_weight_norm,
    "spectral norm": lambda trained: parametrizations.spectral_norm(trained[3]),
    "spectral norm of old": old_spectral_norm,
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_weights_that_are_kept_in_parts(form, tmp_path):
    trained = net()
    form(trained)
    trained.train()(torch.randn(4, 3, 3, 3))  # spectral norm moves its vectors
    assert_same(read_back(trained.state_dict(), tmp_path), trained)


class Symmetric(nn.Module):
    def forward(self, weight):
        return weight * 2


def test_a_parametrization_of_ones_own_is_refused(tmp_path):
    trained = net()
    parametrize.register_parametrization(trained[3], "weight", Symmetric())
    with pytest.raises(
        UserError, match=r"computes 3.weight by a parametrization .*; call torch.nn.utils.parametrize.remove"
    ):
        read_back(trained.state_dict(), tmp_path)


@pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:.*quantiz.*:DeprecationWarning")
def test_sparse_and_quantized_tensors_become_dense(tmp_path):
    trained = net()
    weights = dict(trained.state_dict())
    step = 2 / 255
    with torch.no_grad():
        trained[3].weight.copy_((trained[3].weight / step).round().clamp(-128, 127) * step)
    weights["0.weight"] = trained[0].weight.detach().to_sparse()
    weights["3.weight"] = torch.quantize_per_tensor(trained[3].weight.detach(), step, 0, torch.qint8)
    assert_same(read_back(weights, tmp_path), trained)


def test_plain_hyperparameters_beside_the_weights(tmp_path):
    trained = net()
    settings = {
        "namespace": argparse.Namespace(lr=0.1, root=pathlib.Path("data"), betas=(0.9, 0.999)),
        "config": OmegaConf.create({"optim": {"lr": 0.1, "names": ["a", None, True]}}),
        "loss": np.float64(0.5),
        "table": np.arange(3),
    }
    assert_same(read_back({"state_dict": trained.state_dict(), "hyper_parameters": settings}, tmp_path), trained)


FILES = {
    "a web page": b"\n<!DOCTYPE html><html><body>404</body></html>",
    "a pointer of git-lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
    "a picture": b"\x89PNG\r\n\x1a\n0000",
    "a gzip archive": b"\x1f\x8b\x08\x00",
    "empty": b"",
}


@pytest.mark.parametrize(("kind", "content"), FILES.items(), ids=FILES)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_files_that_are_no_checkpoints_are_called_what_they_are(kind, content, suffix, tmp_path):
    path = tmp_path / f"net{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"is {kind}.*, no checkpoint; get the file of weights itself"):
        read_state(path)


def test_nobody_is_advised_to_switch_safety_off(tmp_path):
    torch.save(net(), tmp_path / "net.pt")
    with pytest.raises(UserError, match="loading it would run code") as caught:
        read_state(tmp_path / "net.pt")
    assert "weights_only" not in str(caught.value)


def test_a_head_of_other_classes_is_said(tmp_path):
    torch.save(net(7).state_dict(), tmp_path / "net.pt")
    with pytest.raises(UserError, match=r"net.pt has 7 classes, the data 3 \(3.weight is \(7, 4\), not \(3, 4\)\)"):
        load_into(net(), read_state(tmp_path / "net.pt"), "net.pt")


def test_a_network_that_diverged_is_refused(tmp_path):
    trained = net()
    with torch.no_grad():
        trained[0].weight.fill_(float("nan"))
    with pytest.raises(UserError, match=r"net.pt holds values that are not finite, in 0.weight: its training diverged"):
        read_back(trained.state_dict(), tmp_path)
