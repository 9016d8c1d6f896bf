"""Compressed networks on disk: safetensors with a JSON manifest in the header, no pickle."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from pipeline.compression.compress import Compressed
from pipeline.compression.projection import resized
from pipeline.tables import UserError

FORMAT = 1


def save_compressed(compressed: Compressed, path: str | Path, about: Mapping[str, Any] | None = None) -> None:
    """Write the tensors of a compressed network and what was done to it.

    about: JSON values to keep with it (which run, which epoch).
    """
    report = compressed.report
    manifest = {
        "format": FORMAT,
        "method": report.method,
        "ratio": report.ratio,
        "params": report.params_after,
        "groups": {g.name: [g.before, g.after, g.error] for g in report.groups},
        "about": dict(about or {}),
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    first: dict[int, str] = {}
    tensors = {}
    for name, tensor in compressed.model.state_dict(keep_vars=True).items():
        if first.setdefault(id(tensor), name) == name:
            tensors[name] = tensor.detach().cpu().contiguous()
    save_file(tensors, path, {"foldability": json.dumps(manifest)})


def load_compressed(path: str | Path, model: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
    """The network in `path` as an ordinary module, and its manifest.

    model: the architecture at full size, with any weights; untouched. Its tensors take the shapes in the file, and the
    file is then loaded strictly. Raises UserError for a damaged file, one of a later format and one whose tensors are
    not this architecture's.
    """
    try:
        with safe_open(path, "pt") as file:
            manifest = json.loads((file.metadata() or {}).get("foldability", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is not a readable compressed checkpoint: {error}; save it again") from error
    if manifest.get("format") != FORMAT:
        raise UserError(
            f"{path} has format {manifest.get('format')!r}, this version reads {FORMAT}; update foldability"
            " or save it with save_compressed"
        )
    state = model.state_dict()
    wrong = sorted(set(tensors) - set(state)) or [
        name for name, tensor in tensors.items() if tensor.dim() != state[name].dim()
    ]
    if wrong:
        raise UserError(f"{path} holds {wrong[0]}, which {type(model).__name__} has not; load it into its architecture")
    smaller = resized(model, {n: t for n, t in tensors.items() if t.shape != state[n].shape})
    # A tied tensor is stored once; the other names of it are not missing.
    stored = {id(t) for n, t in smaller.state_dict(keep_vars=True).items() if n in tensors}
    missing = [n for n, t in smaller.state_dict(keep_vars=True).items() if id(t) not in stored]
    if missing:
        raise UserError(f"{path} lacks {missing[0]}; load it into its architecture")
    smaller.load_state_dict(tensors, strict=False)
    return smaller, manifest
