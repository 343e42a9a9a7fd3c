"""README.md's examples run as written, with fewer timesteps."""

import re
from itertools import islice

import torch
from scripts import REPOSITORY

import dataset

USE, TRAIN = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)


def test_use_of_a_released_model(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    names = {}
    assert "timesteps=30" in USE
    exec(USE.replace("timesteps=30", "timesteps=6"), names)
    assert names["x_0"].shape == (16, 1, 32, 32) and names["x_0"].dtype == torch.uint8
    assert 20 < names["nats"].mean() < 100 and names["log_w"].shape == (2, 4)
    given = names["known"] >= 0
    assert torch.equal(names["filled"][given].long(), names["known"][given])


def test_training_loop(monkeypatch):
    """On two batches of sixteen digits."""
    batches = dataset.batches

    def few(digits, batch_size, **options):
        assert batch_size == 128
        return islice(batches(digits, 16, **options), 2)

    monkeypatch.setattr(dataset, "batches", few)
    torch.manual_seed(0)
    names = {}
    assert "timesteps=200" in TRAIN
    exec(TRAIN.replace("timesteps=200", "timesteps=20"), names)
    assert names["loss"].item() < 0.6931 and names["images"].shape == (16, 1, 32, 32)
