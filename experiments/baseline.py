"""What this repository is compared with: the network, the data path and the training of most small implementations."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from dataset import Digits
from diffusion import DiscreteDiffusion
from model import time_features
from trainer import Trainer


class PlainUNet(nn.Module):
    """Three levels of plain convolutions with batch norm, 64-128-256 channels at full, 1/2 and 1/4 resolution."""

    def __init__(self, num_levels: int = 2, num_states: int | None = None):
        super().__init__()
        self.num_states = num_states or num_levels
        self.config = {"name": "plain", "num_levels": num_levels, "num_states": self.num_states}

        def double_conv(i, o):
            layers = []
            for c in (i, o):
                layers += [nn.Conv2d(c, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU()]
            return nn.Sequential(*layers)

        self.embed_t = nn.Sequential(nn.Linear(32, 64), nn.SiLU(), nn.Linear(64, 256))
        self.enc1, self.enc2, self.mid = (
            double_conv(1, 64),
            double_conv(64, 128),
            double_conv(128, 256),
        )
        self.up2, self.dec2 = nn.ConvTranspose2d(256, 128, 2, stride=2), double_conv(256, 128)
        self.up1, self.dec1 = nn.ConvTranspose2d(128, 64, 2, stride=2), double_conv(128, 64)
        self.out = nn.Conv2d(64, num_levels, 1)

    def hidden_matrices(self) -> list[nn.Parameter]:
        """The weights between input, embedding and output: what Muon orthogonalises."""
        edges = ("enc1.0.", "embed_t.", "out.")
        return [
            p for name, p in self.named_parameters() if p.ndim > 1 and not name.startswith(edges)
        ]

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        h1 = self.enc1(x_t.float() / (self.num_states - 1))  # [B, 64, H, W]
        h2 = self.enc2(F.max_pool2d(h1, 2))
        h = self.mid(F.max_pool2d(h2, 2)) + self.embed_t(time_features(t, 32))[:, :, None, None]
        h = self.dec2(torch.cat([self.up2(h), h2], dim=1))
        h = self.dec1(torch.cat([self.up1(h), h1], dim=1))
        return self.out(h)


class PerSample(Dataset):
    """The usual data path: each image alone through torchvision's transforms, every epoch anew; x_0 as int64, label."""

    def __init__(self, digits: Digits):
        from torchvision import transforms

        self.grey = digits.images[
            :, 0, 2:-2, 2:-2
        ].contiguous()  # back to 28x28: padding is part of the path
        self.labels = digits.labels
        self.transform = transforms.Compose(
            [transforms.ToPILImage(), transforms.Pad(2), transforms.ToTensor()]
        )

    def __len__(self) -> int:
        return len(self.grey)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return (self.transform(self.grey[i]) > 0.5).long(), self.labels[i]


class ConstantAdam(torch.optim.Adam):
    """Adam at 1e-4 from the first step to the last, whatever rate the trainer plans."""

    @torch.no_grad()
    def step(self):
        self.param_groups[0]["lr"] = 1e-4
        super().step()


def usual_trainer(batch_size: int, device: torch.device | str = "cpu") -> Trainer:
    """PlainUNet as it is usually trained: linear schedule, cross-entropy, Adam at 1e-4, gradients as they come.

    What it learns is in `trainer.network`: the average, which the trainer keeps all the same, is not of this recipe.
    """
    network = PlainUNet().to(device, memory_format=torch.channels_last)
    trainer = Trainer(
        DiscreteDiffusion(network, schedule="linear"), 1, batch_size, max_grad_norm=math.inf
    )
    trainer.optimizer = ConstantAdam(network.parameters(), capturable=trainer.records)
    return trainer
