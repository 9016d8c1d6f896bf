"""Random small networks, for pictures and for tokens, out of steps that couple, move, cut or mix channels."""

import random

import torch
import torch.nn.functional as F
from random_attention import ATTENTION
from torch import nn


class Conv(nn.Module):
    def __init__(self, rng, c):
        super().__init__()
        self.channels = rng.choice([3, 4, 6, 8, 10])
        size = rng.choice([1, 3])
        layers = [nn.Conv2d(c, self.channels, size, padding=size // 2, bias=rng.random() < 0.5)]
        if rng.random() < 0.6:
            layers.append(nn.BatchNorm2d(self.channels, affine=rng.random() < 0.8))
        if rng.random() < 0.8:
            layers.append(rng.choice([nn.ReLU(inplace=True), nn.GELU(), nn.SiLU(), nn.LeakyReLU(0.2)]))
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return self.layers(x)


class Residual(nn.Module):
    def __init__(self, rng, c):
        super().__init__()
        inner = rng.choice([4, 6])
        self.block = nn.Sequential(
            nn.BatchNorm2d(c), nn.ReLU(), nn.Conv2d(c, inner, 3, padding=1), nn.ReLU(), nn.Conv2d(inner, c, 1)
        )
        self.channels = c
        self.operation = rng.choice([torch.add, torch.sub, torch.maximum, torch.mul])

    def forward(self, x):
        return self.operation(x, self.block(x))


class Concat(nn.Module):
    def __init__(self, rng, c):
        super().__init__()
        self.branch, self.first, self.again = Conv(rng, c), rng.random() < 0.5, rng.random() < 0.3
        self.channels = c * (2 if self.again else 1) + self.branch.channels

    def forward(self, x):
        parts = [x, self.branch(x)] if self.first else [self.branch(x), x]
        return torch.cat([*parts, x] if self.again else parts, 1)


class Depthwise(nn.Module):
    def __init__(self, rng, c):
        super().__init__()
        self.channels = c * rng.choice([1, 1, 2])
        self.conv = nn.Conv2d(c, self.channels, 3, padding=1, groups=c, bias=rng.random() < 0.5)
        self.norm = nn.BatchNorm2d(self.channels) if rng.random() < 0.5 else nn.Identity()

    def forward(self, x):
        return F.hardswish(self.norm(self.conv(x)))


class Grouped(nn.Module):
    """A convolution of several groups, perhaps with another one behind it."""

    def __init__(self, rng, c):
        super().__init__()
        groups = rng.choice([n for n in (2, 3, 4) if c % n == 0])
        self.channels = groups * rng.choice([1, 2, 3])
        size = rng.choice([1, 3])
        self.conv = nn.Conv2d(c, self.channels, size, padding=size // 2, groups=groups, bias=rng.random() < 0.5)
        self.norm = nn.BatchNorm2d(self.channels) if rng.random() < 0.5 else nn.Identity()
        self.again = nn.Conv2d(self.channels, self.channels, 1, groups=groups) if rng.random() < 0.5 else nn.Identity()

    def forward(self, x):
        return self.again(F.silu(self.norm(self.conv(x))))


class Gate(nn.Module):
    """Squeeze and excite, or one gate for all channels."""

    def __init__(self, rng, c):
        super().__init__()
        self.channels = c
        self.down, self.up = nn.Conv2d(c, 4, 1), nn.Conv2d(4, rng.choice([1, c]), 1)

    def forward(self, x):
        return x * torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))


class Parameter(nn.Module):
    def __init__(self, rng, c):
        super().__init__()
        self.channels = c
        self.gain = nn.Parameter(torch.ones(rng.choice([(c, 1, 1), (1, c, 1, 1), (1,)])))

    def forward(self, x):
        return x * self.gain + 1


class Transposed(nn.Module):
    def __init__(self, rng, c):
        super().__init__()
        self.channels = rng.choice([4, 6])
        groups = 2 if c % 2 == 0 and rng.random() < 0.3 else 1
        self.conv = nn.ConvTranspose2d(c, self.channels, 2, stride=2, groups=groups)

    def forward(self, x):
        return F.max_pool2d(self.conv(x), 2)


class Step(nn.Module):
    """A function of the activation alone."""

    def __init__(self, rng, c, changes=1.0):
        super().__init__()
        self.channels = int(c * changes)

    def forward(self, x):
        return self.function(x)


class Pool(Step):
    def function(self, x):
        return F.interpolate(F.avg_pool2d(F.adaptive_max_pool2d(x, 4), 2), size=4)


class Upsample(Step):
    def function(self, x):
        return F.max_pool2d(F.interpolate(x, scale_factor=2, mode="bilinear"), 2)


class PadSpace(Step):
    def function(self, x):
        return F.pad(x, (1, 1, 0, 0))[..., 1:-1]


class PadChannels(Step):
    def __init__(self, rng, c):
        super().__init__(rng, c + 2)

    def function(self, x):
        return F.pad(x, (0, 0, 0, 0, 1, 1))


class Flip(Step):
    def function(self, x):
        return torch.flip(x, [1])


class Cumulate(Step):
    def function(self, x):
        return torch.cumsum(x, 1)


class Roll(Step):
    def function(self, x):
        return torch.roll(x, 1, 1)


class Normalise(Step):
    def function(self, x):
        return F.layer_norm(x.movedim(1, -1), (x.shape[1],)).movedim(-1, 1)


class Glu(Step):
    def __init__(self, rng, c):
        super().__init__(rng, c, 0.5)

    def function(self, x):
        a, b = x.chunk(2, 1)
        return a * torch.sigmoid(b)


class Half(Step):
    def __init__(self, rng, c):
        super().__init__(rng, c, 0.5)

    def function(self, x):
        return x[:, : x.shape[1] // 2]


class ViewGlu(Step):
    def __init__(self, rng, c):
        super().__init__(rng, c, 0.5)

    def function(self, x):
        x = x.view(len(x), 2, x.shape[1] // 2, *x.shape[2:])
        return (x * torch.tensor([1.0, -2.0], dtype=x.dtype).view(1, 2, 1, 1, 1)).amax(1)


class Shuffle(Step):
    def function(self, x):
        return x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)


class TorchsShuffle(Step):
    def function(self, x):
        return F.channel_shuffle(x, 2)


class Interleave(Step):
    def __init__(self, rng, c):
        super().__init__(rng, c, 2)

    def function(self, x):
        return torch.stack([x, x.flip(1)], 2).flatten(1, 2)


class Literal(Step):
    def __init__(self, rng, c):
        super().__init__(rng, c)

    def function(self, x):
        return F.relu(x.reshape(-1, self.channels, x.shape[2] * x.shape[3])).view(x.shape)


class Branches(nn.Module):
    """Parts of the channels go different ways, as in ShuffleNetV2 and CSP networks."""

    def __init__(self, rng, c):
        super().__init__()
        self.cut = rng.choice(["chunk", "split", "slices"])
        self.half = c // 2
        self.branch = Conv(rng, self.half)
        self.channels = c - self.half + self.branch.channels
        self.residual = self.branch.channels == self.half
        self.all = rng.random() < 0.3
        self.channels += self.half if self.all else 0

    def forward(self, x):
        a, b = {
            "chunk": lambda: x.chunk(2, 1),
            "split": lambda: x.split([x.shape[1] - self.half, self.half], 1),
            "slices": lambda: (x[:, : -self.half], x[:, -self.half :]),
        }[self.cut]()
        y = self.branch(b)
        y = b + y if self.residual else y
        return torch.cat([a, b, y] if self.all else [a, y], 1)


class Attend(nn.Module):
    """Attention of the pixels to each other."""

    def __init__(self, rng, c):
        super().__init__()
        self.attention = rng.choice(ATTENTION)(rng, c)
        self.residual = rng.random() < 0.5
        self.channels = c

    def forward(self, x):
        y = self.attention(x.flatten(2).transpose(1, 2))
        y = y.transpose(1, 2).reshape(x.shape)
        return x + y if self.residual else y


# steps of tokens: (B, T, C)


class Dense(nn.Module):
    def __init__(self, rng, c):
        super().__init__()
        self.channels = rng.choice([4, 6, 8])
        self.layer = nn.Linear(c, self.channels, bias=rng.random() < 0.7)
        self.act = rng.choice([nn.GELU(), nn.ReLU(), nn.Identity()])

    def forward(self, x):
        return self.act(self.layer(x))


class Mlp(nn.Module):
    """Two layers, or three with a gate, whose halves may come out of one layer."""

    def __init__(self, rng, c):
        super().__init__()
        inner = rng.choice([4, 6, 10])
        self.kind = rng.choice(["plain", "plain", "gated", "chunked", "split", "glu"])
        self.up = nn.Linear(c, inner * (2 if self.kind in ("chunked", "split", "glu") else 1), bias=rng.random() < 0.7)
        self.gate = nn.Linear(c, inner) if self.kind == "gated" else None
        self.down = nn.Linear(inner, c)
        self.inner, self.channels = inner, c

    def forward(self, x):
        y = self.up(x)
        if self.kind == "plain":
            return self.down(F.gelu(y))
        if self.kind == "glu":
            return self.down(F.glu(y, -1))
        if self.kind == "gated":
            a, b = y, self.gate(x)
        else:
            a, b = y.chunk(2, -1) if self.kind == "chunked" else y.split(self.inner, -1)
        return self.down(F.silu(a) * b)


class AcrossTokens(nn.Module):
    """The token mixing of MLP-Mixer (arXiv:2105.01601), which takes tokens for channels."""

    def __init__(self, rng, c):
        super().__init__()
        self.channels, inner = c, rng.choice([4, 7])
        self.mlp = nn.Sequential(nn.Linear(TOKENS, inner), nn.GELU(), nn.Linear(inner, TOKENS))

    def forward(self, x):
        return self.mlp(x.transpose(1, 2)).transpose(1, 2)


class AlongTokens(nn.Module):
    """A convolution over the tokens: of each channel, of groups of them or of all."""

    def __init__(self, rng, c):
        super().__init__()
        groups = rng.choice([1, c, 2 if c % 2 == 0 else 1])
        self.channels = c if groups == c else rng.choice([4, 6])
        self.conv = nn.Conv1d(c, self.channels, 3, padding=1, groups=groups)

    def forward(self, x):
        return self.conv(x.transpose(1, 2)).transpose(1, 2)


class Widen(nn.Module):
    """A layer whose outputs stand beside its inputs, as more channels."""

    def __init__(self, rng, c):
        super().__init__()
        self.more, self.first = Dense(rng, c), rng.random() < 0.5
        self.channels = c + self.more.channels

    def forward(self, x):
        return torch.cat([self.more(x), x] if self.first else [x, self.more(x)], -1)


class Block(nn.Module):
    """A residual step, with its norm before, behind or nowhere, and perhaps a gain for each channel."""

    def __init__(self, rng, c):
        super().__init__()
        self.step = rng.choice((*ATTENTION, Mlp, Mlp, AcrossTokens))(rng, c)
        norms = [nn.LayerNorm, nn.RMSNorm, lambda n: nn.LayerNorm(n, elementwise_affine=False), lambda n: nn.Identity()]
        self.norm, self.before = rng.choice(norms)(c), rng.random() < 0.7
        self.gain = nn.Parameter(torch.ones(c)) if rng.random() < 0.3 else None
        self.channels = c

    def forward(self, x):
        y = self.step(self.norm(x) if self.before else x)
        y = y if self.gain is None else y * self.gain
        return x + y if self.before else self.norm(x + y)


CLEAR = (Conv, Conv, Residual, Concat, Depthwise, Grouped, Gate, Parameter, Transposed, Pool, Upsample, PadSpace,
         PadChannels, Cumulate, Roll, Normalise, Flip)  # fmt: skip
# A trace at one size cannot tell these steps from sound ones.
CLOUDED = (Half, Glu, Branches, ViewGlu, Shuffle, TorchsShuffle, Interleave, Literal, Attend, Attend)
EVEN = (Half, Glu, Branches, ViewGlu, Shuffle, TorchsShuffle, Grouped)
OF_TOKENS = (Block, Block, Block, Dense, AlongTokens, Widen, *ATTENTION)
TOKENS = 5


class RandomNet(nn.Module):
    """(B, 3, 4, 4) -> (B, 3)."""

    def __init__(self, seed, steps):
        super().__init__()
        rng = random.Random(seed)
        self.stages = nn.ModuleList([Conv(rng, 3)])
        for _ in range(rng.randint(3, 7)):
            c = self.stages[-1].channels
            kind = rng.choice(steps)
            if c > 40 or c < 3 or (c % 2 and kind in EVEN):
                kind = Conv
            self.stages.append(kind(rng, c))
        c = self.stages[-1].channels
        self.flat = rng.random() < 0.5
        self.head = nn.Sequential(nn.Linear(c * (16 if self.flat else 1), 7), nn.ReLU(), nn.Linear(7, 3))

    def forward(self, x):
        for stage in self.stages:
            x = stage(x)
        return self.head(x.flatten(1) if self.flat else x.mean((2, 3)))


class RandomTokenNet(nn.Module):
    """(B, TOKENS) int64 -> (B, ...), with any of the usual heads on top."""

    def __init__(self, seed):
        super().__init__()
        rng = random.Random(seed)
        self.embedding = nn.Embedding(11, rng.choice([4, 6, 8]))
        c = self.embedding.embedding_dim
        self.position = nn.Parameter(torch.zeros(rng.choice([(1, TOKENS, c), (TOKENS, c)])))
        self.stages = nn.ModuleList()
        for _ in range(rng.randint(1, 3)):
            self.stages.append(rng.choice(OF_TOKENS)(rng, c if not self.stages else self.stages[-1].channels))
        c = self.stages[-1].channels
        self.norm = rng.choice([nn.LayerNorm, nn.RMSNorm, nn.Identity])(c)
        self.top = rng.choice(["mean", "first", "flat", "each", "tied"])
        if self.top == "tied" and c != self.embedding.embedding_dim:
            self.top = "each"
        self.head = nn.Linear(c * (TOKENS if self.top == "flat" else 1), 11, bias=self.top != "tied")
        if self.top == "tied":
            self.head.weight = self.embedding.weight

    def forward(self, ids):
        x = self.embedding(ids) + self.position
        for stage in self.stages:
            x = stage(x)
        x = self.norm(x)
        x = {"mean": lambda: x.mean(1), "first": lambda: x[:, 0], "flat": lambda: x.flatten(1)}.get(
            self.top, lambda: x
        )()
        return self.head(x)
