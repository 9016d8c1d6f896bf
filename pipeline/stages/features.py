"""Features of a teacher as a lesson: hidden layers of the network that learns are held to those of the teacher.

FitNets (arXiv:1412.6550, section 2.2, eq. 3) first trains the lower part of a network to ½ ‖t - r(s)‖², where s are the
features of one of its layers, t those of one layer of the teacher, and r, the regressor, maps as many channels as s has
to as many as t has; then it distils answers. Here both are learned at once, at several layers, and the error is
‖t - r(s)‖² / ‖t‖², so that one weight is right for layers of any magnitude. The regressor is a linear map of channels
at every place, a 1x1 convolution. Where the network came from the teacher by compression, r starts at the unfolding: a
channel of t is the channel of s that it was merged into, or 0 where it was dropped. So a network that was folded
without loss starts with the error 0. Layers of equal widths have no regressor.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pipeline.compression.calibrate.compensate import readers
from pipeline.compression.calibrate.rows import channel_dim
from pipeline.compression.group import ChannelGroups
from pipeline.compression.plan import history
from pipeline.evaluate import output_on
from pipeline.example import Example
from pipeline.tables import UserError, nearest

SMALLEST = 1e-12  # least ‖t‖² that an error is divided by


class Place(NamedTuple):
    """Where features are taken: paths of a layer in both networks; dim: of the channels, None: see `channels_at`.

    output: what is taken is the layer's output; False: its first argument.
    """

    student: str
    teacher: str
    output: bool = True
    dim: int | None = None


@dataclass(frozen=True)
class Hints:
    """Two networks whose features are taken at every forward pass, until `remove` is called.

    regressors: by the place's number, for places of other widths; they learn with the network and are no part of it.
    """

    places: Sequence[Place]
    regressors: nn.ModuleDict
    said: dict[int, Tensor]
    taught: dict[int, Tensor]
    handles: Sequence[RemovableHandle]

    def loss(self) -> Tensor:
        """() ‖t - r(s)‖² / ‖t‖² of the last forward passes, the mean over the places. The features are forgotten."""
        errors = []
        for i, place in enumerate(self.places):
            said, taught = (channels_last(found.pop(i), place) for found in (self.said, self.taught))
            if str(i) in self.regressors:
                said = self.regressors[str(i)](said)
            errors.append(relative_error(said, taught))
        return torch.stack(errors).mean()

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


@contextmanager
def hinted(hints: Hints | None) -> Iterator[Hints | None]:
    """Inside, features are taken; afterwards both networks are as they were."""
    try:
        yield hints
    finally:
        if hints is not None:
            hints.remove()


def hints_of(
    student: nn.Module,
    teacher: nn.Module,
    example: Example,
    layers: Sequence[str],
    groups: Callable[[], ChannelGroups],
) -> Hints:
    """The hints of a teacher. The regressors of layers that no compression tells about are drawn at random.

    layers: paths of layers whose outputs are matched; "mine:theirs" where the teacher calls its layer otherwise. none:
        the inputs of the layers that read the channels of `groups`, where both networks have the same layers.
    example: the arguments of both networks. groups: gives the channel groups of the teacher.

    Raises UserError for a layer that is not there, for features of other shapes, and without layers for a network whose
    layers are not those of the teacher.
    """
    maps = cluster_maps(student, teacher)
    if layers:
        places = [place_of(said, student, teacher) for said in layers]
    else:
        places = of_groups(teacher, groups()) if layer_kinds(student) == layer_kinds(teacher) else []
        if not places:
            raise UserError(
                "features: the network that learns has not the layers of its teacher; name some of both, such as "
                "layers=[layer1,layer2], or layers=[mine:theirs]"
            )
    said: dict[int, Tensor] = {}
    taught: dict[int, Tensor] = {}
    handles = [*tap(student, {i: (p.student, p.output) for i, p in enumerate(places)}, said)]
    handles += tap(teacher, {i: (p.teacher, p.output) for i, p in enumerate(places)}, taught)
    found = Hints(places, nn.ModuleDict(), said, taught, handles)
    try:
        for net in (student, teacher):
            output_on(net, example)
        found.regressors.update(regressors(found, list(maps.values())))
    except BaseException:
        found.remove()
        raise
    return found


def cluster_maps(student: nn.Module, teacher: nn.Module) -> dict[str, Tensor]:
    """{group: (C,) int64, the student's channel that each of the teacher's C became, -1 = dropped}.

    From the steps that the student went through and the teacher did not. Groups that keep all channels are left out.
    {} where the student did not go through what the teacher did.
    """
    steps, before = history(student), history(teacher)
    if steps[: len(before)] != before:
        return {}
    found: dict[str, Tensor] = {}
    for step in steps[len(before) :]:
        for name, group in step.about.get("groups", {}).items():
            labels = torch.tensor(group["labels"])
            if name in found:  # a later step counts from the channels that the earlier one left
                labels = torch.where(found[name] >= 0, labels[found[name].clamp(min=0)], -1)
            found[name] = labels
    return found


def layer_kinds(model: nn.Module) -> dict[str, str]:
    """{path: class} of all layers."""
    return {name: type(module).__name__ for name, module in model.named_modules() if name}


def of_groups(teacher: nn.Module, groups: ChannelGroups) -> list[Place]:
    """The place of each group: the input of the last layer that reads these channels, one for one, and no others."""
    found = []
    for group in groups:
        plain = {axis.tensor for axis in group.reads if axis.is_plain}
        weights = [name for name in readers(teacher, [group]) if name in plain]
        alone = [name for name in weights if width_of(teacher, name) == group.size]
        if alone:
            layer = alone[-1].rpartition(".")[0]
            found.append(Place(layer, layer, False, channel_dim(teacher.get_submodule(layer))))
    return found


def width_of(model: nn.Module, weight: str) -> int:
    """How many channels the layer of this weight reads."""
    layer: Any = model.get_submodule(weight.rpartition(".")[0])
    return next(getattr(layer, name) for name in ("in_channels", "in_features", "nx") if hasattr(layer, name))


def place_of(said: str, student: nn.Module, teacher: nn.Module) -> Place:
    """The place of a text "layer" or "mine:theirs". UserError where a network has no such layer."""
    mine, _, theirs = said.partition(":")
    place = Place(mine, theirs or mine)
    for whose, net, name in (("the network", student, place.student), ("the teacher", teacher, place.teacher)):
        known = [path for path, _ in net.named_modules() if path]
        if name not in known:
            text = f"layers: {whose} has no layer {name!r}{nearest(name, known)}; name one that it has"
            raise UserError(f"{text}, such as {', '.join(known[:3])}")
    return place


def tap(model: nn.Module, places: Mapping[int, tuple[str, bool]], into: dict[int, Tensor]) -> list[RemovableHandle]:
    """Hooks that put the features of every forward pass into a dict. places: {key: (path, whether it is the output)}"""

    def keeper(key: int) -> tuple[Callable[..., None], Callable[..., None]]:
        # A copy of the network that takes the hook along (an average of its weights) must not say anything.
        def before(module: nn.Module, args: tuple) -> None:
            if module is layers[key]:
                into[key] = feature(args[0] if args else None, module)

        def behind(module: nn.Module, args: tuple, output: Any) -> None:
            if module is layers[key]:
                into[key] = feature(output, module)

        return before, behind

    layers = {key: model.get_submodule(path) for key, (path, _) in places.items()}
    handles = []
    for key, (_, is_output) in places.items():
        before, behind = keeper(key)
        layer = layers[key]
        handles.append(layer.register_forward_hook(behind) if is_output else layer.register_forward_pre_hook(before))
    return handles


def feature(value: Any, layer: nn.Module) -> Tensor:
    value = value[0] if isinstance(value, tuple) and value else value
    if not isinstance(value, Tensor):
        raise UserError(f"layers: a {type(layer).__name__} gives {type(value).__name__}, not a tensor; choose another")
    return value


def channels_at(features: Tensor, place: Place) -> int:
    """The dimension of the channels: that of the place, else the second one of pictures and the last one of tokens."""
    if place.dim is not None:
        return place.dim
    return 1 if features.dim() > 3 else -1


def channels_last(features: Tensor, place: Place) -> Tensor:
    return features.movedim(channels_at(features, place), -1)


def relative_error(said: Tensor, taught: Tensor) -> Tensor:
    """() ‖t - s‖² / ‖t‖², in float32."""
    said, taught = said.float(), taught.float()
    return (taught - said).square().sum() / taught.square().sum().clamp(min=SMALLEST)


@torch.no_grad()
def regressors(hints: Hints, maps: Iterable[Tensor]) -> dict[str, nn.Module]:
    """{place's number: regressor} of the places whose widths differ, from the features of one forward pass.

    maps: cluster maps. Where several have the widths of a place, it is that whose unfolding comes closest.
    """
    found: dict[str, nn.Module] = {}
    maps = list(maps)
    for i, place in enumerate(hints.places):
        said, taught = (channels_last(features[i], place) for features in (hints.said, hints.taught))
        if said.shape[:-1] != taught.shape[:-1]:
            shapes = f"{tuple(hints.said[i].shape)} and the teacher's {tuple(hints.taught[i].shape)}"
            raise UserError(
                f"layers: features of {place.student} are {shapes}; choose layers that differ in channels alone"
            )
        if said.shape[-1] == taught.shape[-1]:
            continue
        regressor = nn.Linear(said.shape[-1], taught.shape[-1], bias=False).to(said)
        starts = [unfolding(one) for one in maps if unfolding(one).shape == regressor.weight.shape]
        if starts:
            starts = [start.to(said) for start in starts]
            regressor.weight.copy_(min(starts, key=lambda start: float(relative_error(said @ start.T, taught))))
        found[str(i)] = regressor
    return found


def unfolding(labels: Tensor) -> Tensor:
    """(C, k): each of C channels is the one of k that it was merged into. labels: (C,) int64, -1 = dropped: 0"""
    return (labels[:, None] == torch.arange(int(labels.max()) + 1)).float()
