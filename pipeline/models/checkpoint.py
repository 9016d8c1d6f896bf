"""Reads trained weights from files of torch.save (whose code is never run), safetensors, and folders."""

import argparse
import collections
import datetime
import importlib.util
import json
import pathlib
import pickle
import re
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.models.plain_tensors import plain
from pipeline.tables import UserError, one_line

# Keys under which training scripts put the weights, beside their epoch and optimizer. Averaged weights (of timm, of
# torchvision's references) come first, because such a run evaluates them. Lightning's WeightAveraging puts them in
# state_dict itself.
INSIDE = (
    "state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model", "net", "module", "last"
)  # fmt: skip
# First bytes, in small letters, of files that are not what their names say, and what such a file is.
SIGNS = {
    b"<!doctype": "a web page",
    b"<html": "a web page",
    b"<?xml": "an XML file, such as a server's error",
    b"version https://git-lfs": "a pointer of git-lfs (git lfs pull gets the file)",
    b"\x89png": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"gif8": "a picture",
    b"\x1f\x8b": "a gzip archive (unpack it)",
    b"7z\xbc\xaf": "a 7z archive (unpack it)",
    b"\x89hdf": "an HDF5 file (of Keras?)",
    b"gguf": "a GGUF file (give it as model=language_model model.architecture=FILE)",
}
HARMLESS = (
    argparse.Namespace, types.SimpleNamespace, collections.defaultdict, dict, list, set, int, float, str, Any,
    pathlib.Path, pathlib.PosixPath, pathlib.PurePosixPath, pathlib.WindowsPath, pathlib.PureWindowsPath,
    datetime.datetime, datetime.date, datetime.timedelta, datetime.timezone, np.dtype, np.ndarray,
    np._core.multiarray.scalar, np._core.multiarray._reconstruct, *{type(np.dtype(kind)) for kind in "?bhilqBHILQefd"},
)  # fmt: skip
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
    return plain({name: t for file in weight_files(path) for name, t in read_file(file).items()}, path)


def read_file(path: Path) -> dict[str, Tensor]:
    content = read_content(path)
    if path.suffix == ".safetensors":
        return content
    state = weights_in(content)
    if state is None:
        if not isinstance(content, Mapping):
            raise UserError(f"{path} holds a {type(content).__name__}, no weights by name; save a state_dict()")
        keys = ", ".join(map(str, list(content)[:5])) or "nothing"
        raise UserError(f"{path} holds no weights: it has {keys}, none of {', '.join(INSIDE)}")
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}


def read_content(path: Path) -> Any:
    """All that a file of weights holds, on the CPU; nothing in it is executed. UserError where it cannot be read."""
    if kind := no_checkpoint(path):
        raise UserError(f"{path} is {kind}, no checkpoint; get the file of weights itself")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(harmless()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        classes = ", ".join(classes_in(path, error)) or "what no checkpoint has"
        raise UserError(
            f"{path} holds more than weights, and loading it would run code: it needs {classes}; save the weights alone"
            " with the code that wrote it: torch.save(model.state_dict(), ...)"
        ) from error
    except Exception as error:  # half a pickle may raise any error
        if "TorchScript" in str(error):
            raise UserError(
                f"{path} is a TorchScript archive, which holds code; save its state_dict() alone:"
                " torch.save(torch.jit.load(...).state_dict(), ...)"
            ) from error
        raise UserError(f"{path} is damaged or no checkpoint ({one_line(error)}); copy it again") from error


def no_checkpoint(path: Path) -> str:
    """Kind of a file that people take for a checkpoint; "" where its first bytes are none of SIGNS."""
    with open(path, "rb") as file:
        start = file.read(512).lstrip()
    return next((kind for sign, kind in SIGNS.items() if start[: len(sign)].lower() == sign), "" if start else "empty")


def harmless() -> list[Any]:
    """Classes of plain values that hyperparameters hold: building one of them runs no code of a file."""
    kinds = [*HARMLESS]
    if "omegaconf" in sys.modules or importlib.util.find_spec("omegaconf"):
        from omegaconf import DictConfig, ListConfig, nodes
        from omegaconf.base import ContainerMetadata, Metadata

        names = "AnyNode BooleanNode FloatNode IntegerNode StringNode PathNode BytesNode".split()
        kinds += [DictConfig, ListConfig, ContainerMetadata, Metadata, *(getattr(nodes, name) for name in names)]
    return kinds


def classes_in(path: Path, error: pickle.UnpicklingError) -> list[str]:
    """Names of the classes that a pickle holds beside tensors and plain values, such as argparse.Namespace."""
    try:
        with torch.serialization.safe_globals(harmless()):
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


def load_into(model: nn.Module, state: Mapping[str, Tensor], path: str | Path, prefix: str | None = None) -> list[str]:
    """Put the weights into the model, whatever wrapper's prefix their names have; all of the model's must be there.

    Values are cast to the model's types and memory formats. Returns the names of the file's tensors that were left out,
    because the model has no place for them: those under another prefix (a loss, a metric, a second network), and those
    that LAYOUTS maps to None, such as the text tower of a CLIP.

    prefix: of the names, where it is known. Raises UserError where names or shapes do not fit, where a weight is not
    finite, and where two networks in the file fit.
    """
    wanted = model.state_dict()
    found, left_out = best_fit(state, wanted, path, prefix)
    if not found.keys() >= wanted.keys() and hasattr(model, "names_of_today"):
        found = model.names_of_today(found)
    # Files from before 2018 lack BatchNorm's batch counts, which change no output here.
    found = {name: wanted[name] for name in wanted if name.endswith("num_batches_tracked")} | found
    missing = [name for name in wanted if name not in found]
    odd = [name for name in found if name not in wanted]
    kind = type(model).__name__
    if missing or odd:
        names = [f"{what} {names[0]}" for what, names in (("lacks", missing), ("has", odd)) if names]
        raise UserError(
            f"{path} is no {kind}: of its {len(wanted)} tensors it has {len(wanted) - len(missing)}; it"
            f" {' and '.join(names)}; choose the architecture with model=, or the beginning of the network's names in"
            " the file with checkpoint_prefix="
        )
    check_shapes(found, wanted, f"{path} is another {kind}", path)
    for name, tensor in found.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(f"{path} holds values that are not finite, in {name}: its training diverged; take another")
    model.load_state_dict(found)
    return left_out


def check_shapes(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], said: str, path: str | Path) -> None:
    """UserError for a tensor of another shape. A head of other classes is said as such, because that is usual."""
    wrong = [name for name in wanted if found[name].shape != wanted[name].shape]
    if not wrong:
        return
    there, here = found[wrong[0]].shape, wanted[wrong[0]].shape
    layers = {name.rpartition(".")[0] for name in wrong}
    widths = {(found[name].shape[:1], wanted[name].shape[:1]) for name in wrong}
    rest = all(found[name].shape[1:] == wanted[name].shape[1:] for name in wrong)
    readers = [name.rpartition(".")[0] for name, tensor in wanted.items() if tensor.dim() > 1]
    if rest and len(widths) == 1 and layers == {readers[-1]}:
        raise UserError(
            f"{path} has {there[0]} classes, the data {here[0]} ({wrong[0]} is {tuple(there)}, not {tuple(here)}); "
            "choose the data that it was trained on"
        )
    raise UserError(f"{said}: {wrong[0]} is {tuple(there)}, not {tuple(here)}; set its size in model.")


def best_fit(
    state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: str | Path, prefix: str | None
) -> tuple[dict[str, Tensor], list[str]]:
    """({our name: tensor}, names left out) under the prefix and the layout that find most of the wanted names.

    UserError where two prefixes find all of them, with other values: nothing says which network is meant.
    """
    if prefix is not None and not any(name.startswith(prefix) for name in state):
        raise UserError(
            f"{path} has no name that begins with checkpoint_prefix {prefix!r}; one is {next(iter(state))!r}"
        )
    tried = [prefix] if prefix is not None else prefixes(state, len(wanted) // 2)
    fits = [(start, renamed(state, start, layout)) for start in tried for layout in LAYOUTS.values()]
    counts = [sum(name in wanted for name in names.values()) for _, names in fits]
    first, names = fits[counts.index(max(counts))]  # the first of several
    found = {ours: state[name] for name, ours in names.items()}
    for start, others in fits:
        again = {ours: state[name] for name, ours in others.items() if ours in wanted}
        if start != first and len(again) == len(wanted) and any(not torch.equal(again[n], found[n]) for n in again):
            raise UserError(
                f"{path} holds two networks that fit, under {first!r} and {start!r}; choose with checkpoint_prefix="
            )
    return found, [name for name in state if name not in names]


def prefixes(state: Mapping[str, Tensor], least: int) -> Iterator[str]:
    """Every beginning, up to a dot, that `least` names share, none first: one may be the prefix of a wrapper
    (DataParallel, AveragedModel, an attribute of a LightningModule)."""
    counts = collections.Counter(name[: dot.end()] for name in state for dot in re.finditer(r"\.", name))
    yield ""
    yield from (prefix for prefix, count in counts.items() if count >= least)


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
