"""Which weights are those of linear layers and convolutions, and which channels are filters or neurons."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

from torch import nn

from pipeline.compression.group import ChannelGroup, ChannelGroups
from pipeline.compression.merge.modules import named_tensors
from pipeline.tables import UserError, nearest, pick
from pipeline.vocabulary import UNITS

SHOWN = 8  # names in an error text


class LayerWeight(NamedTuple):
    """A weight of a linear layer or convolution.

    unit: what one of its outputs is: "filters" of a convolution, "neurons" of a linear layer.
    inputs: the dimension along which its inputs stand; transposed layers have them in front of their outputs.
    groups: number of groups of a convolution.
    """

    unit: str
    inputs: int
    groups: int = 1


def layer_weights(model: nn.Module) -> dict[str, LayerWeight]:
    """{name in the state_dict: LayerWeight}, tied weights under all their names.

    The projections of torch's attention and Hugging Face's Conv1D count as linear layers; embeddings do not.
    """
    found = {}
    for path, module in model.named_modules():
        for name in module._parameters:
            weight = _weight(module, name)
            if weight is not None and module._parameters[name] is not None:
                found[f"{path}.{name}".removeprefix(".")] = weight
    return found


def own_ratios(names: Sequence[str], ratio: float, own: Mapping[str, float]) -> dict[str, float]:
    """{name: its ratio}: that of the longest beginning of the name in `own`, else `ratio`.

    own: {beginning of a name: ratio in 0 <= r < 1; 0 leaves it whole}. UserError for a beginning that no name has.
    """
    for beginning, value in own.items():
        if isinstance(value, str) or not 0 <= value < 1:
            raise UserError(f"ratio {value} of {beginning!r} is out of range: the fraction to remove is 0 <= ratio < 1")
        check_beginning(f"no name begins with {beginning!r}, which has a ratio", beginning, names)
    fitting = {name: [beginning for beginning in own if name.startswith(beginning)] for name in names}
    return {name: own[max(found, key=len)] if found else ratio for name, found in fitting.items()}


def check_beginning(problem: str, beginning: str, names: Iterable[str]) -> None:
    """UserError where no name begins so: the problem, the name, or beginning of one, that is most alike, the names."""
    names = list(dict.fromkeys(names))
    if any(name.startswith(beginning) for name in names):
        return
    beginnings = [path for name in names for path in accumulate(name.split("."), "{}.{}".format)]
    more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    alike = nearest(beginning, dict.fromkeys(beginnings))
    raise UserError(f"{problem}{alike}; there are {', '.join(names[:SHOWN])}{more}")


def check_own(own: Mapping[str, float], allocate: str) -> None:
    """UserError for ratios of some groups beside a budget, which decides the sizes of all of them."""
    if own and allocate != "uniform":
        raise UserError(f"a budget ({allocate}) decides the sizes of all groups; leave ratios of layers out")


def _weight(module: nn.Module, name: str) -> LayerWeight | None:
    if isinstance(module, nn.MultiheadAttention) and name.endswith("proj_weight"):
        return LayerWeight("neurons", inputs=1)
    if name != "weight":
        return None
    if isinstance(module, nn.modules.conv._ConvNd):
        transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
        return LayerWeight("filters", inputs=0 if transposed else 1, groups=module.groups)
    if isinstance(module, nn.Linear):
        return LayerWeight("neurons", inputs=1)
    return LayerWeight("neurons", inputs=0) if hasattr(module, "nf") else None  # Conv1D, a linear layer transposed


def other_units(model: nn.Module, groups: ChannelGroups, units: str) -> list[ChannelGroup]:
    """The groups that are not of these units: "filters" are written by convolutions alone, "neurons" by linear layers.

    A group that both write, or an embedding (the stream of a transformer), is neither. "all": none are left out.
    Raises UserError for unknown units, and where the network has no group of these units.
    """
    pick("units", dict.fromkeys(UNITS), units)
    if units == "all":
        return []
    layers, tensors = layer_weights(model), named_tensors(model)

    def is_of_units(group: ChannelGroup) -> bool:
        # Biases and gains of norms, one number per channel, only shift or scale what others write; skipped.
        writers = [a for a in group.writes if a.tensor in layers or tensors[a.tensor].numel() > a.index.numel()]
        return {layers[a.tensor].unit if a.tensor in layers else "" for a in writers} == {units}

    others = [group for group in groups if not is_of_units(group)]
    if len(others) == len(groups):
        layer = {"filters": "convolutions", "neurons": "linear layers"}[units]
        raise UserError(
            f"{type(model).__name__} has no groups of {units}, channels that {layer} alone write; use units='all'"
        )
    return others
