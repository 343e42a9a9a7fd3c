"""The try at the record, in small: a clock of four seconds per look, in place of the true one."""

import itertools
import json
from types import SimpleNamespace

import cli

import pytest
import torch

from checkpoint import load_checkpoint, read_checkpoint, save_checkpoint
from experiments import common, record
from model import Autocast
from trainer import Trainer

SMALL = {"2": {"channels": [16, 8, 8], "blocks": 1}, "1": {"channels": [8, 8, 8], "blocks": 1}}


@pytest.fixture
def attempt(monkeypatch, tmp_path):
    """Run it with flags; returns its JSON and the (step, rate, images, maps) of all steps."""
    steps, trained = [], Trainer.step

    def step(self, x_0, y, maps):
        loss = trained(self, x_0, y, maps)
        rate = self.optimizer.param_groups[0]["lr"]
        steps.append((self.steps, rate, x_0, maps, self))
        return loss

    monkeypatch.setattr(Trainer, "step", step)
    monkeypatch.setattr("trainer.accelerated", lambda network, amp, _: Autocast(network))
    monkeypatch.setattr(Trainer, "validate", lambda self, x_0: float(len(x_0)))
    monkeypatch.setattr(common, "OUT", tmp_path)
    for name, value in {"NETWORKS": SMALL, "BATCH_SIZES": (16, 8), "CHECK_STEPS": 2}.items():
        monkeypatch.setattr(record, name, value)

    def run(*flags):
        clock = itertools.count(0, 4)
        monkeypatch.setattr(record, "time", SimpleNamespace(monotonic=lambda: next(clock)))
        steps.clear()
        argv = ["record.py", "--data", "offline", "--device", "cpu", *map(str, flags)]
        monkeypatch.setattr("sys.argv", argv)
        record.main()
        return json.loads((tmp_path / "record" / "record.json").read_text()), steps

    return run


def test_the_largest_network_that_is_fast_enough_trains_until_the_deadline(
    attempt, monkeypatch, tmp_path
):
    """Each network is timed for 4 steps of 16 or 8 images, in 16 seconds of this clock."""
    monkeypatch.setattr(record, "IMAGES", 200)
    result, steps = attempt("--minutes", 3)
    speeds = [row["images_per_second"] for row in result["timed"]]
    assert speeds == pytest.approx([4, 2] * 2)
    assert result["network"]["channels"] == SMALL["2"]["channels"]  # 4 images/s are enough
    assert result["network"]["dropout"] == 0.1 and result["network"]["augmented"]
    assert result["batch_size"] == 16
    (_, _, x_0, maps, trainer) = steps[-1]
    assert len(x_0) == len(maps) == 16 and maps.any() and set(x_0.unique().tolist()) == {0, 1}
    assert (trainer.diffusion.timesteps, trainer.diffusion.loss_type) == (1000, "variational")
    rates = [rate for _, rate, _, _, one in steps if one is trainer]
    assert rates[10:25] == pytest.approx([2e-3] * 15) and 0 <= rates[-1] < 5e-4
    last = result["curve"][-1]
    assert last["images"] == 16 * trainer.steps and last["validation_bound"] == 500
    assert last["minutes"] * 60 == pytest.approx(180 - 4 * 20, abs=16)
    assert [row["minutes"] for row in result["curve"]] == pytest.approx([1, last["minutes"]])
    weights = load_checkpoint(tmp_path / "record" / "weights.pth").model.state_dict()
    for name, weight in trainer.averaged.model.state_dict().items():
        assert torch.equal(weights[name], weight.half().float())


def test_another_run_continues_from_the_weights_with_other_batches(attempt, monkeypatch, tmp_path):
    monkeypatch.setattr(record, "NETWORKS", {"1": SMALL["1"]})
    monkeypatch.setattr(record, "BATCH_SIZES", (16,))
    _, steps = attempt("--minutes", 1)
    first, before = steps[-1][-1], [x_0 for _, _, x_0, *_ in steps]
    weights = tmp_path / "record" / "weights.pth"
    with pytest.raises(SystemExit):
        attempt("--init", weights)  # which would be overwritten
    weights = weights.rename(tmp_path / "record.pth")
    result, steps = attempt("--minutes", 0.8, "--init", weights)
    assert result["init"] == str(weights)
    assert result["timed"] == [] and result["network"] == first.network.config
    assert len(steps[0][2]) == 16
    assert not any(torch.equal(steps[0][2], x_0) for x_0 in before)
    state = read_checkpoint(weights)
    state["network"] |= {"augmented": False}
    del state["averaged_weights"]["embed_maps.weight"]
    save_checkpoint(weights, state)
    with pytest.raises(SystemExit) as error:
        attempt("--init", weights)
    assert error.value.code == 2


def test_too_little_time_for_any_network_takes_the_fastest(attempt, monkeypatch):
    monkeypatch.setattr(record, "IMAGES", 10**9)
    monkeypatch.setattr(record, "NETWORKS", {"1": SMALL["1"]})
    monkeypatch.setattr(record, "BATCH_SIZES", (8, 16))
    with pytest.raises(cli.UserError, match="give more --minutes"):
        attempt("--minutes", 0.5)
    result, _ = attempt("--minutes", 1)
    speeds = [row["images_per_second"] for row in result["timed"]]
    assert speeds == pytest.approx([2, 4]) and result["batch_size"] == 16


def test_a_loss_that_is_not_finite_ends_it(attempt, monkeypatch):
    monkeypatch.setattr(record, "NETWORKS", {"1": SMALL["1"]})
    monkeypatch.setattr("trainer.Trainer._update", lambda self, **_: torch.tensor(torch.nan))
    with pytest.raises(cli.UserError, match="not finite at step 7"):
        attempt("--minutes", 2)
