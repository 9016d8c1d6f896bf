"""Compressed networks on disk: safetensors with a JSON manifest in the header, no pickle.

The tensors in the file are those of the network's state_dict under their own names, so any tool that reads safetensors
reads them too, but for a network with weights on the grid of a quantizer, whose weights and vectors are packed.
Everything else is in the manifest:

    format          of this file, FORMAT
    architecture    {"name": ..., arguments} that build the network at full size, or {}; given by whoever saved it
    chain           [{"stage": ..., facts on it (see `plan.Step`)}] of all stages that the network went through
    method, ratio   of the last compression; without one: the last stage, and 0
    params, macs    of this network (masked: see Report); params_before, macs_before: of the one at full size. MACs are
                    null where nothing was compressed
    groups          of the last compression: {name: {"before", "after", "error", "labels": the new channel of each old
                    one, -1 = dropped, "chosen": the channel that stands for each cluster, where none is a mean,
                    "certificate": the least errors at this size (see certify.py; not in older files)}}; {} of a masked
                    network, whose zeros are in its tensors
    numbers         new values of sizes that modules keep as Python numbers, after the whole chain
    tied            {name: the name under which its tensor is stored}
    grids           {weight: its grid} of quantized weights, whose codes, scales and zeros are the bytes of the tensor
                    packed_weights (see `quantize.stored`)
    vectors         {tensor: its shape and number format} of the vectors behind them in those bytes
    channels_last   names of the weights in that memory format, which safetensors does not keep
    source          {"file", "sha256"} of the checkpoint that was compressed, or {} (see `source_of`)
    versions        of the libraries that wrote it
    about           other JSON values, given by whoever saved it

Of a network with packed weights, the manifest is deflated, since its text would be a fifth of the file of a small one.
Files of format 2 hold one compression, which becomes their chain, those of format 3 no grids, those of format 4 every
vector as a tensor and the manifest as it is. A checksum over manifest and tensors stands beside the manifest, so that a
flipped bit is found in a weight, too.
"""

import base64
import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.compression.compress import Compressed
from pipeline.compression.merge.modules import CHANNELS_LAST, laid_out_as, named_tensors, resized
from pipeline.compression.plan import history, numbers, steps_of, told, went_through_
from pipeline.compression.quantize.network import remember_grids_
from pipeline.compression.quantize.stored import with_codes, with_weights
from pipeline.compression.report import Report, step_of
from pipeline.compression.sizes.count import parameters
from pipeline.tables import UserError, first_line

FORMAT = 5
OLDEST = 2  # the oldest format that can be read
# Keys of a compression in the chain; files of format 2 have them for their only compression.
OF_A_STEP = ("ratio", "params", "params_before", "macs", "macs_before", "numbers", "groups")


def save_compressed(
    compressed: Compressed | nn.Module,
    path: str | Path,
    about: Mapping[str, Any] | None = None,
    *,
    architecture: Mapping[str, Any] | None = None,
    source: Mapping[str, Any] | None = None,
) -> None:
    """Write the tensors of a compressed network and its manifest; the file appears whole or not at all.

    about: JSON values to keep with it (which run, which epoch).
    architecture: {"name": ..., arguments} of the network at full size, for whoever loads it without one.
    source: what was compressed (see `source_of`).

    The chain is what the network remembers (see `plan.history`): it may have been compressed several times, and tuned
    since. Raises UserError for a network that is a finished file (`saved_by` says what to do), for one whose state_dict
    holds more than tensors, and for what JSON cannot write.
    """
    model, report = compressed if isinstance(compressed, Compressed) else (compressed, None)
    if other_way := getattr(model, "saved_by", ""):
        raise UserError(f"{type(model).__name__} is a finished file and has no weights to save: {other_way}")
    tensors, tied = stored_tensors(model)
    stored, facts = with_codes(model, tensors)
    text = _json(
        {
            "format": FORMAT,
            "architecture": dict(architecture or {}),
            **_done(model, report),
            "tied": tied,
            **facts,
            "channels_last": [name for name, tensor in tensors.items() if _is_channels_last(tensor)],
            "source": dict(source or {}),
            "versions": {name: _version(name) for name in ("foldability", "torch", "safetensors")},
            "about": dict(about or {}),
        }
    )
    text = _deflated(text) if facts["grids"] else text
    # Clones, as safetensors refuses tensors that share memory: two views of one tensor are stored as two.
    seen: set[int] = set()
    plain = {}
    for name, tensor in stored.items():
        shares = tensor.untyped_storage().data_ptr() in seen
        seen.add(tensor.untyped_storage().data_ptr())
        plain[name] = (tensor.clone() if shares else tensor).cpu().contiguous()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    try:
        save_file(plain, part, {"foldability": text, "sha256": digest_of(text, plain)})
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def load_compressed(path: str | Path, model: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
    """The network in `path` as an ordinary module, and its manifest.

    model: the architecture at full size, with any weights; untouched. Every tensor of the result is the file's, with
    its shape, number format and memory format; mode, device and requires_grad are the model's. The result remembers
    the chain of the file.

    Raises UserError for a file that is missing, damaged, of another format, or not of this architecture.
    """
    tensors, manifest = read_whole(path)
    tensors, grids = with_weights(tensors, manifest)
    wrong = next(_misfits(manifest, tensors, model), None)
    if wrong:
        raise UserError(f"{path} {wrong}; load it into {_described(manifest)}")
    # Copies, as safetensors returns views of the file, which would change with it.
    given = {name: tensors[name].to(old.device, copy=True) for name, old in stored_tensors(model)[0].items()}
    for name in manifest["channels_last"]:
        given[name] = given[name].contiguous(memory_format=CHANNELS_LAST[given[name].dim()])
    smaller = resized(model, given, manifest["numbers"])
    went_through_(smaller, steps_of(manifest["chain"]))
    if grids:
        remember_grids_(smaller, grids)
    return smaller, manifest


def is_compressed(path: str | Path) -> bool:
    """Is it a file of `save_compressed`, of any format?"""
    try:
        with safe_open(path, "pt") as file:
            return "foldability" in (file.metadata() or {})
    except (OSError, SafetensorError):  # any other checkpoint, or a folder
        return False


def read_manifest(path: str | Path) -> dict[str, Any]:
    """The manifest alone, without a look at the tensors. Raises UserError as `load_compressed` does."""
    with _opened(path) as (_, manifest, _):
        return manifest


def read_whole(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors by the names under which they are stored, as views of the file; the manifest), checksum compared.

    Raises UserError for a file that is missing, damaged or of another format.
    """
    with _opened(path) as (file, manifest, text):
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        if file.metadata().get("sha256") != digest_of(text, tensors):
            raise UserError(f"{path} is damaged: its contents are not those of its checksum; copy it again")
    return tensors, manifest


def source_of(path: str | Path) -> dict[str, str]:
    """{"file", "sha256"} of a checkpoint as by `sha256sum`; for a folder, over the names and sums of its files."""
    path = Path(path)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        lines = [f"{source_of(file)['sha256']}  {file.relative_to(path).as_posix()}\n" for file in files]
        return {"file": path.name, "sha256": hashlib.sha256("".join(lines).encode()).hexdigest()}
    with open(path, "rb") as file:
        return {"file": path.name, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def stored_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors by the first of their names, {other name: that one}), as they stand in a file.

    Raises UserError where the state_dict holds more than tensors, which only a pickle could keep.
    """
    named = named_tensors(model)
    more = [name for name in model.state_dict() if name not in named]
    if more:
        raise UserError(f"{more[0]} of {type(model).__name__} is no tensor: safetensors cannot keep it; leave it out")
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, tensor in named.items():
        stored = first.setdefault(id(tensor), name)
        if stored == name:
            tensors[name] = tensor.detach()
        else:
            tied[name] = stored
    return tensors, tied


def stored_size(model: nn.Module) -> int:
    """Bytes of a network's tensors in a file of `save_compressed`, which adds a manifest of a few kB to them."""
    stored, _ = with_codes(model, stored_tensors(model)[0])
    return sum(tensor.numel() * tensor.element_size() for tensor in stored.values())


def _done(model: nn.Module, report: Report | None) -> dict[str, Any]:
    """The chain, and its short form: the last compression, from full size to the size of this network.

    report: of the compression, for a network without a history. Raises UserError where nothing was done.
    """
    chain = history(model) or ((step_of(report),) if report else ())
    if not chain:
        raise UserError(f"{type(model).__name__} was never compressed; save its state_dict instead")
    compressed = [step.about for step in chain if "params_before" in step.about]
    count = parameters(model)
    whole = {"method": chain[-1].stage, "ratio": 0.0, "params": count, "params_before": count, "groups": {}}
    compressed = compressed or [{**whole, "macs": None, "macs_before": None, "numbers": {}}]
    full, last = compressed[0], compressed[-1]
    return {
        "chain": told(chain),
        **{key: last[key] for key in ("method", *OF_A_STEP)},
        "params_before": full["params_before"],
        "macs_before": full["macs_before"],
        "numbers": numbers(chain),
    }


def _only_step(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The chain of a file of format 2."""
    return [
        {
            "stage": manifest.get("method"),
            "method": manifest.get("method"),
            **{key: manifest.get(key) for key in OF_A_STEP},
        }
    ]


@contextmanager
def _opened(path: str | Path) -> Iterator[tuple[Any, dict[str, Any], str]]:
    """(the open file, its manifest, the manifest's text)."""
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get("foldability", "{}")
            manifest = json.loads(_inflated(text))
            if not isinstance(manifest, dict) or "format" not in manifest:
                raise UserError(f"{path} does not say how it was compressed: it is no file of save_compressed")
            if manifest["format"] not in range(OLDEST, FORMAT + 1):
                newer = isinstance(manifest["format"], int) and manifest["format"] > FORMAT
                fix = "update foldability" if newer else "compress and save the checkpoint again"
                raise UserError(
                    f"{path} has format {manifest['format']!r}, this version reads {OLDEST} to {FORMAT}; {fix}"
                )
            yield file, {"chain": _only_step(manifest), "grids": {}, "vectors": {}, **manifest}, text
    except FileNotFoundError as error:
        raise UserError(f"no compressed network {path}") from error
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        why = first_line(error)[:80]  # safetensors may list every number format that there is
        raise UserError(f"{path} is damaged or no safetensors file ({why}); copy it again") from error


def _misfits(manifest: Mapping[str, Any], tensors: Mapping[str, Tensor], model: nn.Module) -> Iterator[str]:
    """Yield each way in which a file does not fit this architecture at full size."""
    this = f"this {type(model).__name__}"
    own, tied = stored_tensors(model)
    names, own_names = {*tensors, *manifest["tied"]}, {*own, *tied}
    yield from (f"holds {name}, which {this} has not" for name in sorted(names - own_names))
    yield from (f"lacks {name} of {this}" for name in sorted(own_names - names))
    for name, stored in sorted(set(tied.items()) ^ set(manifest["tied"].items())):
        yield f"and {this} differ in whether {name} is one tensor with {stored}"
    for name, new in tensors.items():
        old = own[name].shape
        if new.dim() != len(old) or any(n > o for n, o in zip(new.shape, old, strict=True)):
            yield f"holds {name} as {tuple(new.shape)}, which in {this} is {tuple(old)} at full size"
    before = manifest["params_before"]
    if parameters(model) != before:
        yield f"was a network of {before:,} parameters, and {this} has {parameters(model):,}"
    for number in manifest["numbers"]:
        owner, _, attribute = number.rpartition(".")
        try:
            getattr(model.get_submodule(owner), attribute)
        except AttributeError:
            yield f"sets the number {number}, which {this} has not"


def _described(manifest: Mapping[str, Any]) -> str:
    """The architecture at full size, by name and arguments where the file says them."""
    arguments = dict(manifest["architecture"])
    name = arguments.pop("name", None)
    return f"{name} of {arguments}" if name else "its architecture at full size"


def _json(manifest: Mapping[str, Any]) -> str:
    """The manifest as one line of JSON. Raises UserError naming the part that is no JSON."""
    try:
        return json.dumps(manifest, separators=(",", ":"))
    except (TypeError, ValueError):
        for key, value in manifest.items():
            try:
                json.dumps(value)
            except (TypeError, ValueError) as error:
                raise UserError(f"{key} of a compressed network must be plain JSON values: {error}") from error
        raise


def _deflated(text: str) -> str:
    """zlib's bytes in base85: five letters for four bytes, none of which JSON escapes."""
    return base64.b85encode(zlib.compress(text.encode(), 9)).decode()


def _inflated(text: str) -> str:
    """A manifest's JSON, which begins with a brace, from itself or from `_deflated`, where zlib's head makes a c."""
    if text.startswith("{"):
        return text
    try:
        return zlib.decompress(base64.b85decode(text)).decode()
    except (ValueError, zlib.error) as error:
        raise OSError("its manifest cannot be inflated") from error


def _is_channels_last(tensor: Tensor) -> bool:
    return not laid_out_as(tensor, tensor.contiguous()).is_contiguous()


def digest_of(text: str, tensors: Mapping[str, Tensor]) -> str:
    """sha256 of a manifest and of the names, formats, shapes and values of tensors on the CPU; 2 GB a second."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a folder, not installed
        return "unknown"
