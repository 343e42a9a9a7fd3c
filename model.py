"""The network: it reads (x_t, t) and predicts logits of x_0. Nothing here knows about diffusion.

    x_t      integers [B, 1, H, W] in 0..num_states-1
    t        integers [B]
    y        labels, int64 [B] in 0..num_labels-1, -1 for none; only if num_labels > 0
    maps     float [B, 6], how each picture was augmented, 0 for not at all; only if `augmented`
    output   float [B, num_levels, H, W]

For your own network, write a class with this interface, add it to `NETWORKS`, and select it with
train.py --network. It is built with the keyword arguments of `UNet`; its `config` holds its `name`
and the arguments that rebuild it. `hidden_matrices()` lists the weights for Muon to orthogonalize;
without it, train with --optimizer adamw. On CUDA the training step becomes a CUDA graph: forward
must not sync (no `.item()`).
"""

import math
import warnings
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

OUTPUTS = ("softmax", "logistic")
FLOOR = 1e-6  # as in the authors' log(p + 1e-6), but the probabilities still sum to one


def time_features(t: Tensor, dim: int) -> Tensor:
    """Sines and cosines of t at geometrically spaced frequencies: [B] -> float [B, dim]."""
    steps = torch.arange(dim // 2, device=t.device)
    angles = t[:, None].float() * torch.exp(-math.log(10_000) * steps / len(steps))
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def one_hot(x: Tensor, num_states: int) -> Tensor:
    """Integers [B, 1, H, W] -> float [B, num_states, H, W]."""
    return (x == torch.arange(num_states, device=x.device).view(1, -1, 1, 1)).float()


def as_numbers(x: Tensor, num_levels: int) -> Tensor:
    """Levels as float numbers from -1 to 1, a mask as 0."""
    x = x.float()  # first, as bytes can't be compared with 256
    return torch.where(x < num_levels, 2 * x / (num_levels - 1) - 1, 0.0)


def logistic_logits(mean: Tensor, log_scale: Tensor, num_levels: int) -> Tensor:
    """Logits of a truncated discretized logistic (appendix A.8): [B, 1, H, W] -> [B, K, H, W].

    The levels are the centres of K bins, -1 .. 1. A bin from a to b, in scales from the mean, has

        log(sigmoid(b) - sigmoid(a)) = log sigmoid(b) + log sigmoid(-a) + log(1 - exp(a - b)).

    The last term is the same for every bin, so the softmax, which truncates, cancels it. A
    log-scale of 0 means a scale of exp(-2), as in the authors' code. FLOOR of the mass is uniform:
    otherwise a very narrow logistic rules out all other levels and makes the bound infinite.
    """
    centres = torch.linspace(-1, 1, num_levels, dtype=mean.dtype, device=mean.device)
    centres, half_bin = centres.view(1, -1, 1, 1), 1 / (num_levels - 1)
    per_scale = torch.exp(2 - log_scale.clamp(min=-8))  # -8: a hundredth of one of 256 bins
    upper, lower = (per_scale * (centres + side * half_bin - mean) for side in (1, -1))
    logits = F.logsigmoid(upper) + F.logsigmoid(-lower)
    return torch.logaddexp(logits.log_softmax(1), logits.new_full((), math.log(FLOOR / num_levels)))


class ResBlock(nn.Module):
    """Pre-activation residual block. The time embedding scales and shifts between convolutions."""

    def __init__(self, channels: int, emb_dim: int, dropout: float):
        super().__init__()
        self.norm1 = nn.GroupNorm(8, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.scale_shift = nn.Linear(emb_dim, 2 * channels)
        self.norm2 = nn.GroupNorm(8, channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)  # every block starts as the identity
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.scale_shift(emb)[:, :, None, None].chunk(2, dim=1)
        h = self.norm2(h) * (1 + scale) + shift
        return x + self.conv2(self.dropout(F.silu(h)))


class Attention(nn.Module):
    """Multi-head self-attention over all positions, residual."""

    def __init__(self, channels: int, heads: int = 2):
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(8, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x)).permute(0, 2, 3, 1)  # channels last, as in memory
        qkv = qkv.reshape(B, H * W, 3, self.heads, C // self.heads).transpose(1, 3)
        q, k, v = qkv.unbind(2)  # each [B, heads, H*W, C/heads]
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, H, W, C)
        return x + self.out(h.permute(0, 3, 1, 2))


class Stage(nn.Module):
    """Residual blocks of one resolution, each followed by attention if `attention`."""

    def __init__(self, channels: int, blocks: int, emb_dim: int, dropout: float, attention: bool):
        super().__init__()
        self.blocks = nn.ModuleList(ResBlock(channels, emb_dim, dropout) for _ in range(blocks))
        layers = (Attention(channels) if attention else nn.Identity() for _ in range(blocks))
        self.attention = nn.ModuleList(layers)

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        for block, attention in zip(self.blocks, self.attention, strict=True):
            h = attention(block(h, emb))
        return h


class UNet(nn.Module):
    """The default network, made for CPUs. `UNet()` is for two grey levels.

    The input folds 2x2 pixels into channels and the output unfolds them, so all work is done at
    1/2, 1/4 and 1/8 of the resolution, with attention at the two lower ones. Skip connections add
    the features of the way down on the way up. The output adds a learned table by t and the pixel's
    noisy state, since x_0 depends most on how far x_t can be trusted at t.

    Args:
        num_levels, num_states: K, the values of x_0; S, those of x_t, K by default.
        channels: width at 1/2, 1/4 and 1/8 of the resolution, multiples of 8.
        blocks: residual blocks at each resolution, on the way down and again on the way up.
        num_labels: the number of classes; 0 for none.
        output: "softmax", or "logistic" for ordered levels: a discretized logistic, whose mean is
            the noisy level plus a correction (no tanh, unlike the authors: 0 means x_0 = x_t).
        ordinal: also input x_t as a number from -1 to 1, as the authors do, so that neighbouring
            levels look alike from the start.
        dropout: probability of dropout in the residual blocks.
        augmented: the network is told how each picture was augmented. Without `maps`, it predicts
            pictures as they are.

    Raises:
        ValueError: for arguments out of range; by `forward` for sides that are not multiples of 8.
    """

    def __init__(
        self,
        num_levels: int = 2,
        num_states: int | None = None,
        channels=(24, 64, 96),
        blocks: int = 1,
        num_labels: int = 0,
        output: str = "softmax",
        ordinal: bool = False,
        dropout: float = 0.0,
        augmented: bool = False,
    ):
        super().__init__()
        if output not in OUTPUTS:
            raise ValueError(f"unknown output {output!r}: choose from {', '.join(OUTPUTS)}")
        if len(channels) != 3 or any(c < 8 or c % 8 for c in channels):
            given = ", ".join(map(str, channels))
            raise ValueError(f"channels must be three multiples of 8, got {given}")
        if not 1 <= blocks <= 16:
            raise ValueError(f"blocks must be in 1..16, got {blocks}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
        num_states = num_states or num_levels
        self.config = {"name": "unet", "num_levels": num_levels, "num_states": num_states}
        self.config |= {"channels": list(channels), "blocks": blocks, "num_labels": num_labels}
        self.config |= {"output": output, "ordinal": ordinal, "dropout": dropout}
        self.config |= {"augmented": augmented}
        self.num_labels, self.output, self.ordinal = num_labels, output, ordinal
        self.num_levels, self.num_states, self.time_dim = num_levels, num_states, channels[0]
        high, middle, low = channels
        emb_dim = 4 * high
        layers = nn.Linear(high, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim), nn.SiLU()
        self.embed_t = nn.Sequential(*layers)
        if num_labels:
            self.embed_y = nn.Embedding(num_labels + 1, emb_dim)  # the last row is "no label"
        if augmented:
            self.embed_maps = nn.Linear(6, emb_dim, bias=False)
            nn.init.zeros_(self.embed_maps.weight)
        self.fold = nn.Conv2d(4 * num_states, high, 3, padding=1)
        if ordinal:
            self.fold_level = nn.Conv2d(4, high, 3, padding=1)
        self.down1 = Stage(high, blocks, emb_dim, dropout, attention=False)
        self.shrink1 = nn.Conv2d(high, middle, 2, stride=2)
        self.down2 = Stage(middle, blocks, emb_dim, dropout, attention=True)
        self.shrink2 = nn.Conv2d(middle, low, 2, stride=2)
        self.bottom = Stage(low, 2 * blocks, emb_dim, dropout, attention=True)
        self.grow2 = nn.ConvTranspose2d(low, middle, 2, stride=2)
        self.up2 = Stage(middle, blocks, emb_dim, dropout, attention=True)
        self.grow1 = nn.ConvTranspose2d(middle, high, 2, stride=2)
        self.up1 = Stage(high, blocks, emb_dim, dropout, attention=False)
        out = num_levels if output == "softmax" else 2
        layers = nn.GroupNorm(8, high), nn.SiLU(), nn.Conv2d(high, 4 * out, 3, padding=1)
        self.unfold = nn.Sequential(*layers)
        self.own_state = nn.Linear(emb_dim, out * num_states)
        # Start from uniform probabilities, or a wide logistic around the noisy level
        for layer in (self.unfold[-1], self.own_state):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def hidden_matrices(self) -> list[nn.Parameter]:
        """The weights between embeddings and output, which Muon orthogonalizes."""
        edges = (
            "embed_t.",
            "embed_y.",
            "embed_maps.",
            "fold.",
            "fold_level.",
            "unfold.",
            "own_state.",
        )
        named = self.named_parameters()
        return [p for name, p in named if p.ndim > 1 and not name.startswith(edges)]

    def forward(self, x_t: Tensor, t: Tensor, y=None, maps: Tensor | None = None) -> Tensor:
        if x_t.ndim != 4 or x_t.shape[1] != 1 or x_t.shape[2] % 8 or x_t.shape[3] % 8:
            rule = "images must be [B, 1, H, W] with H and W multiples of 8"
            raise ValueError(f"{rule}, got {list(x_t.shape)}")
        emb = self.embed_t(time_features(t, self.time_dim).to(self.fold.weight))
        if self.num_labels:
            y = torch.full_like(t, -1, dtype=torch.long) if y is None else y.long()
            emb = emb + self.embed_y(torch.where(y < 0, self.num_labels, y))
        elif y is not None:
            raise ValueError("this network was built without labels")
        if maps is not None:
            emb = emb + self.embed_maps(maps)
        x = one_hot(x_t, self.num_states).to(emb)  # [B, S, H, W]
        h = self.fold(F.pixel_unshuffle(x, 2))
        if self.ordinal:
            levels = as_numbers(x_t, self.num_levels).to(emb)
            h = h + self.fold_level(F.pixel_unshuffle(levels, 2))
        h1 = self.down1(h, emb)  # [B, high, H/2, W/2]
        h2 = self.down2(self.shrink1(h1), emb)  # [B, middle, H/4, W/4]
        h = self.bottom(self.shrink2(h2), emb)  # [B, low, H/8, W/8]
        h = self.up2(self.grow2(h) + h2, emb)
        h = self.up1(self.grow1(h) + h1, emb)
        if self.output == "softmax":
            return self.head(h, emb, x)
        # Half precision is too coarse for 256 levels.
        with torch.autocast(h.device.type, enabled=False):
            shift, log_scale = self.head(h.float(), emb.float(), x.float()).chunk(2, dim=1)
        return logistic_logits(as_numbers(x_t, self.num_levels) + shift, log_scale, self.num_levels)

    def head(self, h: Tensor, emb: Tensor, x: Tensor) -> Tensor:
        """h [B, high, H/2, W/2], plus the table by t and noisy state, -> [B, K or 2, H, W]."""
        h = F.pixel_shuffle(self.unfold(h), 2)
        table = self.own_state(emb).view(len(h), -1, self.num_states)
        return h + torch.einsum("bks,bshw->bkhw", table, x)


NETWORKS = {"unet": UNet}


def build_network(config: dict) -> nn.Module:
    """The network that `network.config` describes. Raises ValueError for an unknown name."""
    arguments = dict(config)
    name = arguments.pop("name", None)
    if name not in NETWORKS:
        raise ValueError(f"unknown network {name!r}: choose from {', '.join(NETWORKS)}")
    # Channels last makes convolutions on the CPU 5 to 10 % faster.
    return NETWORKS[name](**arguments).to(memory_format=torch.channels_last)


class Autocast(nn.Module):
    """Run a network under bfloat16 autocast and return float32 logits."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x_t: Tensor, *args, **told) -> Tensor:
        device = x_t.device.type
        # Fused attention on CPUs is several times slower for images as small as these.
        attention = sdpa_kernel(SDPBackend.MATH) if device == "cpu" else nullcontext()
        with torch.autocast(device, torch.bfloat16), attention:
            return self.network(x_t, *args, **told).float()


def accelerated(network: nn.Module, amp: bool, compiled: bool) -> nn.Module:
    """The same network and weights, under bfloat16 autocast if `amp`, and compiled if asked.

    Warns if an x86 CPU has no bfloat16 instructions.
    """
    on_cpu = next(network.parameters()).device.type == "cpu"
    if amp and on_cpu:
        level = torch.backends.cpu.get_cpu_capability()  # "DEFAULT" on ARM
        has_it = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)  # not in torch 2.4
        if level == "AVX2" or (level == "AVX512" and not has_it()):
            warnings.warn("this CPU only emulates bfloat16: --amp makes it slower", stacklevel=2)
    network = Autocast(network) if amp else network
    # On CPUs the compiler's own random numbers make dropout slow.
    options = {"fallback_random": True} if on_cpu else None
    return torch.compile(network, options=options) if compiled else network
