"""The logistic output, against a direct evaluation in float64, and where float32 ends."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from checkpoint import read_checkpoint
from diffusion import DiscreteDiffusion
from model import FLOOR, UNet, build_network, logistic_logits
from pictures import GROUND, image_grid


def direct(mean, scale, K):
    """The probabilities of K bins in plain floats: differences of the distribution function, from the side where they
    don't cancel; normalised; with the uniform share."""

    def sigmoid(z):
        return 1 / (1 + math.exp(-z)) if z > 0 else math.exp(z) / (1 + math.exp(z))

    masses = []
    for k in range(K):
        low, high = ((-1 + (2 * k + side) / (K - 1) - mean) / scale for side in (-1, 1))
        masses.append(sigmoid(high) - sigmoid(low) if low < 0 else sigmoid(-low) - sigmoid(-high))
    masses = [mass / sum(masses) + FLOOR / K for mass in masses]
    return torch.tensor(masses, dtype=torch.float64) / sum(masses)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("K", [2, 8, 256])
def test_against_direct_evaluation(K, dtype):
    for mean in (-1.0, -0.9999, -0.3, 0.0, 0.5 / K, 0.77, 1.0):
        for log_scale in (-4.0, -1.0, 0.0, 3.0, 6.0):
            pars = [torch.full((1, 1, 1, 1), value, dtype=dtype) for value in (mean, log_scale)]
            log_p = logistic_logits(*pars, K).log_softmax(1).flatten().double()
            # the mean as that dtype has it: with narrow scales its last digit matters
            wanted = direct(pars[0].item(), math.exp(pars[1].item() - 2), K).log()
            torch.testing.assert_close(
                log_p, wanted, rtol=0, atol=1e-9 if dtype is torch.float64 else 1e-3
            )


@pytest.mark.parametrize("K", [2, 256])
def test_extremes_are_finite(K):
    """Logits and gradients, and no level is impossible: with bound and loss in float32, none is infinite."""
    mean = (
        torch.tensor([-1e9, -1.0, -1 / 3, 0.0, 1.0, 1e9])
        .view(-1, 1, 1, 1)
        .repeat(8, 1, 1, 1)
        .requires_grad_()
    )
    log_scale = torch.tensor([-1e30, -1e3, -30.0, -8.0, 0.0, 8.0, 100.0, 1e30]).repeat_interleave(6)
    log_scale = log_scale.view(-1, 1, 1, 1).requires_grad_()
    logits = logistic_logits(mean, log_scale, K)
    assert logits.isfinite().all()
    assert (logits.softmax(1) > 0.9 * FLOOR / K).all()
    for k in (0, K // 2, K - 1):
        for gradient in torch.autograd.grad(
            logits.log_softmax(1)[:, k].sum(), (mean, log_scale), retain_graph=True
        ):
            assert gradient.isfinite().all()


def test_narrow_and_wrong_costs_much_but_not_everything():
    """A certain network that is wrong: the terms of the bound are finite in float32, for masks and narrow kernels."""

    class Certain(torch.nn.Module):
        def forward(self, x_t, t):
            far = torch.where(x_t > 128, -1.0, 1.0)
            return logistic_logits(far, torch.full_like(far, -20.0), 256)

    torch.manual_seed(0)
    x_0 = torch.randint(0, 256, (4, 1, 8, 8))
    for transition in ("uniform", "absorbing", "gaussian"):
        d = DiscreteDiffusion(
            Certain(), 256, 20, transition, loss_type="hybrid", image_shape=(1, 8, 8)
        )
        for t in (1, 2, 10, 20):
            assert d.loss(x_0, torch.full((4,), t)).isfinite()


def test_the_mean_is_a_correction_to_the_noisy_level():
    """At the start, when the network says nothing: around the level; around the middle for the mask."""
    net = UNet(256, 257, channels=(8, 8, 8), output="logistic")
    x_t = torch.arange(257).repeat(2)[: 8 * 64].view(8, 1, 8, 8)
    level = torch.where(x_t < 256, x_t / 127.5 - 1, 0.0)
    wanted = logistic_logits(level, torch.zeros_like(level), 256)
    torch.testing.assert_close(net(x_t, torch.ones(8)), wanted, rtol=0, atol=1e-5)
    as_bytes = (x_t % 256).byte()
    torch.testing.assert_close(
        net(as_bytes, torch.ones(8)), net(as_bytes.long(), torch.ones(8)), rtol=0, atol=0
    )
    with (
        torch.no_grad()
    ):  # the first 4 of 8 channels of the last layer shift the mean, the others are log-scales
        net.unfold[-1].bias[:4], net.unfold[-1].bias[4:] = 0.25, -1.5
    wanted = logistic_logits(level + 0.25, torch.full_like(level, -1.5), 256)
    torch.testing.assert_close(net(x_t, torch.ones(8)), wanted, rtol=0, atol=1e-4)
    shift, log_scale = torch.rand(
        2, 257, generator=torch.Generator().manual_seed(0)
    )  # by the noisy level
    with torch.no_grad():
        net.own_state.bias.copy_(torch.cat([shift, log_scale]))
    wanted = logistic_logits(level + 0.25 + shift[x_t], log_scale[x_t] - 1.5, 256)
    torch.testing.assert_close(net(x_t, torch.ones(8)), wanted, rtol=0, atol=1e-4)


def test_half_precision_ends_before_the_head():
    """Under autocast the last layers and all that follows compute in float32."""
    torch.manual_seed(0)
    net = UNet(256, channels=(8, 8, 8), output="logistic")
    torch.nn.init.normal_(net.unfold[-1].weight)
    seen = []
    net.unfold.register_forward_hook(
        lambda module, inputs, output: seen.append((inputs[0], output))
    )
    x_t = torch.randint(0, 256, (2, 1, 16, 16))
    with torch.autocast("cpu", torch.bfloat16):
        logits = net(x_t, torch.ones(2))
    (inputs, output) = seen.pop()
    assert logits.dtype == output.dtype == torch.float32
    torch.testing.assert_close(net.unfold(inputs.float()), output, rtol=0, atol=1e-6)


def test_choice_of_output():
    with pytest.raises(ValueError, match="unknown output 'gauss': choose from softmax, logistic"):
        UNet(output="gauss")
    net = UNet(8, channels=(8, 8, 8), output="logistic")
    again = build_network(net.config)
    assert again.config == net.config and net.config["output"] == "logistic"
    assert net.own_state.out_features == 2 * 8  # shift and log-scale by t and noisy level
    assert again.load_state_dict(net.state_dict())
    old = {key: value for key, value in UNet(channels=(8, 8, 8)).config.items() if key != "output"}
    assert build_network(old).config["output"] == "softmax"


def test_train_with_it(tmp_path):
    """train.py keeps output and reverse step in its checkpoints, and does not go on with others."""

    def train(*arguments):
        command = [
            sys.executable,
            Path(__file__).parents[1] / "train.py",
            "--out-dir",
            tmp_path / "run",
            *arguments,
        ]
        return subprocess.run([*map(str, command)], capture_output=True, text=True)

    flags = "--data offline --limit 16 --batch-size 8 --channels 8 8 8 --timesteps 20 --device cpu --levels 5 "
    flags += "--transition gaussian --output logistic --reverse joint --loss variational --steps 2"
    assert train(*flags.split()).returncode == 0
    checkpoint = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.pth")
    assert (checkpoint["network"]["output"], checkpoint["diffusion"]["reverse"]) == (
        "logistic",
        "joint",
    )
    assert (checkpoint["settings"]["output"], checkpoint["settings"]["reverse"]) == (
        "logistic",
        "joint",
    )
    refused = train("--resume", "--steps", "4", "--reverse", "mixture")
    assert (
        refused.returncode == 1
        and refused.stderr.count("\n") == 1
        and "disagrees" in refused.stderr
    )


def test_pictures_of_256_levels():
    """Bytes can't hold the level after the last, which is the ground's: all 256 greys are there all the same."""
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    colours = np.asarray(image_grid(x, 256)).ravel().tolist()
    assert set(colours) == set(range(256))
    assert (np.asarray(image_grid(torch.full_like(x.int(), 256), 256)) == GROUND).all()
