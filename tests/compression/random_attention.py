"""Attention as people write it: ways to project, split, normalise, turn, score and merge heads, drawn at random."""

import math
import random
from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# How a module keeps its sizes. Sizes in a closure, a tuple, a dict or another object cannot follow a smaller network:
# there the engine has to freeze, or the sizes are not needed.
KEPT = (*["attributes"] * 6, "tuple", "dict", "config", "closure")


LONGEST = 16  # sequence that parameters of its length are made for


class Sized(nn.Module):
    """A module that keeps named sizes in one of the ways of KEPT."""

    def keep(self, how: str, **sizes: int) -> None:
        self.how = how
        if how == "attributes":
            for name, size in sizes.items():
                setattr(self, name, size)
        elif how == "tuple":
            self.names, self.sizes = tuple(sizes), tuple(sizes.values())
        elif how == "dict":
            self.sizes = dict(sizes)
        elif how == "config":
            self.config = SimpleNamespace(**sizes)
        else:
            self.look_up = lambda name: sizes[name]

    def size(self, name: str) -> int:
        if self.how == "attributes":
            return getattr(self, name)
        if self.how == "tuple":
            return self.sizes[self.names.index(name)]
        if self.how == "dict":
            return self.sizes[name]
        return getattr(self.config, name) if self.how == "config" else self.look_up(name)


# projections: (B, T, C) -> queries (B, H, T, D), keys (B, G, T, D), values (B, G, T, E)


class Separate(Sized):
    """Three layers; the view infers the number of heads, their width or neither."""

    groups = True
    own_value_width = True

    def __init__(self, rng, c, h, g, d, e, bias, how):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(c, n, bias=b) for n, b in ((h * d, bias), (g * d, False), (g * e, bias)))
        self.inferred = rng.choice(["nothing", "heads", "width"])
        self.value_width = "head_dim" if d == e else "v_head_dim"
        self.keep(how, **{"num_heads": h, "num_kv_heads": g, self.value_width: e, "head_dim": d})

    def heads(self, x: Tensor, heads: str, width: str) -> Tensor:
        h = -1 if self.inferred == "heads" else self.size(heads)
        d = -1 if self.inferred == "width" else self.size(width)
        return x.view(*x.shape[:2], h, d).transpose(1, 2)

    def forward(self, x):
        return (
            self.heads(self.q(x), "num_heads", "head_dim"),
            self.heads(self.k(x), "num_kv_heads", "head_dim"),
            self.heads(self.v(x), "num_kv_heads", self.value_width),
        )


class Fused(Sized):
    """One layer for all three, cut apart in one of the ways of timm, torchvision, GPT-2, GPT-NeoX and LeViT."""

    groups = False
    own_value_width = False

    def __init__(self, rng, c, h, g, d, e, bias, how):
        super().__init__()
        self.qkv = nn.Linear(c, 3 * h * d, bias=bias)
        self.cut = rng.choice(["unbind", "index", "chunk", "split", "slice", "interleaved", "last"])
        self.inferred = rng.random() < 0.5
        self.keep(how, num_heads=h, head_dim=d, all_head_size=h * d)

    def forward(self, x):
        b, t = x.shape[:2]
        h = self.size("num_heads")
        d = -1 if self.inferred else self.size("head_dim")
        x = self.qkv(x)
        if self.cut == "unbind":
            return x.reshape(b, t, 3, h, d).permute(2, 0, 3, 1, 4).unbind(0)
        if self.cut == "index":
            x = x.view(b, t, 3, h, d).permute(2, 0, 3, 1, 4)
            return x[0], x[1], x[2]
        if self.cut == "interleaved":  # (head, which, width)
            return x.view(b, t, h, 3, d).permute(3, 0, 2, 1, 4).unbind(0)
        if self.cut == "last":  # (head, which and width)
            return x.view(b, t, h, -1).transpose(1, 2).chunk(3, -1)
        inner = self.size("all_head_size")
        parts = {
            "chunk": lambda: x.chunk(3, -1),
            "split": lambda: x.split(inner, -1),
            "slice": lambda: (x[..., :inner], x[..., inner : 2 * inner], x[..., 2 * inner :]),
        }[self.cut]()
        return [part.reshape(b, t, h, d).transpose(1, 2) for part in parts]


class FusedGroups(Sized):
    """Queries, keys and values of different sizes out of one layer."""

    groups = True
    own_value_width = True

    def __init__(self, rng, c, h, g, d, e, bias, how):
        super().__init__()
        self.layer = nn.Linear(c, h * d + g * d + g * e, bias=bias)
        self.keep(how, num_heads=h, num_kv_heads=g, head_dim=d, v_head_dim=e)

    def forward(self, x):
        h, g, d, e = map(self.size, ("num_heads", "num_kv_heads", "head_dim", "v_head_dim"))
        q, k, v = self.layer(x).split([h * d, g * d, g * e], dim=-1)
        return [y.unflatten(-1, (n, w)).transpose(1, 2) for y, n, w in ((q, h, d), (k, g, d), (v, g, e))]


class PartlyBiased(Sized):
    """A bias put together from two parameters and zeros, as in BEiT and EVA."""

    groups = False
    own_value_width = False

    def __init__(self, rng, c, h, g, d, e, bias, how):
        super().__init__()
        self.qkv = nn.Linear(c, 3 * h * d, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(h * d)), nn.Parameter(torch.zeros(h * d))
        self.register_buffer("k_bias", torch.zeros(h * d), persistent=False)
        self.keep(how, num_heads=h)

    def forward(self, x):
        bias = torch.cat([self.q_bias, self.k_bias, self.v_bias])
        x = F.linear(x, self.qkv.weight, bias)
        return x.view(*x.shape[:2], 3, self.size("num_heads"), -1).permute(2, 0, 3, 1, 4).unbind(0)


class Einsum(nn.Module):
    """Weights of three axes, multiplied by einsum."""

    groups = False
    own_value_width = True

    def __init__(self, rng, c, h, g, d, e, bias, how):
        super().__init__()
        self.q, self.k = nn.Parameter(torch.zeros(h, c, d)), nn.Parameter(torch.zeros(h, c, d))
        self.v = nn.Parameter(torch.zeros(h, c, e))

    def forward(self, x):
        return [torch.einsum("btc,hcd->bhtd", x, w) for w in (self.q, self.k, self.v)]


class Convolved(Sized):
    """1x1 convolutions over the tokens and a depthwise one on the queries, as convolutional transformers have them."""

    groups = False
    own_value_width = False

    def __init__(self, rng, c, h, g, d, e, bias, how):
        super().__init__()
        self.qkv = nn.Conv1d(c, 3 * h * d, 1, bias=bias)
        self.local = nn.Conv1d(h * d, h * d, 3, padding=1, groups=h * d)
        self.keep(how, num_heads=h)

    def forward(self, x):
        q, k, v = self.qkv(x.transpose(1, 2)).chunk(3, 1)
        return [y.view(len(y), self.size("num_heads"), -1, y.shape[-1]).mT for y in (self.local(q), k, v)]


PROJECTIONS = (*[Separate] * 5, *[Fused] * 5, FusedGroups, PartlyBiased, Einsum, Convolved)


# what happens to queries and keys before they meet


def rotated_halves(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)


def rotated_pairs(x: Tensor) -> Tensor:
    return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)


class Rotary(nn.Module):
    """Turns pairs of channels by angles of their own (arXiv:2104.09864); of a part of the width, if not of all."""

    def __init__(self, rng, d):
        super().__init__()
        self.part = d // 2 if d % 4 == 0 and rng.random() < 0.3 else d
        self.rotated = rng.choice([rotated_halves, rotated_pairs])
        self.register_buffer("frequencies", torch.arange(1.0, self.part // 2 + 1), persistent=False)

    def forward(self, x):
        turned, rest = x[..., : self.part], x[..., self.part :]
        angles = torch.arange(x.shape[2], dtype=x.dtype)[:, None] * self.frequencies
        angles = angles.repeat_interleave(2, -1) if self.rotated is rotated_pairs else angles.repeat(1, 2)
        turned = turned * angles.cos() + self.rotated(turned) * angles.sin()
        return turned if self.part == x.shape[-1] else torch.cat([turned, rest], -1)


class UnitLength(nn.Module):
    def forward(self, x):
        return F.normalize(x, dim=-1) * 3


def prepared(rng, d) -> nn.Module:
    """A module for queries or keys of width d: a norm, a rotation or nothing."""
    choices = [nn.Identity] * 8 + [lambda: nn.LayerNorm(d), lambda: nn.RMSNorm(d), UnitLength]
    if d % 2 == 0:
        choices += [lambda: Rotary(rng, d)] * 3
    return rng.choice(choices)()


# from queries (B, H, T, D), keys and values (B, H, T, ·) to (B, H, T, E)


class Scores(nn.Module):
    """Softmax attention. fused: scaled_dot_product_attention, or matmul and softmax by hand.

    scale: the root of the width that is found ("found"), that the module keeps ("kept"), or a number ("number").
    """

    def __init__(self, rng, h, d):
        super().__init__()
        self.fused = rng.random() < 0.5
        self.causal = rng.random() < 0.3
        self.scale = rng.choice(["found", "kept", "number", "none"])
        self.number, self.head_dim = d**-0.5, d
        self.product = rng.choice(["matmul", "einsum"])
        extra = rng.choice(["nothing"] * 12 + ["bias", "bias", "table", "temperature", "talk", "mask", "dropout"])
        self.extra = extra
        if extra == "bias":  # a map of its own for every head
            self.bias = nn.Parameter(torch.zeros(h, LONGEST, LONGEST))
        elif extra == "table":  # an indexed one, as in Swin
            self.table = nn.Parameter(torch.zeros(2 * LONGEST - 1, h))
            lag = torch.arange(LONGEST)[:, None] - torch.arange(LONGEST)
            self.register_buffer("index", (lag - lag.min()).flatten())
        elif extra == "temperature":
            self.temperature = nn.Parameter(torch.ones(h, 1, 1))
        elif extra == "talk":  # heads that hear each other (arXiv:2003.02436)
            self.talk = nn.Linear(h, h)
        elif extra == "dropout":
            self.dropout = nn.Dropout(0.1)

    def forward(self, q, k, v):
        t = q.shape[2]
        bias = None
        if self.extra == "bias":
            bias = self.bias[:, :t, :t]
        elif self.extra == "table":
            bias = self.table[self.index].view(LONGEST, LONGEST, -1).permute(2, 0, 1)[:, :t, :t]
        elif self.extra == "mask":
            bias = torch.arange(t, dtype=q.dtype, device=q.device) - torch.arange(t, dtype=q.dtype)[:, None]
        if self.extra == "temperature":
            q = q * self.temperature
        scale = {"found": q.shape[-1] ** -0.5, "kept": self.head_dim**-0.5, "number": self.number, "none": 1.0}
        if self.fused and self.extra != "talk":
            causal = self.causal and bias is None
            if self.scale == "found":
                return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal, scale=scale[self.scale])
        if self.product == "matmul":
            scores = (q * scale[self.scale]) @ k.transpose(-2, -1)
        else:
            scores = torch.einsum("bhid,bhjd->bhij", q, k) / (1 / scale[self.scale])
        if bias is not None:
            scores = scores + bias
        if self.extra == "talk":
            scores = self.talk(scores.movedim(1, -1)).movedim(-1, 1)
        if self.causal:
            scores = scores.masked_fill(torch.ones(t, t, dtype=torch.bool).triu(1), -math.inf)
        weights = scores.softmax(-1, dtype=torch.float32 if q.dtype == torch.float32 else None)
        if self.extra == "dropout":
            weights = self.dropout(weights)
        return weights @ v if self.product == "matmul" else torch.einsum("bhij,bhjd->bhid", weights, v)


class LinearAttention(nn.Module):
    """Attention without a softmax: keys meet values first (arXiv:2006.16236)."""

    def __init__(self, rng, h, d):
        super().__init__()

    def forward(self, q, k, v):
        q, k = F.relu(q), F.relu(k)
        return (q @ (k.transpose(-2, -1) @ v)) / ((q * k.sum(2, keepdim=True)).sum(-1, keepdim=True) + 1)


class Covariance(nn.Module):
    """Attention of channels to channels (arXiv:2106.09681): values (B, H, T, E) by scores (B, H, D, E)."""

    def __init__(self, rng, h, d):
        super().__init__()

    def forward(self, q, k, v):
        scores = F.normalize(q, dim=2).transpose(-2, -1) @ F.normalize(v, dim=2)
        return k @ scores.softmax(-2)


SCORES = (Scores,) * 12 + (LinearAttention, Covariance)


def repeat_interleave(x, times):
    return x.repeat_interleave(times, 1)


def expand(x, times):
    b, g, t, d = x.shape
    return x[:, :, None].expand(b, g, times, t, d).reshape(b, g * times, t, d)


class Attention(Sized):
    """(B, T, C) -> (B, T, channels). c: channels of the input; channels: those of the output, c if None."""

    def __init__(self, rng: random.Random, c: int, channels: int | None = None) -> None:
        super().__init__()
        self.channels = channels or c
        how = rng.choice(KEPT)
        self.projection_type = rng.choice(PROJECTIONS)
        h = rng.choice([1, 2, 2, 3, 4])
        g = rng.choice([n for n in (1, 2, 3, 4) if h % n == 0]) if self.projection_type.groups else h
        d = rng.choice([2, 3, 4, 6])
        e = rng.choice([d, d, 5]) if self.projection_type.own_value_width else d
        self.projection = self.projection_type(rng, c, h, g, d, e, rng.random() < 0.6, how)
        self.prepare_q, self.prepare_k = prepared(rng, d), nn.Identity()
        if not isinstance(self.prepare_q, nn.Identity) and rng.random() < 0.9:
            self.prepare_k = (
                type(self.prepare_q)(d) if not isinstance(self.prepare_q, UnitLength | Rotary) else (self.prepare_q)
            )
        self.keep(how, num_key_value_groups=h // g, inner_dim=h * e, heads=h)
        self.grouped = rng.choice(["repeat_interleave", "expand", "five axes", "enable_gqa"]) if g < h else "no"
        if self.grouped == "five axes":
            self.scores = GroupedScores(h // g)
        elif self.grouped == "enable_gqa":
            self.scores = TorchsGroupedScores()
        else:
            self.scores = rng.choice(SCORES)(rng, h, d)
        self.gain = nn.Parameter(torch.ones(h, 1, 1)) if rng.random() < 0.1 else None
        self.norm = rng.choice([nn.LayerNorm, nn.RMSNorm])(h * e) if rng.random() < 0.1 else None
        self.gate = nn.Linear(c, h * e) if rng.random() < 0.15 else None
        self.merge = rng.choice([*["inferred"] * 4, "flatten", "kept", "concat", "einsum"])
        if self.merge == "einsum" and self.norm is None and self.gate is None:
            self.last = nn.Parameter(torch.zeros(h, e, self.channels))
        else:
            self.merge = "inferred" if self.merge == "einsum" else self.merge
            self.last = nn.Linear(h * e, self.channels, bias=rng.random() < 0.7)

    def forward(self, x):
        q, k, v = self.projection(x)
        q, k = self.prepare_q(q), self.prepare_k(k)
        if self.grouped in ("repeat_interleave", "expand"):
            repeat = repeat_interleave if self.grouped == "repeat_interleave" else expand
            k, v = (repeat(y, self.size("num_key_value_groups")) for y in (k, v))
        y = self.scores(q, k, v)
        if self.gain is not None:
            y = y * self.gain
        if self.merge == "einsum":
            return torch.einsum("bhte,hec->btc", y, self.last)
        b, _, t, _ = y.shape
        y = {
            "inferred": lambda: y.transpose(1, 2).reshape(b, t, -1),
            "flatten": lambda: y.transpose(1, 2).flatten(2),
            "kept": lambda: y.transpose(1, 2).reshape(b, t, self.size("inner_dim")),
            "concat": lambda: torch.cat(y.unbind(1), -1),
        }[self.merge]()
        if self.norm is not None:
            y = self.norm(y)
        if self.gate is not None:
            y = y * torch.sigmoid(self.gate(x))
        return self.last(y)


class GroupedScores(nn.Module):
    """Queries (B, G, R, T, D) against keys (B, G, 1, T, D), without a copy of the keys."""

    def __init__(self, times):
        super().__init__()
        self.times = times

    def forward(self, q, k, v):
        q = q.unflatten(1, (-1, self.times))
        k, v = k.unsqueeze(2), v.unsqueeze(2)
        return ((q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v).flatten(1, 2)


class TorchsGroupedScores(nn.Module):
    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


class Torchs(nn.Module):
    """nn.MultiheadAttention, from a sequence to itself or to another one of other channels."""

    def __init__(self, rng, c, channels=None):
        super().__init__()
        self.channels = channels or c
        heads = rng.choice([1, 2, 3])
        inner = heads * rng.choice([2, 3, 4])
        self.first = nn.Linear(c, inner)
        other = rng.choice([None, None, 5])
        self.other = None if other is None else nn.Linear(c, other)
        self.batch_first = rng.random() < 0.7
        self.attention = nn.MultiheadAttention(
            inner, heads, bias=rng.random() < 0.7, batch_first=self.batch_first, kdim=other, vdim=other,
            add_bias_kv=rng.random() < 0.15, add_zero_attn=rng.random() < 0.15,
        )  # fmt: skip
        self.need_weights = rng.random() < 0.3
        self.last = nn.Linear(inner, self.channels)

    def forward(self, x):
        q = self.first(x)
        k = q if self.other is None else self.other(x)
        if not self.batch_first:
            q, k = (y.transpose(0, 1) for y in (q, k))
        y, _ = self.attention(q, k, k, need_weights=self.need_weights)
        return self.last(y if self.batch_first else y.transpose(0, 1))


ATTENTION: tuple[Callable[..., nn.Module], ...] = (Attention, Attention, Attention, Attention, Torchs)
