"""How a run of train.py stops and goes on, to the bit, and who owns its folder."""

import errno
import io
import math
import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import filelock
import pytest
import torch
from scripts import (
    SIGNALS,
    TRAIN,
    call,
    checkpoint_of,
    fail,
    files,
    read_metrics,
    resumed,
    same_run,
    same_weights,
    signal_at_step,
    snapshot,
    spy,
    start,
    succeed,
    trained,
)

import dataset
import train
import trainer
from checkpoint import read_checkpoint, save_checkpoint
from dataset import load_dataset
from trainer import Trainer

pytestmark = pytest.mark.usefixtures("fresh_directory", "offline_once")


# --------------------------------------------------------------------------------------------------
# Stopping and going on


def test_a_real_run_is_interrupted_and_resumed(run, tmp_path):
    """As a real process. Its first line comes at once, though nobody sits at a terminal; its folder
    is its own from then on; a reader that goes away (`| head -1`) stops nothing and is not
    mentioned. Ctrl-C saves, says how to go on and exits with 130; --resume then ends in
    bit-identical weights, history and samples (on one machine, with one thread in both)."""
    process = start("train.py", *TRAIN, "--epochs", 4, "--out-dir", "cut", cwd=tmp_path)
    assert "digits for training" in process.stdout.readline()
    for flags in ([], ["--overwrite"]):
        line = call("train.py", *TRAIN, "--out-dir", "cut", *flags)[2]
        assert "another run is alive in cut" in line
    process.stdout.close()
    last = Path("cut") / "checkpoints" / "last.pth"
    while process.poll() is None and not last.exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    err = process.stderr.read()
    if process.wait(timeout=300) == 130:  # else it was faster than the signal
        (message,) = err.splitlines()
        assert "SIGINT" in message and "--resume" in message and str(last) in message
        assert 4 <= read_checkpoint(last)["step"] < 16
        assert f"Resuming {last}" in resumed(out="cut")
    else:
        assert process.returncode == 0 and err == ""
    assert same_run("cut", run)
    assert files(Path("cut")) == files(run)
    pictures = [Path(folder) / "samples" / "sample_epoch_4.png" for folder in ("cut", run)]
    assert pictures[0].read_bytes() == pictures[1].read_bytes()


@pytest.mark.parametrize(
    "number, at", [(signal.SIGINT, 2), (signal.SIGHUP, 7), (signal.SIGTERM, 11)]
)
def test_stop_anywhere_loses_nothing(number, at, run, monkeypatch, cheap):
    """In the middle of an epoch, at its end, and where the decay starts: the step ends and is
    saved; resuming is exact.

    The exit code is 128 and the signal's number. The history has one row an epoch.
    """
    with monkeypatch.context() as patch:
        signal_at_step(patch, at, number)
        code, _, err = call("train.py", *TRAIN, "--epochs", 4, "--out-dir", "cut")
    assert code == 128 + number
    where = f"after step {at + 1} of 16, saved in {Path('cut/checkpoints/last.pth')}"
    assert err == f"Stopped by {number.name} {where}; go on with --resume\n"
    assert checkpoint_of("cut")["step"] == at + 1
    assert len(read_metrics("cut")) if at >= 3 else not Path("cut/metrics.csv").exists()
    assert len(checkpoint_of("cut")["history"]) == (at + 1) // 4
    assert Path("cut/checkpoints/constant.pth").exists() == (at >= 11)
    resumed(out="cut")
    for name in ("last", "constant"):
        assert same_run("cut", run, name, but_for=["validation_bound"])
    assert checkpoint_of("cut")["loss_sum"] == checkpoint_of(run)["loss_sum"]


def test_decay_that_starts_within_an_epoch(monkeypatch, cheap):
    """That step makes constant.pth, and last.pth if the run stops there. A longer run branches off
    there: the losses before and after the branch make one row."""
    trained("--steps 10", "straight")  # constant until 7
    with monkeypatch.context() as patch:
        signal_at_step(patch, 6, signal.SIGTERM)
        assert call("train.py", *TRAIN, "--steps", 10, "--out-dir", "out")[0] == 143
    assert checkpoint_of("out")["step"] == checkpoint_of("out", "constant")["step"] == 7
    with monkeypatch.context() as patch:
        steps = spy(patch, Trainer, "step")
        resumed()
        assert len(steps) == 3  # none is done again
    assert same_run("out", "straight")
    assert [row["step"] for row in checkpoint_of("out")["history"]] == [4, 8, 10]
    resumed("--epochs 3")
    trained("--epochs 3", "longer")
    assert same_run("out", "longer")


def test_stop_at_the_last_step_is_the_end(monkeypatch, cheap):
    signal_at_step(monkeypatch, 3, signal.SIGTERM)
    assert "Done" in trained("--epochs 1") and Path("out/checkpoints/weights.pth").exists()


@pytest.mark.parametrize(
    "flags",
    ["--decay cosine --conditional --binarize dynamic --dropout 0.1", "--amp --loss variational"],
)
def test_other_runs_go_on_bit_for_bit(flags, monkeypatch, cheap):
    """Dropout, hidden labels and random binarizations come back, too."""
    flags = f"{flags} --limit 32 --epochs 2"
    trained(flags, "straight")
    with monkeypatch.context() as patch:
        signal_at_step(patch, 2, signal.SIGTERM)
        call("train.py", *TRAIN, *flags.split(), "--out-dir", "cut")
    assert checkpoint_of("cut")["step"] == 3
    resumed(out="cut")
    assert same_run("cut", "straight")


def test_second_ctrl_c_stops_at_once(monkeypatch):
    """Exit code 130 without a traceback and without waiting for the step or a save."""
    signal_at_step(monkeypatch, 1, signal.SIGINT, signal.SIGINT)
    code, _, err = call("train.py", *TRAIN, "--epochs", 4, "--out-dir", "cut")
    assert code == 130
    assert "Traceback" not in err
    assert not list(Path().rglob("*.pth"))


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_that_is_ignored_stays_ignored(number, monkeypatch, cheap):
    """As SIGHUP is under nohup. `call` puts the handlers back."""
    signal_at_step(monkeypatch, 1, number)
    before = signal.signal(number, signal.SIG_IGN)
    try:
        trained("--steps 2")
    finally:
        signal.signal(number, before)


def test_progress_bar_starts_where_the_run_goes_on(monkeypatch, my_run, cheap):
    bars, tqdm = [], train.tqdm

    def bar(batches, **kwargs):
        bars.append(tqdm(batches, **kwargs | {"disable": False, "file": io.StringIO()}))
        assert kwargs["disable"] is None  # tqdm's word for: only on a terminal
        return bars[-1]

    monkeypatch.setattr(train, "tqdm", bar)
    shutil.copy(my_run / "checkpoints" / "model_epoch_4.pth", "x.pth")
    succeed("train.py", "--resume", "x.pth", "--steps", 18, "--out-dir", "out")
    resumed("--epochs 5")
    seen = [(bar.total, bar.initial, bar.unit_scale, bar.desc) for bar in bars]
    assert seen == [(4, 0, 16, "epoch 5"), (4, 2, 16, "epoch 5")]


# --------------------------------------------------------------------------------------------------
# Longer than planned


def test_finished_run_goes_on_from_where_the_rate_was_constant(my_run, cheap, monkeypatch):
    """More epochs give, bit for bit, what a run planned longer from the start would have given; no
    row is there twice.

    That is, if both warm up alike: in runs of less than a thousand steps the warm-up depends on
    their number.
    """
    monkeypatch.setattr(trainer, "WARMUP_STEPS", 1)  # what 16 steps have anyway
    leftover = my_run / "checkpoints" / ".last.pth.a1b2c3d4"  # of a save that was killed
    leftover.write_bytes(b"half a checkpoint")
    old = read_metrics(my_run)
    out = resumed("--epochs 6", my_run)
    assert f"Resuming {my_run / 'checkpoints' / 'constant.pth'} at step 12" in out
    assert "rises" not in out
    trained("--epochs 6", "longer")
    for name in ("last", "constant"):
        assert same_weights(*(f"{x}/checkpoints/{name}.pth" for x in (my_run, "longer")))
    rows = read_metrics(my_run)
    assert rows[:3] == old[:3] and [row["epoch"] for row in rows] == list("123456")
    assert [row["lr"] for row in rows] == [row["lr"] for row in read_metrics("longer")]
    kept = {f"model_epoch_{n}.pth" for n in (4, 5, 6)}
    assert files(my_run / "checkpoints") == kept | {"last.pth", "constant.pth", "weights.pth"}
    assert files(my_run / "samples") == {f"sample_epoch_{n}.png" for n in (4, 5, 6)}


def test_which_checkpoint_a_longer_run_goes_on_from(monkeypatch, my_run, cheap):
    """constant.pth only where the newest is past it and there is to be more than was planned."""
    rows = []
    look = lambda self, stop: rows.append([r["step"] for r in self.history])  # noqa: E731
    monkeypatch.setattr(train.Run, "train", look)

    def source(flags="", checkpoint=""):
        arguments = ["--resume", *[checkpoint] * bool(checkpoint), *flags.split()]
        out = succeed("train.py", *arguments, "--out-dir", my_run)
        (line,) = [line for line in out.splitlines() if line.startswith("Resuming")]
        return Path(line.split()[1]).name, int(line.split()[-1])

    folder = my_run / "checkpoints"
    assert source("--steps 17") == ("constant.pth", 12)
    assert rows == [[4, 8, 12]]  # what came after is no longer so
    assert source("--epochs 6", folder / "last.pth") == ("constant.pth", 12)
    shutil.move(folder / "constant.pth", "constant.pth")
    assert source("--epochs 6") == ("last.pth", 16)  # a run from before there was one
    shutil.copy("constant.pth", folder / "last.pth")
    shutil.move("constant.pth", folder / "constant.pth")
    for flags in ("--epochs 6", "--epochs 4", ""):
        assert source(flags) == ("last.pth", 12)  # the same, and it may hold more
    save_checkpoint(folder / "last.pth", checkpoint_of(my_run) | {"step": 14})
    assert source("--epochs 4") == ("last.pth", 14)  # the decay goes on as it was planned
    assert source("--epochs 5") == ("constant.pth", 12)


def test_steps_in_place_of_epochs(cheap):
    """A run ends where it should, in the middle of an epoch, with all that a run leaves; more
    steps, no second row."""

    def row() -> list:
        assert [(row["epoch"], row["step"]) for row in read_metrics("out")][:-1] == [("1", "4")]
        last = checkpoint_of("out")
        row, steps = last["history"][1], last["step"] - 4
        assert row["train_loss"] == pytest.approx(last["loss_sum"] / steps)
        return [row["epoch"], row["step"], last["step"], last["settings"]["steps"]]

    trained("--steps 6 --decay cosine")
    assert checkpoint_of("out", "model_epoch_2")["step"] == 6
    assert Path("out/samples/sample_epoch_2.png").exists()
    assert row() == [2, 6, 6, 6]
    for flags in (["--steps", 6], []):
        assert "all its 6 steps" in fail("train.py", "--resume", *flags, "--out-dir", "out")
    resumed("--epochs 2")
    assert row() == [2, 8, 8, 8]


@pytest.mark.parametrize("decay", ["late", "cosine", "constant"])
def test_a_rate_that_rises_again_is_said(decay, cheap):
    """Where a longer run can't go on from before the decay: there is no constant.pth."""
    trained(f"--decay {decay} --epochs 1")
    Path("out/checkpoints/constant.pth").unlink(missing_ok=True)
    out = resumed("--epochs 2").splitlines()
    rate = trainer.learning_rate(2e-3, 4, 8, decay)
    assert (f"The learning rate rises again, to {rate:.3g}" in out) == (decay != "constant")
    assert any("rises" in line for line in out) == (decay != "constant")


def test_a_rate_that_warms_up_does_not_rise_again(monkeypatch, cheap):
    with monkeypatch.context() as patch:
        signal_at_step(patch, 0, signal.SIGTERM)
        call("train.py", *TRAIN, "--epochs", 100, "--out-dir", "out")
    monkeypatch.setattr(train.Run, "train", lambda self, stop: False)
    out = resumed()
    assert "at step 1" in out and "rises" not in out


def test_constant_of_another_run_is_not_used(my_run, cheap):
    """It is the named checkpoint's only if its history is the beginning of the checkpoint's."""
    constant = my_run / "checkpoints" / "constant.pth"
    other = read_checkpoint(constant)
    other["history"][0]["seconds"] += 1
    save_checkpoint(constant, other)
    out = resumed("--steps 18", my_run)
    assert "last.pth at step 16" in out and "rises again" in out


def fake_clock(monkeypatch) -> SimpleNamespace:
    """Ten seconds a step, and nothing else takes time."""
    clock = SimpleNamespace(monotonic=lambda: 0.0, perf_counter=lambda: clock.now, now=0.0)
    step = Trainer.step

    def timed(self, *given):
        clock.now += 10
        return step(self, *given)

    monkeypatch.setattr(train, "time", clock)
    monkeypatch.setattr(Trainer, "step", timed)
    return clock


def test_no_time_is_lost_when_a_run_stops(monkeypatch, cheap):
    """The seconds before a stop count in the row that comes after it."""
    clock = fake_clock(monkeypatch)
    flags = *TRAIN, "--validate-every", 2, "--epochs", 2, "--out-dir", "out"
    for command in (flags, ["--resume", "--out-dir", "out"]):  # within the epoch, and at its end
        with monkeypatch.context() as patch:
            signal_at_step(patch, 1, signal.SIGTERM)
            assert call("train.py", *command)[0] == 128 + signal.SIGTERM
        clock.now += 1000  # nobody trains
    resumed()
    (row,) = checkpoint_of("out")["history"]
    assert (row["seconds"], row["images_per_second"]) == (80, 128 / 80)


def test_time_of_a_row_that_is_made_anew(monkeypatch, cheap):
    fake_clock(monkeypatch)
    trained("--decay constant --steps 6")
    resumed("--steps 8")
    rows = checkpoint_of("out")["history"]
    assert [(row["step"], row["seconds"]) for row in rows] == [(4, 40), (8, 40)]
    assert [row["images_per_second"] for row in rows] == [1.6, 1.6]


# --------------------------------------------------------------------------------------------------
# What may be resumed, and with what


def test_finished_run_has_nothing_to_resume(my_run):
    """One line that names --epochs; flags that repeat the saved settings are no other error."""
    flags = "--lr 0.002 --schedule cosine --blocks 1"
    line = fail("train.py", *TRAIN, *flags.split(), "--resume", "--out-dir", my_run)
    assert "16 steps" in line and "--epochs" in line


@pytest.mark.parametrize(
    "flag, given, saved",
    [
        ("--lr", "0.1", "0.002"),
        ("--batch-size", "32", "16"),
        ("--timesteps", "20", "10"),
        ("--seed", "1", "0"),
        ("--channels", "16 16 16", "[8, 8, 8]"),
        ("--decay", "cosine", "late"),
        ("--schedule", "linear", "cosine"),
        ("--limit", "32", "64"),
        ("--conditional", "", "False"),
    ],
)
def test_resume_with_disagreeing_settings_is_an_error(flag, given, saved, run):
    """It names the flag and both values."""
    line = fail("train.py", "--resume", "--epochs", 6, "--out-dir", run, flag, *given.split())
    assert flag in line and given.replace(" ", ", ") in line
    assert line.endswith(f"to resume: {saved}")


def test_what_may_differ_on_resume(my_run, cheap, monkeypatch):
    """Place, machine and length; the settings of the checkpoint are then the new ones, the default
    place among them."""
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    shutil.move(my_run, "results_d3pm")
    flags = "--epochs 5 --data auto --data-root elsewhere --device cpu --compile --amp "
    flags += "--validate-every 2"
    monkeypatch.setattr(train, "load_dataset", lambda split, *_: load_dataset(split, "offline"))
    succeed("train.py", "--resume", *flags.split())
    settings = checkpoint_of("results_d3pm")["settings"]
    places = [settings[name] for name in ("data", "data_root", "out_dir")]
    assert places == ["auto", "elsewhere", "results_d3pm"]
    assert settings["compile"] is True and settings["amp"] is True and settings["batch_size"] == 16


def test_a_run_stays_with_its_digits(monkeypatch, my_run):
    mnist = dataset.Dataset(torch.zeros(32, 1, 32, 32).byte(), torch.zeros(32).long(), "mnist")
    monkeypatch.setattr(train, "load_dataset", lambda *_: mnist)
    line = fail("train.py", "--resume", "--epochs", 6, "--data", "mnist", "--out-dir", my_run)
    assert "(mnist) differ in source from those that the run was trained on (offline)" in line


def test_resume_of_an_older_run_knows_what_its_settings_meant(cheap, monkeypatch):
    """A run from before there was --optimizer was AdamW's, one from before --decay a cosine's; none
    was augmented. With its levels' old name and no steps per epoch it goes on."""
    monkeypatch.setattr(train, "LONG", 5)
    trained("--optimizer adamw --epochs 4 --limit 16")
    last = Path("out/checkpoints/last.pth")
    old = read_checkpoint(last)
    for part, names in {
        "settings": ("optimizer", "decay", "blocks", "dropout", "augment"),
        "network": ("blocks", "dropout"),
        "diffusion": ("image_shape",),
    }.items():
        for name in names:
            del old[part][name]
    del old["steps_per_epoch"], old["total_steps"]
    old["diffusion"]["num_classes"] = old["diffusion"].pop("num_levels")
    (last.parent / "constant.pth").unlink()
    save_checkpoint(last, old)
    resume = "train.py", "--resume", "--epochs", 5, "--out-dir", "out"
    assert "--optimizer muon disagrees" in fail(*resume, "--optimizer", "muon")
    assert "--decay late disagrees" in fail(*resume, "--decay", "late")
    assert fail(*resume, "--blocks", 2).endswith("resume: the default")
    succeed(*resume)
    new = checkpoint_of("out")
    settings = [new["settings"][name] for name in ("decay", "network", "augment")]
    assert new["step"] == 5 and settings == ["cosine", "unet", 0]
    assert new["history"][-1]["lr"] == pytest.approx(2e-3 * 0.5 * (1 + math.cos(math.pi * 4 / 5)))


def test_resume_does_not_write_into_another_run(my_run):
    """A checkpoint from elsewhere may go on in an empty folder, not in one that holds a run."""
    shutil.copytree(my_run, "other")
    flags = "--resume", "other/checkpoints/last.pth", "--epochs", 6
    assert "holds another run" in fail("train.py", *flags, "--out-dir", my_run)


def test_resume_from_elsewhere_and_through_a_link(my_run, cheap):
    """Into an empty folder; and into its own, called by another name. A checkpoint that is a link
    to another disk is the run's own, by either name."""
    last = my_run / "checkpoints" / "last.pth"
    succeed("train.py", "--resume", last, "--steps", 17, "--out-dir", "new")
    assert checkpoint_of("new")["step"] == 17
    assert [row["epoch"] for row in read_metrics("new")] == list("12345")
    Path("link").symlink_to(my_run)
    disk = Path("disk.pth").resolve()
    shutil.move(last, disk)
    last.symlink_to(disk)
    for steps, source in enumerate(("link/checkpoints/last.pth", last, disk), start=17):
        succeed("train.py", "--resume", source, "--steps", steps, "--out-dir", my_run)
    assert last.is_symlink() and read_checkpoint(disk)["step"] == 19


def test_resume_of_weights_that_do_not_fit(my_run):
    path = my_run / "checkpoints" / "last.pth"
    save_checkpoint(path, read_checkpoint(path) | {"weights": {"nonsense": torch.zeros(1)}})
    path.with_name("constant.pth").unlink()
    assert "does not fit" in fail("train.py", "--resume", path, "--epochs", 6, "--out-dir", my_run)


@pytest.mark.parametrize(
    "key", ["weights", "optimizer", "settings", "step", "loss_sum", "history", "data"]
)
def test_resume_needs_a_whole_run(key, my_run):
    """A checkpoint without the optimizer's state, say, can be drawn from, not resumed."""
    path = my_run / "checkpoints" / "last.pth"
    checkpoint = read_checkpoint(path)
    del checkpoint[key]
    save_checkpoint(path, checkpoint)
    assert "weights only" in fail("train.py", "--resume", path, "--epochs", 6, "--out-dir", my_run)


# --------------------------------------------------------------------------------------------------
# A folder has an owner


@pytest.mark.parametrize("name", ["checkpoints", "metrics.csv"])
def test_used_directory_is_refused(name, my_run):
    """A fresh run does not mix with an old one; checkpoints or metrics alone are enough to tell."""
    for path in my_run.iterdir():
        if path.name not in (name, ".lock"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    line = fail("train.py", *TRAIN, "--epochs", 1, "--out-dir", my_run)
    for word in (str(my_run), "--resume", "--out-dir", "--overwrite"):
        assert word in line


def test_overwrite_deletes_what_a_run_writes_and_nothing_else(my_run, cheap):
    """A stranger's files stay wherever they are; linked folders stay links."""
    strange = {f"{name}notes.txt" for name in ("", "samples/", "checkpoints/")}
    strange |= {"checkpoints/best.pth", "samples/a.png"}
    for folder in ("samples", "checkpoints"):
        shutil.move(my_run / folder, f"elsewhere_{folder}")
        (my_run / folder).symlink_to(Path(f"elsewhere_{folder}").resolve())
    for name in strange:
        (my_run / name).write_text("keep me")
    for name in ("evaluation.json", "nearest.png", "bound_terms.png", "gain.png"):
        (my_run / name).write_text("of the old run")
    trained("--epochs 1 --overwrite", my_run)
    assert (my_run / "samples").is_symlink() and (my_run / "checkpoints").is_symlink()
    written = {"last.pth", "constant.pth", "weights.pth", "model_epoch_1.pth"}
    names = {path.name for path in Path("elsewhere_checkpoints").iterdir()}
    assert names == written | {"notes.txt", "best.pth"}
    names = {path.name for path in Path("elsewhere_samples").iterdir()}
    assert names == {"sample_epoch_1.png", "notes.txt", "a.png"}
    names = {path.name for path in my_run.iterdir() if path.is_file()}
    assert names == {"metrics.csv", "loss_curve.png", "notes.txt", ".lock"}
    assert all((my_run / name).read_text() == "keep me" for name in strange)
    assert [row["epoch"] for row in read_metrics(my_run)] == ["1"]


def test_overwrite_where_there_is_no_run(cheap):
    Path("samples").mkdir()
    Path("samples/notes.txt").write_text("keep me")
    trained("--steps 1 --overwrite", ".")
    assert Path("samples/notes.txt").read_text() == "keep me"


@pytest.mark.parametrize(
    "mistake", ["--limit 8", "--channels 7 7 7", "--data-root nowhere --data mnist"]
)
def test_overwrite_with_a_mistake_keeps_the_old_run(mistake, my_run, monkeypatch):
    def no_mnist(*_):
        raise dataset.DataError("no MNIST")

    monkeypatch.setattr(dataset, "load_mnist", no_mnist)
    fail("train.py", *TRAIN, "--epochs", 1, "--out-dir", my_run, "--overwrite", *mistake.split())


@pytest.mark.parametrize("flags", [[], ["--overwrite"], ["--resume"]])
def test_two_runs_at_once_in_one_folder(flags, my_run):
    """The second is refused in one line, whatever it wants, and has touched nothing."""
    with filelock.FileLock(my_run / ".lock"):
        line = fail("train.py", *TRAIN, "--epochs", 6, "--out-dir", my_run, *flags)
        assert "another run is alive" in line and "--out-dir" in line


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_file_system_without_locks(number, monkeypatch, cheap):
    """A warning, and training goes on."""

    def no_locks(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", no_locks)
    code, _, err = call("train.py", *TRAIN, "--steps", 1, "--out-dir", "out")
    assert code == 0 and "warning: out can't be locked" in err
    assert checkpoint_of("out")["step"] == 1


def test_full_disk_ends_training_with_one_line(monkeypatch, my_run, cheap):
    """A failing save is an error message, and the last good checkpoint is still there to resume."""

    def no_space(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = snapshot(my_run)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", no_space)
        code, _, err = call("train.py", "--resume", "--epochs", 5, "--out-dir", my_run)
    assert code == 1 and "Traceback" not in err
    assert "No space left" in err.splitlines()[-1] and "train.py: error" in err.splitlines()[-1]
    assert snapshot(my_run) == before


def test_loss_is_looked_at_before_a_stop_is_saved(monkeypatch, cheap):
    signal_at_step(monkeypatch, 1, signal.SIGTERM)
    step = Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda *given: step(*given) * math.nan)
    assert call("train.py", *TRAIN, "--epochs", 3, "--out-dir", "out")[0] == 1
    assert not Path("out/checkpoints").exists()
