"""Trained weights from whatever file people keep them in: what torch.save wrote (without running it), safetensors."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.tables import UserError, first_line, one_line

# Where training scripts put the weights beside their epoch and optimizer.
INSIDE = ("state_dict", "model_state_dict", "model", "net", "module")
# What wrappers put before the names: DataParallel, torch.compile, LightningModules with their network as an attribute.
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "backbone.")


def read_state(path: str | Path) -> dict[str, Tensor]:
    """The weights in a file, under the names that are in it. Nothing in the file is executed."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} holds more than weights, and loading it would run code ({first_line(error)[:80]}...); where you"
            " trust it, save its state_dict() alone: torch.save(model.state_dict(), ...)"
        ) from error
    except Exception as error:  # half a pickle fails in any way
        raise UserError(f"{path} is damaged or no checkpoint ({one_line(error)}); copy it again") from error
    while isinstance(state, Mapping) and not holds_weights(state):
        inside = next((state[key] for key in INSIDE if isinstance(state.get(key), Mapping)), None)
        if inside is None:
            keys = ", ".join(map(str, list(state)[:5]))
            raise UserError(f"{path} holds no weights: it has {keys or 'nothing'}, none of {', '.join(INSIDE)}")
        state = inside
    if not isinstance(state, Mapping):
        raise UserError(f"{path} holds a {type(state).__name__}, no weights by name")
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}


def holds_weights(state: Mapping) -> bool:
    return any(isinstance(value, Tensor) and value.dim() > 0 for value in state.values())


def load_into(model: nn.Module, state: Mapping[str, Tensor], path: str | Path) -> None:
    """Put the weights into the model, whatever wrapper's prefix is before their names; every one must fit.

    Tensors of the file that are under another prefix (a loss, a metric, a second network) are left out.
    """
    wanted = model.state_dict()
    prefix = prefix_of(state, wanted)
    found = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
    # Files of before 2018 have no batch counts, which matter to nobody.
    found = {name: wanted[name] for name in wanted if name.endswith("num_batches_tracked")} | found
    missing = [name for name in wanted if name not in found]
    odd = [name for name in found if name not in wanted]
    wrong = [name for name in wanted if name in found and found[name].shape != wanted[name].shape]
    kind = type(model).__name__
    if missing or odd:
        names = [f"{what} {names[0]}" for what, names in (("lacks", missing), ("has", odd)) if names]
        raise UserError(
            f"{path} is no {kind}: of its {len(wanted)} tensors it has {len(wanted) - len(missing)}; it"
            f" {' and '.join(names)}; choose the architecture with model="
        )
    if wrong:
        shapes = tuple(found[wrong[0]].shape), tuple(wanted[wrong[0]].shape)
        raise UserError(f"{path} is another {kind}: {wrong[0]} is {shapes[0]}, not {shapes[1]}; set its size in model.")
    model.load_state_dict(found)


def prefix_of(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """The prefix, of several wrappers if need be, under which most of the wanted names are."""
    found = [""]
    for prefix in found:
        inner = {name for name in state if name.startswith(prefix)}
        found += [prefix + more for more in PREFIXES if any(name.startswith(prefix + more) for name in inner)]

    def fits(prefix: str) -> int:
        return sum(prefix + name in state for name in wanted)

    return max(found, key=fits)


def settings_in(name: str) -> dict[str, str]:
    """The hyperparameters in a file's name: "..._opt=sgd_lr=0.1_rand_aug=True.pth" -> {"opt": "sgd", "lr": "0.1", ...}.

    The folding study names its checkpoints so.
    """
    found, key = {}, ""
    *parts, last = Path(name).stem.split("=")
    for i, part in enumerate(parts):
        if i == 0:
            key = part.rpartition("_")[2]
            continue
        value, _, following = part.partition("_")
        found[key], key = value, following
    if parts:
        found[key] = last
    return found
