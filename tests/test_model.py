"""The network: shapes, sizes and dependencies; a small one learns."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from checkpoint import RELEASED, load_checkpoint
from dataset import load_dataset, take, to_levels
from diffusion import DiscreteDiffusion
from model import (
    Attention,
    Autocast,
    ResBlock,
    UNet,
    as_numbers,
    build_network,
    one_hot,
    time_features,
)


def mflop(network):
    """For one 32x32 image; multiply and add count as two."""
    with FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 1, 32, 32, dtype=torch.long), torch.ones(1, dtype=torch.long))
    return counter.get_total_flops() / 1e6


def randomize(network):
    """Fill the zero-initialized layers, so the output depends on everything."""
    torch.manual_seed(0)
    for p in network.parameters():
        if p.ndim > 1:
            torch.nn.init.kaiming_normal_(p)
    return network.eval()


def test_default_network_is_cheap():
    assert mflop(UNet()) <= 100


@pytest.mark.parametrize("levels, states", [(2, 2), (2, 3), (5, 5)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_shapes(levels, states, dtype):
    """Logits of K levels from S states, for any integer dtype and image sizes divisible by 8."""
    network = UNet(levels, states).eval()
    for size in ((32, 32), (8, 16)):
        x_t = torch.randint(0, states, (3, 1, *size)).to(dtype)
        out = network(x_t, torch.tensor([1, 100, 200]))
        assert out.shape == (3, levels, *size) and out.dtype == torch.float32


def test_output_depends_on_image_and_time_and_not_on_neighbours():
    network = randomize(UNet(2))
    x_t = torch.randint(0, 2, (3, 1, 16, 16), generator=torch.Generator().manual_seed(0))
    t = torch.tensor([1, 2, 200])
    out = network(x_t, t)
    flipped = x_t.clone()
    flipped[0, 0, 3, 3] ^= 1
    changed = network(flipped, t) - out
    assert changed[0].abs().max() > 1e-4 and changed[1:].abs().max() < 1e-5
    assert (network(x_t, t + 1) - out).abs().amax((1, 2, 3)).min() > 1e-4
    assert torch.allclose(network(x_t[1:2], t[1:2]), out[1:2], atol=1e-4)


def test_labels():
    """y affects only its own image; -1 means no label; networks without labels reject y."""
    network = randomize(UNet(2, channels=(8, 8, 8), num_labels=10))
    torch.nn.init.normal_(network.embed_y.weight)
    x_t, t = torch.zeros(4, 1, 8, 8, dtype=torch.long), torch.full((4,), 5)
    none = network(x_t, t)
    some = network(x_t, t, torch.tensor([-1, 0, 7, -1]))
    assert torch.allclose(some[[0, 3]], none[[0, 3]], atol=1e-6)
    assert (some[1] - none[1]).abs().max() > 1e-3 and (some[2] - some[1]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="without labels"):
        UNet(channels=(8, 8, 8))(x_t, t, torch.zeros(4, dtype=torch.long))


def test_dropout():
    """It drops the given share of activations, only in training, and adds no weights."""
    network, plain = (randomize(UNet(channels=(8, 8, 8), dropout=p)) for p in (0.25, 0.0))
    x_t, t = torch.zeros(2, 1, 8, 8, dtype=torch.long), torch.full((2,), 5)
    shares = []
    for block in (module for module in network.modules() if isinstance(module, ResBlock)):
        block.conv2.register_forward_hook(
            lambda _, given, __: shares.append((given[0] == 0).float().mean())
        )
    network.train()
    drawn = [network(x_t, t) for _ in range(20)]
    assert len(shares) == 20 * 6 and sum(shares) / len(shares) == pytest.approx(0.25, abs=0.02)
    assert not torch.equal(*drawn[:2])
    plain.load_state_dict(network.state_dict())
    assert torch.equal(network.eval()(x_t, t), plain(x_t, t))


@pytest.mark.parametrize(
    "network", [UNet(2), UNet(4, 5, (8, 16, 24), blocks=2, num_labels=10, dropout=0.1)]
)
def test_config_rebuilds_the_network(network):
    rebuilt = build_network(network.config)
    rebuilt.load_state_dict(network.state_dict())
    assert rebuilt.config == network.config
    assert rebuilt.fold.weight.is_contiguous(memory_format=torch.channels_last)


def test_what_the_network_refuses():
    with pytest.raises(ValueError, match="unknown network"):
        build_network({"name": "nonsense"})
    for channels in ((7, 8, 8), (8, 8), (0, 8, 8)):
        with pytest.raises(ValueError, match="multiples of 8"):
            UNet(channels=channels)
    for blocks in (0, 17):
        with pytest.raises(ValueError, match=r"blocks must be in 1\.\.16"):
            UNet(blocks=blocks)
    for dropout in (-0.1, 1.0):
        with pytest.raises(ValueError, match="dropout must be at least 0 and below 1"):
            UNet(dropout=dropout)
    network, t = UNet(channels=(8, 8, 8)), torch.ones(2, dtype=torch.long)
    for shape in ((2, 1, 28, 32), (2, 1, 32, 12), (2, 3, 32, 32), (2, 32, 32)):
        with pytest.raises(ValueError, match=r"multiples of 8, got \[2, ") as error:
            network(torch.zeros(shape, dtype=torch.long), t)
        assert "\n" not in str(error.value)


def test_hidden_matrices_are_what_lies_between_embeddings_and_output():
    """All matrices except those that read t, y or pixels and those that write logits."""
    options = {"num_labels": 10, "ordinal": True, "augmented": True}
    network = UNet(3, 4, channels=(8, 16, 24), blocks=2, **options)
    hidden = {id(p) for p in network.hidden_matrices()}
    rest = {name for name, p in network.named_parameters() if id(p) not in hidden and p.ndim > 1}
    edges = ["embed_t.0", "embed_t.2", "embed_y", "embed_maps", "fold", "fold_level"]
    edges += ["unfold.2", "own_state"]
    assert rest == {f"{name}.weight" for name in edges}
    assert (
        all(p.ndim > 1 for p in network.hidden_matrices())
        and len(hidden) == len(network.hidden_matrices()) > 40
    )


def test_ordinal_levels():
    """Levels are also input as numbers; a mask is like the middle."""
    assert as_numbers(torch.tensor([0, 1, 2, 3]), 3).tolist() == [-1, 0, 1, 0]
    assert as_numbers(torch.tensor([0, 255], dtype=torch.uint8), 256).tolist() == [-1, 1]
    torch.manual_seed(0)
    network, t = UNet(3, 4, channels=(8, 8, 8), ordinal=True).double(), torch.ones(4)
    torch.nn.init.normal_(network.unfold[-1].weight)
    torch.nn.init.zeros_(network.fold.weight)
    black, grey, white, mask = network(torch.arange(4).view(4, 1, 1, 1).expand(4, 1, 8, 8), t)
    torch.testing.assert_close(grey, mask)
    assert (black - grey).abs().mean() > 0.01 and (white - grey).abs().mean() > 0.01
    old = UNet(3).config  # from a checkpoint older than this option
    del old["ordinal"]
    assert (
        build_network(old).load_state_dict(UNet(3).state_dict())
        and not build_network(old).config["ordinal"]
    )


def test_augmented_networks_are_told_the_map():
    """Zero is a picture as it is. A new network predicts the same whatever it is told."""
    torch.manual_seed(0)
    network, t = UNet(channels=(8, 8, 8), augmented=True), torch.ones(2, dtype=torch.long)
    torch.nn.init.normal_(network.own_state.weight)
    x_t, maps = torch.randint(0, 2, (2, 1, 8, 8)), torch.randn(2, 6)
    clean = network(x_t, t)
    assert torch.equal(network(x_t, t, maps=maps), clean)
    torch.nn.init.normal_(network.embed_maps.weight)
    assert torch.equal(network(x_t, t, maps=torch.zeros(2, 6)), clean)
    torch.testing.assert_close(
        Autocast(network)(x_t, t, maps=maps), network(x_t, t, maps=maps), atol=0.05, rtol=0.05
    )
    assert (network(x_t, t, maps=maps) - clean).abs().amax((1, 2, 3)).min() > 0.1
    old = network.config
    del old["augmented"]  # from a checkpoint older than this option
    assert not build_network(old).config["augmented"]


def test_it_starts_from_uniform_probabilities_and_blocks_that_change_nothing():
    torch.manual_seed(0)
    h, emb = torch.randn(2, 16, 4, 4), torch.randn(2, 32)
    assert torch.equal(ResBlock(16, 32, 0.0)(h, emb), h)
    assert torch.equal(Attention(16)(h), h)
    network = UNet(3, 4, channels=(8, 8, 8), num_labels=10, ordinal=True)
    x_t = torch.randint(0, 4, (2, 1, 16, 16))
    assert not network(x_t, torch.tensor([1, 9]), torch.tensor([0, 7])).any()


def test_one_hot_and_time_features():
    x = torch.tensor([[[[0, 2]]]])
    assert one_hot(x, 3).tolist() == [[[[1, 0]], [[0, 0]], [[0, 1]]]]
    features = time_features(torch.arange(1, 1001), 32)
    distance = torch.cdist(features, features) + 10 * torch.eye(1000)
    assert features.shape == (1000, 32) and distance.min() > 0.1  # no two timesteps look alike


def test_bounds_of_the_released_weights():
    """Nats per image depend on every skip, shift and head of the trained network."""
    digits = take(load_dataset("validation", "offline"), 40)
    d, x_0, t = load_checkpoint(RELEASED), to_levels(digits.images), 25 * torch.arange(1, 41)
    x_t = d.q_sample(x_0, t, torch.rand(x_0.shape, generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        logits = [d.x_0_logits(x_t, t, y) for y in (None, digits.labels)]
    nats = [F.cross_entropy(one, x_0[:, 0].long()).item() * 1024 for one in logits]
    # In float64; float32 is within 1e-5 under SSE4.1, AVX2 and AVX-512.
    assert nats == pytest.approx([58.174915, 55.084742], rel=0, abs=3e-5)


def test_learns_to_draw_its_patterns():
    """Trained on three 8x8 patterns, a tiny network draws all of them and little else."""
    torch.manual_seed(0)
    patterns = torch.zeros(3, 1, 8, 8, dtype=torch.long)
    patterns[0, :, 2:6, 2:6] = 1
    patterns[1, :, :, 3:5] = 1
    patterns[2, :, 4:] = 1
    d = DiscreteDiffusion(UNet(channels=(16, 16, 16)), timesteps=20, image_shape=(1, 8, 8))
    optimizer = torch.optim.AdamW(d.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, 150)
    for _ in range(150):
        loss = d.loss(patterns.repeat(16, 1, 1, 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    d.eval()
    drawn = d.sample(300, batch_size=300).flatten(1)
    matches = (drawn[:, None] == patterns.flatten(1)[None]).all(2)  # [300, 3]
    assert matches.any(1).float().mean() > 0.9
    assert matches.float().mean(0).min() > 0.1
    bound = d.variational_bound(
        patterns.repeat(30, 1, 1, 1), None, torch.Generator().manual_seed(0)
    ).mean()
    assert 1.05 < bound < 2.5  # the entropy of the data is log 3 = 1.10 nats
