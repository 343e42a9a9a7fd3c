"""The networks: shapes, sizes, what their outputs depend on; and that a small one learns."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from diffusion import DiscreteDiffusion, load_checkpoint, read_checkpoint, save_checkpoint
from model import PlainUNet, UNet, build_network, one_hot, pick_device, time_features


def mflop(network):
    """Multiply and add counted as two, for one 32x32 image."""
    with FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 1, 32, 32, dtype=torch.long), torch.ones(1, dtype=torch.long))
    return counter.get_total_flops() / 1e6


def randomize(network):
    """Fill the zero-initialised layers, so that the output depends on everything."""
    torch.manual_seed(0)
    for p in network.parameters():
        if p.ndim > 1:
            torch.nn.init.kaiming_normal_(p)
    return network.eval()


def test_default_network_is_cheap():
    assert mflop(UNet()) <= 100


def test_plain_network_is_the_common_one():
    assert sum(p.numel() for p in PlainUNet().parameters()) == pytest.approx(1.88e6, rel=0.005)
    assert mflop(PlainUNet()) == pytest.approx(790, rel=0.005)


@pytest.mark.parametrize("name", ["unet", "plain"])
@pytest.mark.parametrize("levels, states", [(2, 2), (2, 3), (5, 5)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_shapes(name, levels, states, dtype):
    """Logits of K levels from S states, for any integer dtype and image sizes divisible by 8."""
    network = build_network({"name": name, "num_levels": levels, "num_states": states}).eval()
    for size in ((32, 32), (8, 16)):
        x_t = torch.randint(0, states, (3, 1, *size)).to(dtype)
        out = network(x_t, torch.tensor([1, 100, 200]))
        assert out.shape == (3, levels, *size) and out.dtype == torch.float32


@pytest.mark.parametrize("name", ["unet", "plain"])
def test_output_depends_on_image_and_time_and_not_on_neighbours(name):
    network = randomize(build_network({"name": name, "num_levels": 2}))
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
    """y moves the output of its own image; -1 is no label, the same as none at all; networks without labels refuse."""
    network = randomize(UNet(2, channels=(8, 8, 8), num_labels=10))
    torch.nn.init.normal_(network.embed_y.weight)
    x_t, t = torch.zeros(4, 1, 8, 8, dtype=torch.long), torch.full((4,), 5)
    none = network(x_t, t)
    some = network(x_t, t, torch.tensor([-1, 0, 7, -1]))
    assert torch.allclose(some[[0, 3]], none[[0, 3]], atol=1e-6)
    assert (some[1] - none[1]).abs().max() > 1e-3 and (some[2] - some[1]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="without labels"):
        UNet(channels=(8, 8, 8))(x_t, t, torch.zeros(4, dtype=torch.long))


@pytest.mark.parametrize(
    "network", [UNet(2), UNet(4, 5, channels=(8, 16, 24), blocks=2, num_labels=10), PlainUNet(2, 3)]
)
def test_config_rebuilds_the_network(network):
    rebuilt = build_network(network.config)
    rebuilt.load_state_dict(network.state_dict())
    assert rebuilt.config == network.config


def test_build_network_refuses():
    with pytest.raises(ValueError, match="unknown network"):
        build_network({"name": "nonsense"})
    with pytest.raises(ValueError, match="multiples of 8"):
        UNet(channels=(7, 8, 8))
    with pytest.raises(ValueError, match="nonsense"):
        pick_device("nonsense")


def test_one_hot_and_time_features():
    x = torch.tensor([[[[0, 2]]]])
    assert one_hot(x, 3).tolist() == [[[[1, 0]], [[0, 0]], [[0, 1]]]]
    features = time_features(torch.arange(1, 1001), 32)
    distance = torch.cdist(features, features) + 10 * torch.eye(1000)
    assert features.shape == (1000, 32) and distance.min() > 0.1  # no two timesteps look alike


def test_learns_to_draw_its_patterns():
    """A tiny network on three 8x8 patterns ends up drawing those patterns, each of them, and little else."""
    torch.manual_seed(0)
    patterns = torch.zeros(3, 1, 8, 8, dtype=torch.long)
    patterns[0, :, 2:6, 2:6] = 1
    patterns[1, :, :, 3:5] = 1
    patterns[2, :, 4:] = 1
    d = DiscreteDiffusion(UNet(channels=(16, 16, 16)), timesteps=20)
    optimizer = torch.optim.AdamW(d.parameters(), 5e-3)
    for _ in range(250):
        loss = d.loss(patterns[torch.randint(0, 3, (48,))])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    d.eval()
    drawn = d.sample(100, shape=(1, 8, 8)).flatten(1)
    matches = (drawn[:, None] == patterns.flatten(1)[None]).all(2)  # [100, 3]
    assert matches.any(1).float().mean() > 0.9
    assert matches.float().mean(0).min() > 0.15
    with torch.no_grad():
        bound = d.variational_bound(patterns.repeat(30, 1, 1, 1), None, torch.Generator().manual_seed(0)).mean()
    assert 1.05 < bound < 2.5  # the entropy of the data is log 3 = 1.10 nats


@pytest.mark.parametrize("Q", [None, torch.eye(3, dtype=torch.float64).expand(5, 3, 3)])
@pytest.mark.filterwarnings("ignore:bar_Q")
def test_checkpoint_round_trip(tmp_path, Q):
    """load_checkpoint gives back the diffusion with the averaged weights, in eval mode, from the file alone."""
    network = randomize(UNet(2, None if Q is None else 3, channels=(8, 8, 8)))
    d = DiscreteDiffusion(network, timesteps=4, Q=Q)
    averaged = {k: v + 1 for k, v in network.state_dict().items()}
    path = tmp_path / "a" / "b.pth"
    save_checkpoint(path, {"network": network.config, "diffusion": d.config, "averaged_weights": averaged})
    loaded = load_checkpoint(path)
    assert not loaded.training and loaded.timesteps == 4
    assert torch.equal(loaded.Q, d.Q) and torch.equal(loaded.bar_Q, d.bar_Q)
    assert all(torch.equal(v, averaged[k]) for k, v in loaded.model.state_dict().items())
    assert [p.name for p in path.parent.iterdir()] == ["b.pth"]


def test_unreadable_checkpoints(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "missing.pth")
    good, bad = tmp_path / "good.pth", tmp_path / "bad.pth"
    network = UNet(channels=(8, 8, 8))
    config = DiscreteDiffusion(network).config
    save_checkpoint(good, {"network": network.config, "diffusion": config, "averaged_weights": network.state_dict()})
    for content in (b"", b"no checkpoint", good.read_bytes()[:5000]):
        bad.write_bytes(content)
        with pytest.raises(ValueError, match=r"bad.pth is damaged"):
            read_checkpoint(bad)
    for checkpoint in ({"something": 1}, [1, 2]):
        save_checkpoint(bad, checkpoint)
        with pytest.raises(ValueError, match="not a checkpoint of this repository"):
            read_checkpoint(bad)
    other = UNet(channels=(8, 16, 8)).state_dict()
    save_checkpoint(bad, {"network": network.config, "diffusion": config, "averaged_weights": other})
    with pytest.raises(ValueError, match="does not fit") as error:
        load_checkpoint(bad)
    assert "\n" not in str(error.value)
    save_checkpoint(bad, {"network": {"name": "unet", "nonsense": 1}, "diffusion": config, "averaged_weights": {}})
    with pytest.raises(ValueError, match="does not fit"):
        load_checkpoint(bad)


def test_checkpoints_run_no_code(tmp_path):
    """A pickle that would run a function when loaded is refused, and nothing runs."""
    import os

    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "attacked"),)

    torch.save({"network": Attack()}, tmp_path / "attack.pth")
    with pytest.raises(ValueError, match="damaged or is not a checkpoint"):
        load_checkpoint(tmp_path / "attack.pth")
    assert not (tmp_path / "attacked").exists()
