"""Small networks, each with one feature that compression must handle, and helpers of the tests."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.compression import Projection, channel_groups
from pipeline.compression.merge.modules import apply
from pipeline.compression.trace.verify import duplicate_
from pipeline.models import build_model
from pipeline.models.cifar_resnet import CifarResNet


def picture(batch=2, channels=3, size=8):
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(5))


def between(step, **parts):
    """conv1, conv2, the step, conv3: conv1's channels can shrink whatever the step does."""
    return Net(
        lambda net, x: head(net, net.conv3(step(net, net.conv2(F.relu(net.conv1(x)))))),
        conv1=nn.Conv2d(3, 6, 3), conv2=nn.Conv2d(6, 8, 3), conv3=nn.Conv2d(8, 6, 3), head=nn.Linear(6, 4), **parts,
    )  # fmt: skip


def randomise_(model: nn.Module, seed: int = 0, negative_gains: bool = False) -> nn.Module:
    """In place: weights and statistics as after some training, none at its initial value. Returns the model.

    negative_gains: BatchNorms have gains of both signs, and zeros.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.dim() > 1:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) / tensor[0].numel() ** 0.5)
            elif tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.2)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
                module.running_mean.sub_(0.7)
                if not module.affine:
                    continue
                module.bias.sub_(0.5)
                if negative_gains:
                    module.weight.sub_(0.7)
                    module.weight[::3] = 0.0
    return model.eval()


def uneven_labels(size: int, clusters: int, generator: torch.Generator) -> Tensor:
    """Labels in no order: one cluster is large, some have one channel."""
    labels = torch.cat([torch.arange(clusters), torch.full((size - clusters,), clusters - 1)])
    if clusters > 2:  # and one has two
        labels[-1] = 0
    return labels[torch.randperm(size, generator=generator)]


def uneven_projections(groups, seed: int = 0, kept: float = 0.5) -> list[Projection]:
    generator = torch.Generator().manual_seed(seed)
    return [Projection(uneven_labels(g.size, max(1, int(g.size * kept)), generator)) for g in groups]


def kept_half(size: int) -> Projection:
    """Every second channel is kept."""
    return Projection(torch.where(torch.arange(size) % 2 == 0, torch.arange(size) // 2, -1))


def pruned(groups) -> list[Projection]:
    return [kept_half(group.size) for group in groups]


def relative_error(expected: Tensor, found: Tensor) -> float:
    assert expected.shape == found.shape
    assert expected.isfinite().all()
    assert expected.std() > 1e-3  # an output that does not depend on its input would prove nothing
    return float((expected - found).norm() / expected.norm())


def fold_error(model, example, groups, seed=0, norm_scale=True) -> float:
    """Error of folding exact duplicates in uneven clusters; the model is changed."""
    projections = uneven_projections(groups, seed)
    duplicate_(model, groups, projections)
    args = example if isinstance(example, tuple) else (example,)
    with torch.no_grad():
        return relative_error(model(*args), apply(model, groups, projections, norm_scale)(*args))


def names(axes) -> set[str]:
    return {axis.tensor for axis in axes}


def frozen_reason(groups, tensor: str) -> str:
    """Why the channels of a tensor are frozen, all reasons in one string."""
    return "; ".join(f.reason for f in groups.frozen if tensor in f.tensors)


class Net(nn.Module):
    """A network of named parts, and a function that is its forward."""

    def __init__(self, forward, **parts):
        super().__init__()
        for name, part in parts.items():
            if isinstance(part, nn.Parameter | nn.Module):
                setattr(self, name, part)
            else:
                self.register_buffer(name, part)
        self.computes = forward

    def forward(self, *inputs):
        return self.computes(self, *inputs)


def head(net, x):
    return net.head(x.mean((2, 3)))


def torch_attention() -> nn.Module:
    return nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)


def vgg():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 6, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(24, 12), nn.ReLU(), nn.Dropout(), nn.Linear(12, 5),
    )  # fmt: skip


def dense():
    def forward(net, x):
        x = net.stem(x)
        for layer in (net.a, net.b):
            x = torch.cat([x, layer(x)], 1)
        return head(net, F.relu(net.norm(x)))

    def layer(channels):
        return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, 6, 3, padding=1, bias=False))

    return Net(
        forward, stem=nn.Conv2d(3, 8, 3, padding=1), a=layer(8), b=layer(14), norm=nn.BatchNorm2d(20),
        head=nn.Linear(20, 5),
    )  # fmt: skip


def mobile():
    """A depthwise convolution, one with a channel multiplier, and squeeze-excite."""

    def forward(net, x):
        y = F.hardswish(net.norm(net.depthwise(F.silu(net.expand(x)))))
        y = y * torch.sigmoid(net.up(F.relu(net.down(y.mean((2, 3), keepdim=True)))))
        return head(net, net.wide(y))

    return Net(
        forward, expand=nn.Conv2d(3, 12, 1), depthwise=nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False),
        norm=nn.BatchNorm2d(12), down=nn.Conv2d(12, 6, 1), up=nn.Conv2d(6, 12, 1),
        wide=nn.Conv2d(12, 24, 3, groups=12), head=nn.Linear(24, 5),
    )  # fmt: skip


def conv_norms():
    """Convolutions with and without bias before the norm; a norm without gain; two layers on one output."""

    def forward(net, x):
        x = F.leaky_relu(net.norm1(net.conv1(x)))
        x = F.relu(net.norm2(net.conv2(x)))
        y = net.conv3(x)
        return head(net, F.gelu(net.norm3(y)) + y)

    return Net(
        forward, conv1=nn.Conv2d(3, 10, 3), norm1=nn.BatchNorm2d(10), conv2=nn.Conv2d(10, 8, 3, bias=False),
        norm2=nn.BatchNorm2d(8, affine=False), conv3=nn.Conv2d(8, 9, 1), norm3=nn.BatchNorm2d(9, eps=0.1),
        head=nn.Linear(9, 5),
    )  # fmt: skip


def applied_twice():
    """One convolution behind two norms, one norm behind two convolutions, one block on its own output."""

    def forward(net, x):
        x = net.stem(x)
        x = F.relu(net.norm1(net.conv(x))) + F.relu(net.norm2(net.conv(F.relu(x))))
        x = net.shared(net.a(x)) + net.shared(net.b(x))
        return head(net, net.block(net.block(x)))

    return Net(
        forward, stem=nn.Conv2d(3, 8, 3), conv=nn.Conv2d(8, 6, 1, bias=False), norm1=nn.BatchNorm2d(6),
        norm2=nn.BatchNorm2d(6), a=nn.Conv2d(6, 8, 1), b=nn.Conv2d(6, 8, 1), shared=nn.BatchNorm2d(8),
        block=nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()), head=nn.Linear(8, 5),
    )  # fmt: skip


def tied():
    """Two layers that hold one weight, and an embedding that is its own classifier."""
    net = nn.Sequential(nn.Embedding(7, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 12),
                        nn.ReLU(), nn.Linear(12, 8), nn.Linear(8, 7, bias=False))  # fmt: skip
    net[3].weight = net[1].weight
    net[8].weight = net[0].weight
    return net


def transposed():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.ConvTranspose2d(8, 10, 2, stride=2),
        nn.BatchNorm2d(10), nn.ReLU(), nn.Upsample(scale_factor=2), nn.Conv2d(10, 6, 3), nn.ReLU(),
        nn.ConvTranspose2d(6, 4, 2, stride=2),
    )  # fmt: skip


def embedded():
    return nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, 4))


def shuffled():
    """Pixel shuffles, a repeat, a stack and a flip: a channel is several rows or columns."""

    def forward(net, x):
        x = F.pixel_shuffle(net.conv1(x), 2)
        x = F.pixel_unshuffle(F.relu(net.conv2(x)), 2)
        x = net.conv3(x).repeat(1, 2, 1, 1)
        x = net.conv4(torch.flip(x, [1]))
        return net.head(torch.stack([x.amax((2, 3)), x.mean((2, 3))], 1).flatten(1))

    return Net(
        forward, conv1=nn.Conv2d(3, 24, 3, padding=1), conv2=nn.Conv2d(6, 5, 3, padding=1),
        conv3=nn.Conv2d(20, 7, 3), conv4=nn.Conv2d(14, 9, 1), head=nn.Linear(18, 4),
    )  # fmt: skip


def vit():
    return build_model(
        "timm", 5, 3, architecture="vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2
    )


TOKENS = torch.arange(10).view(2, 5) % 7
NETS = {
    "resnet18": (lambda: build_model("resnet18", 10, 3, width=4), picture()),
    "preact_resnet18": (lambda: build_model("preact_resnet18", 10, 3, width=4), picture()),
    "cifar_resnet": (lambda: CifarResNet(1, 10, 3), picture()),
    "vit": (vit, picture(size=16)),
    "vgg": (vgg, picture()),
    "dense": (dense, picture()),
    "mobile": (mobile, picture()),
    "conv_norms": (conv_norms, picture()),
    "applied_twice": (applied_twice, picture()),
    "tied": (tied, TOKENS),
    "transposed": (transposed, picture()),
    "embedded": (embedded, TOKENS),
    "shuffled": (shuffled, picture()),
}


def duplicated(name: str, dtype=torch.float64, **options):
    """(model of exact duplicates in uneven clusters, example, groups, projections that fold them)."""
    build, example = NETS[name]
    model = randomise_(build(), **options).to(dtype)
    example = example.to(dtype) if example.is_floating_point() else example
    groups = channel_groups(model, example)
    projections = uneven_projections(groups)
    duplicate_(model, groups, projections)
    return model, example, groups, projections
