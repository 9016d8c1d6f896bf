"""Writes networks to files that run without this project: ONNX and programs of torch.export, each checked."""

import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from pipeline.compression.copies import bare_copy
from pipeline.example import Example, call_arguments
from pipeline.tables import UserError, one_line

TRACED = 2  # batch size for tracing: a tracer would take a batch of one for a constant
CHECKED = (1, TRACED, 5)  # batch sizes on which a file must agree with the network
# Largest relative difference of outputs that rounding explains, by their number format.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
ArrayRun = Callable[[list[Any]], Sequence[Any]]  # NumPy arrays of the inputs -> those of the outputs, in order
ONE_FILE = 2**31 - 2**20  # bytes that a protobuf can hold; larger weights go into a second file, NAME.data


def export_onnx(model: nn.Module, example: Example, path: str | Path) -> float:
    """Write `model` in eval mode as ONNX for batches of any size, and check it with ONNX Runtime on the CPU.

    example: the model's arguments (a tensor, a tuple of arguments or a dict of keyword arguments). The batch is the
        first dimension of the first tensor, and of every other tensor whose first dimension is as long.
    Returns the largest relative difference found between its outputs and the model's, ‖found - expected‖ / ‖expected‖.

    Raises UserError, and leaves no file, without ONNX's libraries, for a model that cannot be exported, and for a file
    that differs from the model.
    """
    need_onnx()
    network = bare_copy(model).cpu().eval()
    size = sum(t.numel() * t.element_size() for t in network.state_dict().values())

    def write(file: Path) -> None:
        program = program_of(network, example)
        torch.onnx.export(program, f=str(file), dynamo=True, verbose=False, external_data=size > ONE_FILE)

    def read(file: Path) -> Callable[..., Sequence[Tensor]]:
        return of_tensors(onnx_run(file))

    return written(network, example, Path(path), "ONNX", write, read)


def export_program(model: nn.Module, example: Example, path: str | Path) -> float:
    """Write `model` in eval mode as a program of torch.export for batches of any size (`torch.export.load(path)`).

    example, result and errors are those of `export_onnx`; the program is read back and checked.
    """
    network = bare_copy(model).cpu().eval()

    def read(file: Path) -> Callable[..., Sequence[Tensor]]:
        program = torch.export.load(file).module()
        return lambda inputs: _outputs(program, inputs)

    return written(
        network,
        example,
        Path(path),
        "a program",
        lambda file: torch.export.save(program_of(network, example), file),
        read,
    )


def need_onnx() -> None:
    """Raise UserError where a library that ONNX needs is missing."""
    need("ONNX", ("onnx", "onnxscript", "onnxruntime"), "onnx")


def need(what: str, packages: Sequence[str], extra: str) -> None:
    """Raise UserError for the first package that is missing, without importing those that are there."""
    for name in packages:
        if find_spec(name) is None:
            raise UserError(f"{what} needs {name}: pip install 'foldability[{extra}]'")


class Frame:
    """Nested values around their tensors, into which others can be put."""

    def __init__(self, value: Any) -> None:
        leaves, self._structure = tree_flatten(value)
        self._fixed = [None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves]

    def around(self, tensors: Iterable[Tensor]) -> Any:
        found = iter(tensors)
        return tree_unflatten([next(found) if one is None else one[0] for one in self._fixed], self._structure)


def onnx_session(file: Path | bytes) -> Any:
    """An onnxruntime.InferenceSession of a file or its content, on the CPU, with as many threads as torch has."""
    import onnxruntime  # optional, and slow to import

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors only
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def onnx_inputs(session: Any, arrays: Sequence[Any]) -> dict[str, Any]:
    """{the session's name for it: NumPy array}"""
    return dict(zip([given.name for given in session.get_inputs()], arrays, strict=True))


def onnx_run(file: Path | bytes) -> ArrayRun:
    """What ONNX Runtime makes of a file or its content."""
    session = onnx_session(file)
    return lambda arrays: session.run(None, onnx_inputs(session, arrays))


def arrays_of(arguments: Any) -> list[Any]:
    """The NumPy array of every tensor among arguments, such as (args, kwargs), in their order."""
    return [leaf.detach().cpu().numpy() for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]


def of_tensors(run: ArrayRun) -> Callable[[Example], list[Tensor]]:
    """The same of the tensors of an example."""
    return lambda example: [torch.from_numpy(array) for array in run(arrays_of(call_arguments(example)))]


def batch_of(example: Example, size: int, seed: int = 0) -> Example:
    """`example` as a batch of `size`: its rows are repeated, and floating-point ones get noise of their own magnitude.

    An example of zeros becomes random numbers, and one of tokens stays within its vocabulary. Every tensor has its own
    memory.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = _rows(example)

    def of_size(tensor: Any) -> Any:
        if not isinstance(tensor, Tensor):
            return tensor
        if not _is_batched(tensor, rows):
            return tensor.detach().clone()
        drawn = tensor.detach()[torch.arange(size, device=tensor.device) % rows]
        if not tensor.is_floating_point():
            return drawn
        noise = torch.randn(drawn.shape, generator=generator).to(drawn)
        scale = drawn.std(correction=0)
        return drawn + noise * (scale if scale > 0 else 1.0)

    return tree_map(of_size, example)


def _rows(example: Example) -> int:
    """Length of the batch: that of the first tensor that has a dimension."""
    for leaf in tree_leaves(call_arguments(example)):
        if isinstance(leaf, Tensor) and leaf.dim():
            return leaf.shape[0]
    raise UserError("the example holds no tensor with a batch dimension; give the network's arguments as a batch")


def _is_batched(value: Any, rows: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == rows


def program_of(network: nn.Module, example: Example) -> torch.export.ExportedProgram:
    """The network traced on a small batch of its own memory: a slice would bring its whole tensor into the file."""
    args, kwargs = call_arguments(batch_of(tree_map(_on_cpu, example), TRACED))
    batch, shapes = torch.export.Dim("batch", min=1), torch.export.ShapesCollection()
    for given, tensor in zip(tree_leaves(call_arguments(example)), tree_leaves((args, kwargs)), strict=True):
        if _is_batched(given, _rows(example)):
            shapes[tensor] = {0: batch}
    return torch.export.export(network, args, kwargs, dynamic_shapes=shapes.dynamic_shapes(network, args, kwargs))


def _on_cpu(value: Any) -> Any:
    return value.cpu() if isinstance(value, Tensor) else value


def written(
    network: nn.Module,
    example: Example,
    path: Path,
    form: str,
    write: Callable[[Path], None],
    read: Callable[[Path], Callable[..., Sequence[Tensor]]],
) -> float:
    """Write the file, read it back, compare, and only then put it where it belongs. Returns the largest difference.

    network: on the CPU, in eval mode. form: what the file is, for errors.
    """
    kind = type(network).__name__
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder, torch.no_grad(), quiet():
        try:
            write(Path(folder) / path.name)
            run = read(Path(folder) / path.name)
            differences = [_difference(network, run, batch_of(tree_map(_on_cpu, example), n), n) for n in CHECKED]
        except UserError as error:
            raise UserError(f"{kind} as {form}: {error}") from error
        except Exception as error:  # exporters raise errors of any type
            why = one_line(error)[:200]
            raise UserError(f"{kind} cannot be written as {form} for batches of any size: {why}") from error
        for file in Path(folder).iterdir():  # two files where ONE_FILE is exceeded
            os.replace(file, path.parent / file.name)
    return max(differences)


def _difference(network: nn.Module, run: Callable[..., Sequence[Tensor]], inputs: Example, size: int) -> float:
    """The largest relative difference over the outputs for one batch; UserError where rounding does not explain it."""
    expected, found = _outputs(network, inputs), run(inputs)
    if [t.shape for t in expected] != [t.shape for t in found]:
        raise UserError(f"has outputs {[*map(_shape, found)]}, not {[*map(_shape, expected)]}, for a batch of {size}")
    worst = 0.0
    for one, other in zip(expected, found, strict=True):
        norm, limit = one.double().norm(), TOLERANCE.get(one.dtype, 0.0)
        difference = float((other.double() - one.double()).norm() / (norm if norm > 0 else 1.0))
        if not difference <= limit:
            raise UserError(
                f"differs from the network by {difference:.1e} for a batch of {size}; rounding explains {limit:.0e}"
            )
        worst = max(worst, difference)
    return worst


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _outputs(network: Callable[..., Any], inputs: Example) -> list[Tensor]:
    args, kwargs = call_arguments(inputs)
    return [leaf for leaf in tree_leaves(network(*args, **kwargs)) if isinstance(leaf, Tensor)]


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, exporters' warnings and logs are silent: where something matters, they raise an error that says so."""
    level = logging.root.manager.disable
    with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)  # because handlers of torch's loggers hold the stderr from before
        try:
            yield
        finally:
            logging.disable(level)
