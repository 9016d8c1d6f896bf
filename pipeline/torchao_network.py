"""Networks in int8 by torchao, on the CPU: programs of pt2e for convolutions, quantized tensors for linear layers.

Only torch.compile computes them fast. Their file holds the tensors that they compute with and nothing else: a
state_dict of pt2e keeps the dead float weights too, and is larger than the network was. Neither a program nor a tensor
of torchao is ever read back, as both are pickles: who goes on with a chain makes the network again.
"""

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from pipeline.compression.calibrate.batches import Batches
from pipeline.compression.checkpoint import stored_tensors
from pipeline.compression.copies import bare_copy
from pipeline.cpu import saturates
from pipeline.example import Example, call_arguments
from pipeline.export import program_of, quiet
from pipeline.finished import FinishedNetwork
from pipeline.tables import UserError, one_line, optional

# Kernels of int8 take channels by fours at least; at other counts the compiler writes loops of its own, for minutes.
CHANNELS = 8
ACTIVATIONS = ("int8", "float")  # of linear layers: rounded anew for each row of each batch, or left as they are


class TorchaoNetwork(FinishedNetwork):
    """A network that torchao quantized. program: computes it; tensors: those that it computes with."""

    runtime, saved_as = "compiled", "quantized by torchao for torch.compile"

    def __init__(self, program: nn.Module, tensors: dict[str, Tensor], params: int, macs: int) -> None:
        super().__init__(safetensors.torch.save(tensors), params, macs)
        self._held = (program,)  # no submodule, whose tensors would be those of a state_dict and whose mode can change

    @property
    def program(self) -> nn.Module:
        return self._held[0]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        device = next(leaf.device for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        args, kwargs = tree_map(lambda leaf: leaf.cpu() if isinstance(leaf, Tensor) else leaf, (args, kwargs))
        return tree_map(
            lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, self.program(*args, **kwargs)
        )


def need_torchao() -> None:
    """Raise UserError where torchao is missing."""
    optional("ptq(backend=pt2e) and ptq(backend=torchao)", "torchao", "torchao")


@torch.no_grad()
def by_pt2e(model: nn.Module, example: Example, pictures: Batches) -> tuple[nn.Module, dict[str, Tensor]]:
    """(a program, the tensors that it computes with): convolutions and linear layers with int8 weights and activations.

    X86InductorQuantizer: a scale for each output of a weight, one for each activation, its range by torchao's histogram
    on the pictures. UserError for a network that cannot be exported, of channel counts that cannot be compiled in
    reasonable time, or without a layer that was quantized.
    """
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    network = bare_copy(model).cpu().eval()
    check_channels(network)
    with quiet():
        try:
            quantizer = X86InductorQuantizer().set_global(
                get_default_x86_inductor_quantization_config(reduce_range=saturates())
            )
            watched = prepare_pt2e(program_of(network, example).module(), quantizer)
            for batch in pictures:
                args, kwargs = call_arguments(tree_map(lambda x: x.cpu() if isinstance(x, Tensor) else x, batch))
                watched(*args, **kwargs)
            program = convert_pt2e(watched)
        except Exception as error:  # its libraries raise errors of any type
            raise UserError(f"{type(model).__name__} cannot be quantized by pt2e: {one_line(error)}") from error
    live = {str(node.target) for node in program.graph.nodes if node.op == "get_attr"}
    return program, quantized(model, {name: attrgetter(name)(program) for name in sorted(live)})


def by_tensors(model: nn.Module, activations: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """(a network, the tensors that it computes with) whose linear layers have int8 weights, a scale for each output.

    activations: of ACTIVATIONS. UserError for a network without a linear layer.
    """
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

    configs: dict[str, Callable[[], Any]] = {
        "int8": Int8DynamicActivationInt8WeightConfig,
        "float": Int8WeightOnlyConfig,
    }
    network = bare_copy(model).cpu().eval()
    with quiet():
        quantize_(network, configs[activations]())
    tensors: dict[str, Tensor] = {}
    for name, tensor in stored_tensors(network)[0].items():
        names = getattr(tensor, "tensor_data_names", ())
        tensors |= {f"{name}.{part}": getattr(tensor, part) for part in names} if names else {name: tensor}
    return network, quantized(model, tensors)


def check_channels(network: nn.Module) -> None:
    """Raise UserError for hidden convolutions whose channels are no multiple of CHANNELS."""
    convolutions = [layer for layer in network.modules() if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)]
    odd = sorted({layer.out_channels for layer in convolutions if layer.out_channels % CHANNELS})
    if odd:
        raise UserError(
            f"torch.compile takes minutes for int8 convolutions of {odd[0]} channels; "
            f"compress with round_to={CHANNELS}, or choose backend=onnx"
        )


def quantized(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as a file takes them. UserError where none has 8 bits: quantizers pass over what they do not know."""
    if not any(tensor.dtype == torch.int8 and tensor.dim() > 1 for tensor in tensors.values()):
        raise UserError(f"{type(model).__name__} has no layer that torchao quantizes this way; leave ptq out")
    return {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
