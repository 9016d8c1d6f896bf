"""Reads trained weights from files of torch.save (whose code is never run), safetensors, and folders."""

import json
import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.tables import UserError, one_line

# Keys under which training scripts put the weights, beside their epoch and optimizer. Averaged weights (of timm, of
# torchvision's references) come first, because such a run evaluates them. Lightning's WeightAveraging puts them in
# state_dict itself.
INSIDE = (
    "state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model", "net", "module", "last"
)  # fmt: skip
# Prefixes that wrappers put before names: DataParallel, torch.compile, LightningModules with a network as an attribute.
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "backbone.")
# A folder of Hugging Face or open_clip keeps its weights in the first of these files that it has.
IN_FOLDER = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)
# Other code names the tensors of an architecture in its own way. Each row: {regular expression in the file's names:
# replacement that gives our names; None: the tensor is no part of our network}. The first row is our own names.
LAYOUTS: dict[str, dict[str, str | None]] = {
    "ours": {},
    # github.com/osaukh/folding_as_projection trains torchvision's resnet18 with the stem for small pictures.
    "resnet of torchvision or timm": {r"\.downsample\.": ".shortcut.", r"^fc\.": "linear."},
    # github.com/mlfoundations/model-soups: OpenAI's CLIP less the blocks of its text tower, and a classifier.
    "model soup": {
        r"^model\.visual\.": "visual.",
        r"^classification_head\.": "head.",
        r"^model\.(positional_embedding|text_projection|logit_scale|token_embedding\.|ln_final\.|transformer\.)": None,
    },
    "a model of transformers": {r"^": "model."},
    # torchvision's own files of DenseNet are older than its code.
    "densenet of 2017": {r"(denselayer\d+\.(?:norm|conv))\.([12])\.": r"\1\2."},
}


def weight_files(path: str | Path) -> list[Path]:
    """The files that hold the weights: `path` itself; in a folder, its weight file or the shards in its index."""
    path = Path(path).expanduser()
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"no checkpoint {path}; give a file of weights or a folder of Hugging Face")
    found = next((path / name for name in IN_FOLDER if (path / name).is_file()), None)
    if found is None:
        raise UserError(f"folder {path} holds no weights: it has none of {', '.join(IN_FOLDER)}")
    if found.suffix != ".json":
        return [found]
    shards = [path / name for name in sorted(set(weight_map(found).values()))]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}, which {found.name} names; copy the folder again")
    return shards


def weight_map(index: Path) -> dict[str, str]:
    """{tensor name: file name}"""
    try:
        return dict(json.loads(index.read_text())["weight_map"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{index} is damaged ({one_line(error)}); copy it again") from error


def read_state(path: str | Path) -> dict[str, Tensor]:
    """The weights in a file, or in a folder of Hugging Face, under their names there, on the CPU.

    Nothing in a file is executed.
    """
    return {name: tensor for file in weight_files(path) for name, tensor in read_file(file).items()}


def read_file(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        classes = ", ".join(classes_in(path, error)) or "what no checkpoint has"
        raise UserError(
            f"{path} holds more than weights, and loading it would run code: it needs {classes}; where you trust it,"
            " load it with weights_only=False and save its state_dict() alone: torch.save(model.state_dict(), ...)"
        ) from error
    except Exception as error:  # half a pickle may raise any error
        if "TorchScript" in str(error):
            raise UserError(
                f"{path} is a TorchScript archive, which holds code; save its state_dict() alone:"
                " torch.save(torch.jit.load(...).state_dict(), ...)"
            ) from error
        raise UserError(f"{path} is damaged or no checkpoint ({one_line(error)}); copy it again") from error
    state = weights_in(content)
    if state is None:
        if not isinstance(content, Mapping):
            raise UserError(f"{path} holds a {type(content).__name__}, no weights by name; save a state_dict()")
        keys = ", ".join(map(str, list(content)[:5])) or "nothing"
        raise UserError(f"{path} holds no weights: it has {keys}, none of {', '.join(INSIDE)}")
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}


def classes_in(path: Path, error: pickle.UnpicklingError) -> list[str]:
    """Names of the classes that a pickle holds beside tensors and plain values, such as argparse.Namespace."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # a file from before 2020, or no checkpoint at all: torch's error names the first class
        return re.findall(r"GLOBAL (\S+) was not", str(error))


def weights_in(content: Any) -> Mapping[str, Any] | None:
    """The innermost mapping that holds weights, under INSIDE or by itself."""
    if not isinstance(content, Mapping):
        return None
    # Mappings under INSIDE come first: tensors beside them may be no weights, such as the state of a random generator.
    inside = (weights_in(content[key]) for key in INSIDE if key in content)
    found = next((state for state in inside if state is not None), None)
    if found is None and any(isinstance(value, Tensor) and value.dim() > 0 for value in content.values()):
        return content
    return found


def load_into(model: nn.Module, state: Mapping[str, Tensor], path: str | Path) -> list[str]:
    """Put the weights into the model, whatever wrapper's prefix their names have; all of the model's must be there.

    Values are cast to the model's types and memory formats. Returns the names of the file's tensors that were left out,
    because the model has no place for them: those under another prefix (a loss, a metric, a second network), and those
    that LAYOUTS maps to None, such as the text tower of a CLIP. Raises UserError where names or shapes do not fit.
    """
    wanted = model.state_dict()
    found, left_out = best_fit(state, wanted)
    if not found.keys() >= wanted.keys() and hasattr(model, "names_of_today"):
        found = model.names_of_today(found)
    # Files from before 2018 lack BatchNorm's batch counts, which change no output here.
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
    return left_out


def best_fit(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """({our name: tensor}, names left out) under the prefix and the layout that find most of the wanted names."""
    fits = (renamed(state, prefix, layout) for prefix in prefixes(state) for layout in LAYOUTS.values())
    names = max(fits, key=lambda names: sum(name in wanted for name in names.values()))  # the first of several
    return {ours: state[name] for name, ours in names.items()}, [name for name in state if name not in names]


def prefixes(state: Mapping[str, Tensor]) -> Iterator[str]:
    """Prefixes of wrappers around wrappers, shortest first."""
    found = [""]
    for prefix in found:
        yield prefix
        inner = {name.removeprefix(prefix) for name in state if name.startswith(prefix)}
        found += [prefix + more for more in PREFIXES if any(name.startswith(more) for name in inner)]


def renamed(state: Mapping[str, Tensor], prefix: str, layout: Mapping[str, str | None]) -> dict[str, str]:
    """{name in the file: our name} of the tensors that are part of the network."""
    names = {}
    for name in state:
        if not name.startswith(prefix):
            continue
        ours = name.removeprefix(prefix)
        if any(new is None and re.search(old, ours) for old, new in layout.items()):
            continue
        for old, new in layout.items():
            if new is not None:
                ours = re.sub(old, new, ours)
        names[name] = ours
    return names


def settings_in(path: str) -> dict[str, str]:
    """The hyperparameters in a file's name: "..._opt=sgd_lr=0.1_rand_aug=True.pth" -> {"opt": "sgd", "lr": "0.1", ...}.

    The folding study names its checkpoints so. The sharpness study has spaces between ("... lr_max=0.1 model=vit_exp
    epoch=200.pth"), and underscores in values.
    """
    name = re.sub(r"(\.[A-Za-z]\w*)+$", "", Path(path).name)  # Path.stem would cut a folder "wd=0.05" to "wd=0"
    if " " in name:
        return dict(word.split("=", 1) for word in name.split() if "=" in word)
    found, key = {}, ""
    *parts, last = name.split("=")
    for i, part in enumerate(parts):
        if i == 0:
            key = part.rpartition("_")[2]
            continue
        value, _, following = part.partition("_")  # `following`: the next key, with its underscores
        found[key], key = value, following
    if parts:
        found[key] = last
    return found
