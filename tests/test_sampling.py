"""Labels, guidance and the sampler."""

from functools import partial

import numpy as np
import pytest
import torch
from chains import (
    ExactChain,
    Labelled,
    make,
)

from diffusion import DiscreteDiffusion
from trajectories import fill_in, filling_process
from transitions import draw

pytestmark = pytest.mark.filterwarnings("ignore:bar_Q")


# -- labels and guidance ---------------------------------------------------------------------------


def test_labels():
    """All labels of the network in turn, by the index of the image."""
    d = make(2, model=Labelled())
    assert d.labels(7).tolist() == [0, 1, 2, 3, 4, 0, 1] and d.labels(3, first=8).tolist() == [
        3,
        4,
        0,
    ]
    assert make(2).labels(7) is None


def test_guidance():
    """(1 + W) times the conditional logits minus W times the unconditional ones."""
    d = make(2, model=Labelled(), image_shape=(1, 4, 4))
    x_t, t, y = (
        torch.zeros(2, 1, 1, 1, dtype=torch.long),
        torch.tensor([3, 4]),
        torch.tensor([0, 4]),
    )
    assert d.x_0_logits(x_t, t)[:, 0].flatten().tolist() == [0, 0]
    assert d.x_0_logits(x_t, t, y)[:, 0].flatten().tolist() == [1, 5]
    assert d.x_0_logits(x_t, t, y, guidance=2.0)[:, 0].flatten().tolist() == [3, 15]
    assert d.x_0_logits(x_t, t, torch.tensor([-1, 4]), guidance=2.0)[:, 0].flatten().tolist() == [
        0,
        15,
    ]
    p = d.p_theta(x_t, t, d.x_0_logits(x_t, t, y, 2.0))
    w = torch.tensor([[3.0, -6], [15, -30]], dtype=torch.float64).softmax(1)[:, :, None, None]
    assert torch.equal(p, d.q_posterior(x_t, w, t))
    u = torch.full((2, 1, 1, 1), 0.9999)
    assert torch.equal(d.p_sample(x_t + 1, t, u, y, 2.0), draw(d.q_posterior(x_t + 1, w, t), u))
    labels = torch.tensor([0, 4, 2, 1, 0])
    images = d.sample(5, y=labels, guidance=1.0)
    assert torch.equal(images, d.sample(5, y=labels, guidance=1.0, batch_size=2))
    *_, x_0 = d.reverse_process(5, y=labels, guidance=1.0)
    assert torch.equal(x_0.byte(), images)


def test_the_mode_of_the_last_step():
    """The same walk up to x_1; known pixels stay, the others take their most probable level."""
    d = make(2, 6, model=Labelled(), image_shape=(1, 2, 4))
    y = torch.arange(200) % 5
    known = torch.tensor([[[[1, 0, -1, -1], [-1, -1, -1, 1]]]])
    how, few = {"y": y, "guidance": 0.5}, {"particles": 2}
    for given, process, draws in [
        (torch.zeros_like(known) - 1, d.reverse_process, d.sample),
        (known, partial(filling_process, d, known, **few), partial(fill_in, d, known, **few)),
    ]:
        *walk, drawn = process(200, **how)
        *same, x_0 = process(200, **how, last_step="mode")
        assert all(map(torch.equal, walk, same)) and not torch.equal(drawn, x_0)
        t, x_1 = torch.ones(200, dtype=torch.long), walk[-1].long()
        best = d.p_theta(x_1, t, d.x_0_logits(x_1, t, y, 0.5)).argmax(1, keepdim=True)
        assert torch.equal(x_0.long(), torch.where(given >= 0, given, best))
        assert torch.equal(draws(200, **how, last_step="mode", batch_size=7), x_0.byte())


# -- sampling --------------------------------------------------------------------------------------


def test_reverse_process_yields_every_step():
    d = make(2, 7, image_shape=(1, 4, 6))
    chain = list(d.reverse_process(3))
    assert len(chain) == 8
    assert all(x.shape == (3, 1, 4, 6) and x.dtype == torch.int64 and x.max() <= 1 for x in chain)


def test_images_have_random_streams_of_their_own():
    """Image i depends only on (seed, i), not on n, batch size or first. Seeds share no image."""
    d = make(2, 5, image_shape=(1, 8, 8))
    sheet = d.sample(7, seed=0)
    assert sheet.shape == (7, 1, 8, 8) and sheet.dtype == torch.uint8
    assert torch.equal(d.sample(7, seed=0, batch_size=3), sheet)
    assert torch.equal(d.sample(2, seed=0, first=4), sheet[4:6])
    torch.manual_seed(5)  # the global generator is not used
    assert torch.equal(d.sample(3, seed=0), sheet[:3])
    everything = torch.cat([d.sample(40, seed=s) for s in range(3)]).flatten(1)
    assert len(everything.unique(dim=0)) == 120


def test_samples_of_a_perfect_network_follow_the_data():
    chain = ExactChain("2x2", 2, T=48)
    x_0 = chain.d.sample(3000, batch_size=500).flatten(1)
    codes = (x_0.long() * torch.tensor([8, 4, 2, 1])).sum(1)
    np.testing.assert_allclose(
        torch.bincount(codes, minlength=16) / 3000, chain.final_distribution(), atol=0.03
    )
    truth = np.zeros(16)
    truth[[0b0000, 0b1100, 0b1010, 0b1111, 0b1001]] = chain.probs
    np.testing.assert_allclose(chain.final_distribution(), truth, atol=0.02)


@pytest.mark.parametrize(
    "device, levels, batch", [("cpu", 2, 64), ("mps", 2, 64), ("cuda", 2, 512), ("cuda", 256, 64)]
)
def test_suitable_batch(device, levels, batch, monkeypatch):
    """On a GPU, 64 images of 256 levels are 2**24 probabilities."""
    d = DiscreteDiffusion(torch.nn.Identity(), num_levels=levels, timesteps=2)
    monkeypatch.setattr(DiscreteDiffusion, "device", torch.device(device))
    assert d.suitable_batch() == batch
