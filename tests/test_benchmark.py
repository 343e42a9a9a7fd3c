"""The clocked training step of benchmark.py is the training step, and its operations are counted right."""

from itertools import repeat

import pytest
import torch

from benchmark import PARTS, PerSample, Trainer, mflop
from dataset import to_levels
from diffusion import DiscreteDiffusion
from model import Attention, PlainUNet, UNet


@pytest.mark.parametrize("loss_type", ["cross_entropy", "variational"])
def test_step_in_parts_has_the_gradient_of_the_loss(loss_type, monkeypatch):
    torch.manual_seed(0)
    diffusion = DiscreteDiffusion(UNet(channels=(8, 8, 8)), loss_type=loss_type)
    x_0 = torch.randint(0, 2, (4, 1, 32, 32))
    with torch.no_grad():
        for p in diffusion.parameters():  # away from the initial zeros, whose gradients say little
            p.add_(0.05 * torch.randn_like(p))
    state = torch.random.get_rng_state()
    diffusion.loss(x_0).backward()
    expected = [p.grad.clone() for p in diffusion.parameters()]
    trainer = Trainer(diffusion, repeat(x_0))
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: None)
    torch.random.set_rng_state(state)
    seconds = trainer.step()
    for p, grad in zip(diffusion.parameters(), expected, strict=True):
        assert torch.allclose(p.grad, grad, rtol=1e-4, atol=1e-7)
    assert seconds == pytest.approx(sum(trainer.seconds[part][0] for part in PARTS))


def test_usual_data_path_gives_the_same_images():
    grey = torch.randint(0, 256, (5, 28, 28), dtype=torch.uint8)
    ours = to_levels(torch.nn.functional.pad(grey[:, None], (2, 2, 2, 2)))
    usual = PerSample(grey)
    assert all(torch.equal(usual[i], ours[i]) for i in range(len(usual)))


def test_mflop_of_a_network_that_can_be_counted_by_hand():
    """PlainUNet: 2 x 9 x in x out x pixels for each 3x3 convolution, and so on."""
    double = lambda i, o, side: 2 * 9 * (i * o + o * o) * side**2  # noqa: E731
    by_hand = double(1, 64, 32) + double(64, 128, 16) + double(128, 256, 8) + double(256, 128, 16) + double(128, 64, 32)
    by_hand += 2 * 4 * (256 * 128 * 8**2 + 128 * 64 * 16**2)  # the transposed convolutions
    by_hand += 2 * 64 * 2 * 32**2 + 2 * (32 * 64 + 64 * 256)  # the last layer, the embedding of t
    assert mflop(PlainUNet()) == pytest.approx(by_hand / 1e6)


def test_mflop_of_the_unet():
    """Every convolution and linear layer by its weights and positions, attention as two products of N x N x C."""
    network, flops = UNet(), []

    def count(layer, inputs, output):
        positions = (inputs[0] if isinstance(layer, torch.nn.ConvTranspose2d) else output).shape[2:].numel()
        flops.append(2 * layer.weight.numel() * (1 if isinstance(layer, torch.nn.Linear) else positions))

    def count_attention(layer, inputs, output):
        _, C, H, W = output.shape
        flops.append(2 * 2 * (H * W) ** 2 * C)

    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.ConvTranspose2d | torch.nn.Linear):
            layer.register_forward_hook(count)
        elif isinstance(layer, Attention):
            layer.register_forward_hook(count_attention)
    network(torch.zeros(1, 1, 32, 32, dtype=torch.long), torch.ones(1).long())
    by_hand = sum(flops) + 2 * 2 * 2 * 32**2  # and the table of the own state
    assert mflop(network) == pytest.approx(by_hand / 1e6)
