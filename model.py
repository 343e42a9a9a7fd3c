"""The networks: they read (x_t, t) and predict logits of x_0. Nothing here knows about diffusion.

    x_t      integers [B, 1, H, W] in 0..num_states-1
    t        integers [B]
    y        optional labels, int64 [B] in 0..num_labels-1, -1 for none; only for networks with num_labels > 0
    output   float [B, num_levels, H, W]

`UNet` is the default; `PlainUNet` is the plain-convolution baseline that most small implementations use.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def pick_device(name: str = "auto") -> torch.device:
    """The device called `name`; "auto" takes CUDA, then MPS, then the CPU. Raises ValueError if it can't be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).cpu()  # fails here rather than in the middle of the work
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} can't be used here: {str(error).split('. ')[0][:200]}") from None


def time_features(t: Tensor, dim: int) -> Tensor:
    """Sines and cosines of t at geometrically spaced frequencies: [B] -> float [B, dim]."""
    frequencies = torch.exp(-math.log(10_000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def one_hot(x: Tensor, num_states: int) -> Tensor:
    """Integers [B, 1, H, W] -> float [B, num_states, H, W]."""
    return (x == torch.arange(num_states, device=x.device).view(1, -1, 1, 1)).float()


class ResBlock(nn.Module):
    """Pre-activation residual block; the time embedding scales and shifts between its two convolutions."""

    def __init__(self, channels: int, emb_dim: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(8, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.scale_shift = nn.Linear(emb_dim, 2 * channels)
        self.norm2 = nn.GroupNorm(8, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)  # every block starts as the identity
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.scale_shift(emb)[:, :, None, None].chunk(2, dim=1)
        h = self.norm2(h) * (1 + scale) + shift
        return x + self.conv2(F.silu(h))


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
        qkv = self.qkv(self.norm(x)).view(B, 3, self.heads, C // self.heads, H * W)
        q, k, v = qkv.transpose(-1, -2).unbind(1)  # each [B, heads, H*W, C/heads]
        h = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(B, C, H, W)
        return x + self.out(h)


class Stage(nn.Module):
    """The blocks of one resolution: residual blocks, each followed by attention where that is affordable."""

    def __init__(self, channels: int, blocks: int, emb_dim: int, attention: bool):
        super().__init__()
        self.blocks = nn.ModuleList(ResBlock(channels, emb_dim) for _ in range(blocks))
        self.attention = nn.ModuleList(Attention(channels) if attention else nn.Identity() for _ in range(blocks))

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        for block, attention in zip(self.blocks, self.attention, strict=True):
            h = attention(block(h, emb))
        return h


class UNet(nn.Module):
    """The default network, made for CPUs: `UNet()` is for two grey levels.

    2x2 pixels are folded into channels at the input and unfolded at the output, so that all work happens at 1/2, 1/4
    and 1/8 of the resolution, with attention at the two lower ones. The way up adds what the way down saw. The logits
    also get a learned table that depends on t and on the pixel's own noisy state: how far to trust what is seen at t
    is the first thing to know about x_0.

    Args:
        num_levels: K, how many values x_0 takes.
        num_states: S, how many values x_t takes; K if not given.
        channels: width at 1/2, 1/4 and 1/8 of the resolution, multiples of 8.
        blocks: residual blocks at each resolution, on the way down and again on the way up.
        num_labels: how many classes may be given as y; 0 for a network without labels.

    Raises:
        ValueError: for other widths. Images must have sides divisible by 8.
    """

    def __init__(
        self,
        num_levels: int = 2,
        num_states: int | None = None,
        channels=(24, 64, 96),
        blocks: int = 1,
        num_labels: int = 0,
    ):
        super().__init__()
        if len(channels) != 3 or any(c < 8 or c % 8 for c in channels):
            raise ValueError(f"channels must be three multiples of 8, got {', '.join(map(str, channels))}")
        num_states = num_states or num_levels
        self.config = {
            "name": "unet",
            "num_levels": num_levels,
            "num_states": num_states,
            "channels": list(channels),
            "blocks": blocks,
            "num_labels": num_labels,
        }
        self.num_labels = num_labels
        self.num_levels, self.num_states, self.time_dim = num_levels, num_states, channels[0]
        high, middle, low = channels
        emb_dim = 4 * high
        self.embed_t = nn.Sequential(nn.Linear(high, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim), nn.SiLU())
        if num_labels:
            self.embed_y = nn.Embedding(num_labels + 1, emb_dim)  # the last row stands for "no label"
        self.fold = nn.Conv2d(4 * num_states, high, 3, padding=1)
        self.down1 = Stage(high, blocks, emb_dim, attention=False)
        self.shrink1 = nn.Conv2d(high, middle, 2, stride=2)
        self.down2 = Stage(middle, blocks, emb_dim, attention=True)
        self.shrink2 = nn.Conv2d(middle, low, 2, stride=2)
        self.bottom = Stage(low, 2 * blocks, emb_dim, attention=True)
        self.grow2 = nn.ConvTranspose2d(low, middle, 2, stride=2)
        self.up2 = Stage(middle, blocks, emb_dim, attention=True)
        self.grow1 = nn.ConvTranspose2d(middle, high, 2, stride=2)
        self.up1 = Stage(high, blocks, emb_dim, attention=False)
        self.unfold = nn.Sequential(nn.GroupNorm(8, high), nn.SiLU(), nn.Conv2d(high, 4 * num_levels, 3, padding=1))
        self.own_state = nn.Linear(emb_dim, num_levels * num_states)
        for layer in (self.unfold[-1], self.own_state):  # start from uniform probabilities
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        emb = self.embed_t(time_features(t, self.time_dim))
        if self.num_labels:
            y = torch.full_like(t, -1, dtype=torch.long) if y is None else y.long()
            emb = emb + self.embed_y(torch.where(y < 0, self.num_labels, y))
        elif y is not None:
            raise ValueError("this network was built without labels")
        x = one_hot(x_t, self.num_states)  # [B, S, H, W]
        h1 = self.down1(self.fold(F.pixel_unshuffle(x, 2)), emb)  # [B, high, H/2, W/2]
        h2 = self.down2(self.shrink1(h1), emb)  # [B, middle, H/4, W/4]
        h = self.bottom(self.shrink2(h2), emb)  # [B, low, H/8, W/8]
        h = self.up2(self.grow2(h) + h2, emb)
        h = self.up1(self.grow1(h) + h1, emb)
        table = self.own_state(emb).view(-1, self.num_levels, self.num_states)
        return F.pixel_shuffle(self.unfold(h), 2) + torch.einsum("bks,bshw->bkhw", table, x)


class PlainUNet(nn.Module):
    """The common baseline: three levels of plain convolutions, 64-128-256 channels at full, 1/2 and 1/4 resolution."""

    def __init__(self, num_levels: int = 2, num_states: int | None = None):
        super().__init__()
        num_states = num_states or num_levels
        self.config = {"name": "plain", "num_levels": num_levels, "num_states": num_states}
        self.num_states = num_states

        def double_conv(i, o):
            layers = []
            for c in (i, o):
                layers += [nn.Conv2d(c, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU()]
            return nn.Sequential(*layers)

        self.embed_t = nn.Sequential(nn.Linear(32, 64), nn.SiLU(), nn.Linear(64, 256))
        self.enc1, self.enc2, self.mid = double_conv(1, 64), double_conv(64, 128), double_conv(128, 256)
        self.up2, self.dec2 = nn.ConvTranspose2d(256, 128, 2, stride=2), double_conv(256, 128)
        self.up1, self.dec1 = nn.ConvTranspose2d(128, 64, 2, stride=2), double_conv(128, 64)
        self.out = nn.Conv2d(64, num_levels, 1)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        h1 = self.enc1(x_t.float() / (self.num_states - 1))  # [B, 64, H, W]
        h2 = self.enc2(F.max_pool2d(h1, 2))
        h = self.mid(F.max_pool2d(h2, 2)) + self.embed_t(time_features(t, 32))[:, :, None, None]
        h = self.dec2(torch.cat([self.up2(h), h2], dim=1))
        h = self.dec1(torch.cat([self.up1(h), h1], dim=1))
        return self.out(h)


def build_network(config: dict) -> nn.Module:
    """The network that `network.config` describes. Raises ValueError for an unknown name."""
    networks = {"unet": UNet, "plain": PlainUNet}
    arguments = dict(config)
    name = arguments.pop("name", None)
    if name not in networks:
        raise ValueError(f"unknown network {name!r}: choose from {', '.join(networks)}")
    # Channels last: convolutions on the CPU are 5 to 10 % faster for it.
    return networks[name](**arguments).to(memory_format=torch.channels_last)
