"""The baseline: network and training recipe of many small implementations."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion import DiscreteDiffusion
from model import time_features
from trainer import Trainer


class PlainUNet(nn.Module):
    """Plain convolutions with batch norm: 64, 128 and 256 channels at full, 1/2, 1/4 resolution."""

    def __init__(self):
        super().__init__()
        self.embed_t = nn.Sequential(nn.Linear(32, 64), nn.SiLU(), nn.Linear(64, 256))
        self.enc1, self.enc2 = double_conv(1, 64), double_conv(64, 128)
        self.mid = double_conv(128, 256)
        self.up2, self.dec2 = nn.ConvTranspose2d(256, 128, 2, stride=2), double_conv(256, 128)
        self.up1, self.dec1 = nn.ConvTranspose2d(128, 64, 2, stride=2), double_conv(128, 64)
        self.out = nn.Conv2d(64, 2, 1)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        h1 = self.enc1(x_t.float())  # [B, 64, H, W]
        h2 = self.enc2(F.max_pool2d(h1, 2))
        h = self.mid(F.max_pool2d(h2, 2)) + self.embed_t(time_features(t, 32))[:, :, None, None]
        h = self.dec2(torch.cat([self.up2(h), h2], dim=1))
        h = self.dec1(torch.cat([self.up1(h), h1], dim=1))
        return self.out(h)


def double_conv(i: int, o: int) -> nn.Sequential:
    layers = [[nn.Conv2d(c, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU()] for c in (i, o)]
    return nn.Sequential(*layers[0], *layers[1])


def most_probable(network: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """The network with probability 1 for its most probable x_0.

    The mixture of posteriors then becomes the posterior of this x_0, the reverse step of many small
    implementations. Its bound is infinite.
    """

    def certain(x_t: Tensor, t: Tensor) -> Tensor:
        logits = network(x_t, t)
        return torch.full_like(logits, -1e4).scatter_(1, logits.argmax(1, keepdim=True), 0.0)

    return certain


def usual_trainer(batch_size: int, device: torch.device | str = "cpu") -> Trainer:
    """PlainUNet with the usual recipe: linear schedule, cross-entropy, Adam at 1e-4.

    Use `trainer.network`: this recipe has no averaged weights.
    """
    network = PlainUNet().to(device, memory_format=torch.channels_last)
    diffusion = DiscreteDiffusion(network, schedule="linear")
    # A schedule of one step has no warm-up.
    return Trainer(diffusion, 1, batch_size, 1e-4, "adam", "constant")
