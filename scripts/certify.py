"""Read the certificate of a compressed file: has any pruning of its size a smaller parameter error?

python -m scripts.certify fold-r0.5-raw.safetensors
python -m scripts.certify fold-r0.5-raw.safetensors --source net.pt    # recomputes every number from the weights

From the file alone its checksum, labels, sizes and stated errors are checked against each other. With the checkpoint
that was compressed, errors and bounds are computed again, and so are the merged weights where no data decided on them.

For every group the table has the file's error; the least of any pruning that keeps as many channels, and of any that
keeps one less (theorem 1 of "Cut Less, Fold More" is about these); the least of any projection (Eckart and Young); all
as ‖W - W'‖ / ‖W‖. Errors count as equal up to 1e-7 of ‖W‖², recomputed ones up to 1e-5.

Exit code: 0, it holds; 1, it does not, or the file is contradicted; 2, it cannot be read or holds no certificate.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.compressed import full_size, load_as
from pipeline.compression.certify import (
    Line,
    compression_recipe,
    contradictions,
    differences,
    found,
    merged_tensors,
    stated,
    unlike,
)
from pipeline.compression.checkpoint import is_compressed, read_manifest, read_whole
from pipeline.compression.plan import history, told
from pipeline.compression.quantize.stored import with_weights
from pipeline.compression.trace.graph import channel_groups
from pipeline.models import reads
from pipeline.models.checkpoint import load_into, read_state
from pipeline.tables import UserError
from scripts.arguments import refuse

HOLDS, DOES_NOT = 0, 1  # exit codes; a file that cannot be read is refused


@dataclass
class Checked:
    """One compression of a file. contradicted: sentences; notes: what was compared, and what could not be."""

    stage: str
    lines: list[Line]
    contradicted: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def main() -> None:
    try:
        sys.exit(certify(arguments()))
    except UserError as error:
        refuse(error)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="a compressed network (.safetensors)")
    parser.add_argument("--source", type=Path, help="the checkpoint that was compressed")
    parser.add_argument("--size", type=int, help="height of a picture, where the file does not say it")
    parser.add_argument(
        "--theorem", action="store_true", help="decide by prunings that keep one channel less, as the theorem does"
    )
    return parser.parse_args()


def certify(args: argparse.Namespace) -> int:
    """Print a table for every compression in the file's chain, then the verdict; returns the exit code."""
    tensors, manifest = read_whole(args.file)
    tensors, _ = with_weights(tensors, manifest)
    checks = {i: Checked(step["stage"], stated(step)) for i, step in enumerate(manifest["chain"]) if step.get("groups")}
    if not checks:
        raise UserError(f"{args.file} holds masked weights and no channel groups: there is nothing to certify")
    for check in checks.values():
        check.contradicted += [f"{line.name}: {text}" for line in check.lines for text in contradictions(line)]
    if args.source is not None and not any(check.contradicted for check in checks.values()):
        compare(args, manifest, tensors, checks)
    for check in checks.values():
        print_lines(check)
    return verdict([line for check in checks.values() for line in check.lines], list(checks.values()), args.theorem)


def compare(
    args: argparse.Namespace, manifest: Mapping[str, Any], tensors: Mapping[str, Tensor], checks: Mapping[int, Checked]
) -> None:
    """Compute the compression that took the source again, and note what its weights contradict."""
    chain, dense = manifest["chain"], network(args.file, args.source)
    before = told(history(dense))
    at = len(before)
    if chain[:at] != before or at not in checks:
        raise UserError(
            f"the chain of {args.file}, {' > '.join(step['stage'] for step in chain)}, does not compress {args.source} "
            "next; give the checkpoint that was compressed"
        )
    step = chain[at]
    groups = channel_groups(dense, example(manifest, args.size), compression_recipe(step).scope.parts)
    compare_numbers(checks[at], found(step, dense, groups))
    if not checks[at].contradicted:
        whole = {**tensors, **{name: tensors[stored] for name, stored in manifest["tied"].items()}}
        later = [one["stage"] for one in chain[at + 1 :]]
        compare_weights(checks[at], merged_tensors(step, later, dense, groups), whole)


def compare_numbers(check: Checked, recomputed: Mapping[str, Line | str]) -> None:
    """Note the groups whose numbers the source does not confirm; lines without a certificate get the recomputed one."""
    check.contradicted += [f"{name}: {text}" for name, text in recomputed.items() if isinstance(text, str)]
    for i, line in enumerate(check.lines):
        new = recomputed[line.name]
        if isinstance(new, str):
            continue
        if new is None:
            check.notes.append(f"{line.name}: not recomputed, as its features are activations that no file holds")
        else:
            check.contradicted += [f"{line.name}: {text}" for text in differences(line, new)]
            check.lines[i] = replace(line, certificate=line.certificate or new.certificate)
    done = sum(isinstance(new, Line) for new in recomputed.values())
    check.notes.append(f"recomputed from the weights of the source: {done} of {len(check.lines)} groups")


def compare_weights(check: Checked, expected: Mapping[str, Tensor] | None, tensors: Mapping[str, Tensor]) -> None:
    """Note the tensors of the file that are not those of the source, merged again."""
    if expected is None:
        check.notes.append("weights not compared: data, activations or later stages decided on them")
        return
    check.contradicted += [
        f"{name} is not the source's, merged as the labels say" for name in unlike(expected, tensors)
    ]
    check.notes.append(f"merged again from the weights of the source: {len(expected)} tensors")


def network(path: Path, source: Path) -> nn.Module:
    """The source as the network that the file names. UserError where it is no checkpoint of that architecture."""
    full = full_size(path)
    if is_compressed(source):
        return load_as(source, read_manifest(path)["architecture"]["name"], full).eval()
    load_into(full, read_state(source), source)
    return full


def example(manifest: Mapping[str, Any], size: int | None) -> torch.Tensor:
    """Arguments to trace the network with, of the kind and the size that the file tells of."""
    architecture, about = manifest["architecture"], manifest["about"]
    if reads(architecture["name"]) == "text":
        return torch.zeros(1, min(16, architecture["context"]), dtype=torch.int64)
    size = size or about.get("pictures", {}).get("size")
    if size is None:
        raise UserError("the file does not say how large its pictures are; give their height as --size=32")
    return torch.zeros(1, architecture["channels"], size, size)


def print_lines(check: Checked) -> None:
    width = max(len("group"), *(len(line.name) for line in check.lines))
    print(f"\n{check.stage}")
    print(f"{'group':<{width}}   channels      error   best pruning   of one less   best projection")
    for line in check.lines:
        start = f"{line.name:<{width}}  {line.before:>4} -> {line.after:<4}  {line.error:.5f}"
        proved = line.certificate
        if proved is None:
            print(f"{start}   no certificate")
            continue
        marks = ("<=" if line.holds else "> "), ("<=" if line.holds_below else "> ")
        print(
            f"{start}   {marks[0]} {proved.pruned:.5f}     {marks[1]} {proved.pruned_below:.5f}    >= {proved.svd:.5f}"
        )
    for note in check.notes:
        print(note)


def verdict(lines: Sequence[Line], checks: Sequence[Checked], theorem: bool) -> int:
    """Print the verdict in one line; returns the exit code. UserError where groups have no certificate."""
    contradicted = [text for check in checks for text in check.contradicted]
    if contradicted:
        more = f" (and {len(contradicted) - 1} more)" if len(contradicted) > 1 else ""
        print(f"\ndoes not hold: the file is contradicted: {contradicted[0]}{more}")
        return DOES_NOT
    bare = sum(line.certificate is None for line in lines)
    if bare:
        raise UserError(
            f"{bare} of {len(lines)} groups have no certificate, as in files that are older than certificates; give "
            "the checkpoint that was compressed as --source, or compress it again"
        )
    same, below = sum(not line.holds for line in lines), sum(not line.holds_below for line in lines)
    if below if theorem else same:
        print(
            f"\ndoes not hold: a pruning has a smaller parameter error at the same rank in {same} of {len(lines)} "
            f"groups, with one channel less in {below}"
        )
        return DOES_NOT
    than = "with one channel less" if theorem else "at the same rank"
    print(f"\nholds: no pruning {than} has a smaller parameter error, in any of {len(lines)} groups")
    return HOLDS


if __name__ == "__main__":
    main()
