"""The logistic output, against direct evaluation in float64 and at the limits of float32."""

import math

import numpy as np
import pytest
import torch
from scripts import TRAIN, fail, succeed

from checkpoint import read_checkpoint
from diffusion import DiscreteDiffusion
from model import FLOOR, UNet, build_network, logistic_logits
from pictures import BACKGROUND, image_grid


def direct(mean, scale, K):
    """The probabilities of K bins in plain floats, normalized, with the uniform share.

    Differences of the CDF are taken from the side where they do not cancel.
    """

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
    """Logits and gradients are finite, and in float32 no level is impossible."""
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
    """A certain but wrong network has a finite loss in float32, for every transition."""

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
    """Initially the mean is the noisy level, or the middle for a mask."""
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
    """Under autocast the head computes in float32."""
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


def test_train_with_it(fresh_directory):
    """Checkpoints keep output and reverse step; a run is not resumed with others."""
    choices = {"output": "logistic", "reverse": "joint"}
    flags = [f"--{name}={value}" for name, value in choices.items()]
    flags += ["--levels", 3, "--transition", "gaussian", "--timesteps", 20, "--steps", 2]
    succeed("train.py", *TRAIN, *flags, "--loss", "variational", "--out-dir", "run")
    checkpoint = read_checkpoint("run/checkpoints/last.pth")
    assert checkpoint["network"]["output"] == "logistic" and checkpoint["network"]["ordinal"]
    assert checkpoint["diffusion"]["reverse"] == "joint"
    assert choices.items() <= checkpoint["settings"].items()
    refused = fail("train.py", "--resume", "--out-dir", "run", "--steps", 4, "--reverse", "mixture")
    assert "disagrees" in refused


def test_pictures_of_256_levels():
    """A byte cannot hold 256, the background; all 256 greys are drawn anyway."""
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    colours = np.asarray(image_grid(x, 256)).ravel().tolist()
    assert set(colours) == set(range(256))
    assert (np.asarray(image_grid(torch.full_like(x.int(), 256), 256)) == BACKGROUND).all()
