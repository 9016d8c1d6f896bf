"""Random small networks out of steps that couple, move, cut or mix channels."""

import random

import torch
import torch.nn.functional as F
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
        self.conv = nn.ConvTranspose2d(c, self.channels, 2, stride=2)

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


CLEAR = (Conv, Conv, Residual, Concat, Depthwise, Gate, Parameter, Transposed, Pool, Upsample, PadSpace, PadChannels,
         Cumulate, Roll, Normalise, Glu, Half, Flip)  # fmt: skip
# A trace of one size cannot tell these from what is sound.
CLOUDED = (ViewGlu, Shuffle, Interleave, Literal)


class RandomNet(nn.Module):
    def __init__(self, seed, steps):
        super().__init__()
        rng = random.Random(seed)
        self.stages = nn.ModuleList([Conv(rng, 3)])
        for _ in range(rng.randint(3, 7)):
            c = self.stages[-1].channels
            kind = rng.choice(steps)
            if c > 40 or c < 3 or (c % 2 and kind in (Glu, Half, ViewGlu, Shuffle)):
                kind = Conv
            self.stages.append(kind(rng, c))
        c = self.stages[-1].channels
        self.flat = rng.random() < 0.5
        self.head = nn.Sequential(nn.Linear(c * (16 if self.flat else 1), 7), nn.ReLU(), nn.Linear(7, 3))

    def forward(self, x):
        for stage in self.stages:
            x = stage(x)
        return self.head(x.flatten(1) if self.flat else x.mean((2, 3)))
