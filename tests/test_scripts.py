"""The three scripts end to end: what they write, what survives a kill, and how they refuse bad input."""

import csv
import errno
import io
import json
import math
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
import traceback
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import diffusion
import train
from dataset import image_grid, load_digits, to_levels
from diffusion import atomic_write, load_checkpoint, read_checkpoint, save_checkpoint
from evaluate import bound_terms, spread, summarize_bound

REPOSITORY = Path(diffusion.__file__).resolve().parent
FLAGS = "--data offline --limit 64 --batch-size 16 --channels 8 8 8 --timesteps 10 --device cpu"
TRAIN = FLAGS.split()  # 4 steps per epoch
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(autouse=True)
def fresh_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def call(script, *arguments) -> tuple[int, str, str]:
    """Run `python script arguments` inside this process: exit code, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", [str(REPOSITORY / script), *map(str, arguments)])
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code or 0
            if isinstance(code, str):
                print(code, file=err)
                code = 1
        except BaseException:
            traceback.print_exc(file=err)
            code = 1
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return code, out.getvalue(), err.getvalue()


def start(script, *arguments, cwd) -> subprocess.Popen:
    command = [sys.executable, "-u", REPOSITORY / script, *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=cwd, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def succeed(script, *arguments) -> str:
    code, out, err = call(script, *arguments)
    assert code == 0, err
    return out


def fail(script, *arguments) -> str:
    """The last line of stderr of a call that has to fail cleanly and change nothing in the working directory."""
    before = snapshot(Path())
    code, _, err = call(script, *arguments)
    assert code in (1, 2)
    assert "Traceback" not in err
    line = err.strip().splitlines()[-1]
    assert line.startswith(f"{script}: error: ")
    assert snapshot(Path()) == before
    return line


def snapshot(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def same_weights(a, b) -> bool:
    a, b = read_checkpoint(a), read_checkpoint(b)
    return a["step"] == b["step"] and all(
        a[group].keys() == b[group].keys() and all(torch.equal(a[group][k], b[group][k]) for k in a[group])
        for group in ("weights", "averaged_weights")
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The directory of one finished run of four epochs. To be read only."""
    folder = tmp_path_factory.mktemp("run") / "run"
    out = succeed("train.py", *TRAIN, "--epochs", 4, "--out-dir", folder)
    assert f"python sample.py {folder}/checkpoints/model_epoch_4.pth" in out.splitlines()[-1]
    return folder


@pytest.fixture
def my_run(run, tmp_path) -> Path:
    """A copy of that run to do things to."""
    shutil.copytree(run, tmp_path / "run")
    return Path("run")


@pytest.fixture
def cheap(monkeypatch):
    """Training in this process without what takes most of its time here: validation, samples, plot. Same weights."""
    patch = partial(monkeypatch.setattr, diffusion.DiscreteDiffusion)
    patch("variational_bound", lambda self, x_0, *_: torch.ones(len(x_0)))
    patch("reverse_process", lambda self, n, *_: iter([torch.zeros(n, 1, 32, 32, dtype=torch.int64)]))
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: None)


# ---------------------------------------------------------------------------------------------------------------------
# train.py


def read_metrics(folder) -> list[dict]:
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_train_writes_what_it_promises(run):
    """Checkpoints, one sheet of 8x8 samples, the metrics of every epoch, the loss curve; and nothing else."""
    names = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    assert names == {
        "checkpoints/last.pth",
        "checkpoints/model_epoch_4.pth",
        "samples/sample_epoch_4.png",
        "metrics.csv",
        "loss_curve.png",
    }
    rows = read_metrics(run)
    columns = ["epoch", "step", "train_loss", "validation_bound", "lr", "images_per_second", "seconds"]
    assert list(rows[0]) == columns
    assert [(row["epoch"], row["step"]) for row in rows] == [("1", "4"), ("2", "8"), ("3", "12"), ("4", "16")]
    assert all(math.isfinite(float(row[column])) for row in rows for column in columns)
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"]) < 1.0
    with Image.open(run / "samples" / "sample_epoch_4.png") as picture:
        assert picture.size == (2 * (8 * 34 + 2),) * 2
        assert set(np.unique(picture)) == {0, 96, 255}
    with Image.open(run / "loss_curve.png") as picture:
        picture.verify()
    assert same_weights(run / "checkpoints" / "last.pth", run / "checkpoints" / "model_epoch_4.pth")
    for name in ("last.pth", "model_epoch_4.pth"):
        assert read_checkpoint(run / "checkpoints" / name)["epoch"] == 4


def test_interrupted_and_resumed_run_equals_the_straight_one(run, tmp_path):
    """Ctrl-C saves, says how to go on and exits with 130; --resume then ends in bit-identical weights."""
    process = start("train.py", *TRAIN, "--epochs", 4, "--out-dir", "cut", cwd=tmp_path)  # a real process, end to end
    for line in process.stdout:
        if line.startswith("epoch   2/4"):
            process.send_signal(signal.SIGINT)
            break
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130, err
    last = Path("cut") / "checkpoints" / "last.pth"
    (message,) = err.splitlines()
    assert "SIGINT" in message and "--resume" in message and str(last) in message
    assert 8 <= read_checkpoint(last)["step"] < 16

    out = succeed("train.py", "--resume", "--out-dir", "cut")  # everything else comes from the checkpoint
    assert f"Resuming {last}" in out
    assert same_weights(last, run / "checkpoints" / "last.pth")
    for ours, theirs in zip(read_metrics(last.parent.parent), read_metrics(run), strict=True):
        for column in ("epoch", "step", "train_loss", "validation_bound", "lr"):
            assert ours[column] == theirs[column]
    pictures = [folder / "samples" / "sample_epoch_4.png" for folder in (last.parent.parent, run)]
    assert pictures[0].read_bytes() == pictures[1].read_bytes()


def signal_at_step(monkeypatch, at, *signals):
    """Send these signals to this process while step `at` (from 0) computes its loss."""
    loss, calls = diffusion.DiscreteDiffusion.loss, []

    def loss_with_signal(self, *arguments):
        if len(calls) == at:
            for number in signals:
                os.kill(os.getpid(), number)
        calls.append(at)
        return loss(self, *arguments)

    monkeypatch.setattr(diffusion.DiscreteDiffusion, "loss", loss_with_signal)


def test_stop_in_the_middle_of_an_epoch_loses_nothing(run, monkeypatch, cheap):
    """SIGTERM: the step ends, its epoch's loss so far is kept, the exit code is 143; resuming is exact."""
    with monkeypatch.context() as patch:
        signal_at_step(patch, 5, signal.SIGTERM)
        code, _, err = call("train.py", *TRAIN, "--epochs", 4, "--out-dir", "cut")
    assert code == 143
    assert "after step 6 of 16" in err and "--resume" in err and "SIGTERM" in err
    last = Path("cut") / "checkpoints" / "last.pth"
    assert read_checkpoint(last)["step"] == 6
    assert len(read_metrics(Path("cut"))) == 1
    succeed("train.py", "--resume", "--out-dir", "cut")
    assert same_weights(last, run / "checkpoints" / "last.pth")
    assert [row["train_loss"] for row in read_metrics(Path("cut"))] == [row["train_loss"] for row in read_metrics(run)]


def test_muon_goes_on_bit_for_bit(monkeypatch, cheap):
    """Its momentum and AdamW's state both come back from the checkpoint."""
    flags = *TRAIN, "--optimizer", "muon", "--epochs", 2
    succeed("train.py", *flags, "--out-dir", "straight")
    with monkeypatch.context() as patch:
        signal_at_step(patch, 5, signal.SIGTERM)
        call("train.py", *flags, "--out-dir", "cut")
    succeed("train.py", "--resume", "--out-dir", "cut")
    assert same_weights("cut/checkpoints/last.pth", "straight/checkpoints/last.pth")


def test_orthogonalized():
    """Close to U V^T of the singular value decomposition, whatever the shape."""
    torch.manual_seed(0)
    for shape in ((8, 40), (40, 8)):
        matrix = torch.randn(shape)
        U, _, Vh = torch.linalg.svd(matrix, full_matrices=False)
        update = train.orthogonalized(matrix)
        assert (U.T @ update @ Vh.T - torch.eye(8)).abs().max() < 0.35
        assert ((U.T @ update @ Vh.T).diagonal() > 0.65).all()


def test_second_ctrl_c_stops_at_once(monkeypatch):
    """Exit code 130 without a traceback and without waiting for the step or a save."""
    signal_at_step(monkeypatch, 1, signal.SIGINT, signal.SIGINT)
    code, _, err = call("train.py", *TRAIN, "--epochs", 4, "--out-dir", "cut")
    assert code == 130
    assert "Traceback" not in err
    assert not list(Path().rglob("*.pth"))


def test_finished_run_can_be_extended(my_run, cheap):
    """--resume --epochs 6 adds two epochs, keeps the old files and removes what a killed save has left behind."""
    old = read_metrics(my_run)
    leftover = my_run / "checkpoints" / ".last.pth.a1b2c3d4"
    leftover.write_bytes(b"half a checkpoint")
    succeed("train.py", "--resume", "--epochs", 6, "--out-dir", my_run)
    rows = read_metrics(my_run)
    assert rows[:4] == old
    assert [(row["epoch"], row["step"]) for row in rows[4:]] == [("5", "20"), ("6", "24")]
    checkpoints = {path.name for path in (my_run / "checkpoints").iterdir()}
    assert checkpoints == {"last.pth", *(f"model_epoch_{n}.pth" for n in (4, 5, 6))}  # every 5 epochs and at the end
    samples = {path.name for path in (my_run / "samples").iterdir()}
    assert samples == {f"sample_epoch_{n}.png" for n in (4, 5, 6)}
    assert read_checkpoint(my_run / "checkpoints" / "last.pth")["epoch"] == 6


def test_finished_run_has_nothing_to_resume(my_run):
    """One line that names --epochs; flags that repeat the saved settings are no other error."""
    line = fail("train.py", *TRAIN, "--lr", 0.002, "--resume", "--out-dir", my_run)
    assert "16 steps" in line and "--epochs" in line


@pytest.mark.parametrize("name", ["checkpoints", "metrics.csv"])
def test_used_directory_is_refused(name, my_run):
    """A fresh run does not mix with an old one; checkpoints or metrics alone are enough to tell."""
    for path in my_run.iterdir():
        if path.name != name:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    line = fail("train.py", *TRAIN, "--epochs", 1, "--out-dir", my_run)
    for word in (str(my_run), "--resume", "--out-dir", "--overwrite"):
        assert word in line


def test_overwrite_starts_anew(my_run, cheap):
    """The old run is gone, a stranger's file is not."""
    (my_run / "notes.txt").write_text("keep me")
    succeed("train.py", *TRAIN, "--epochs", 1, "--out-dir", my_run, "--overwrite")
    assert {path.name for path in my_run.rglob("*") if path.is_file()} == {
        "last.pth", "model_epoch_1.pth", "sample_epoch_1.png", "metrics.csv", "loss_curve.png", "notes.txt",
    }  # fmt: skip
    assert [row["epoch"] for row in read_metrics(my_run)] == ["1"]


def test_steps_in_place_of_epochs(tmp_path, cheap):
    """It ends where it should, in the middle of an epoch, with all that a run leaves; --epochs can extend it."""
    succeed("train.py", *TRAIN, "--steps", 6, "--out-dir", tmp_path)
    checkpoint = read_checkpoint(tmp_path / "checkpoints" / "model_epoch_2.pth")
    assert checkpoint["step"] == 6 and (tmp_path / "samples" / "sample_epoch_2.png").exists()
    assert [(row["epoch"], row["step"]) for row in read_metrics(tmp_path)] == [("1", "4"), ("2", "6")]
    assert "all its 6 steps" in fail("train.py", "--resume", "--steps", 6, "--out-dir", tmp_path)
    succeed("train.py", "--resume", "--epochs", 2, "--out-dir", tmp_path)
    assert read_checkpoint(tmp_path / "checkpoints" / "last.pth")["step"] == 8
    assert "exclude" in fail("train.py", *TRAIN, "--steps", 6, "--epochs", 2)


def test_two_processes_train_what_one_does(tmp_path, cheap):
    """Same losses, same weights up to rounding; and one process can go on with what two began."""
    flags = *TRAIN, "--conditional", "--epochs", 1
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*torchrun, REPOSITORY / "train.py", *flags, "--out-dir", "two"]
    subprocess.run(list(map(str, command)), cwd=tmp_path, env=ENVIRONMENT, check=True, capture_output=True, timeout=120)
    succeed("train.py", *flags, "--out-dir", tmp_path / "one")
    one, two = (read_checkpoint(tmp_path / name / "checkpoints" / "last.pth") for name in ("one", "two"))
    assert two["history"][0]["train_loss"] == pytest.approx(one["history"][0]["train_loss"], rel=1e-5)
    for name, weight in one["weights"].items():
        assert torch.allclose(two["weights"][name], weight, atol=1e-3), name
    succeed("train.py", "--resume", "--epochs", 2, "--out-dir", tmp_path / "two")
    assert read_checkpoint(tmp_path / "two" / "checkpoints" / "last.pth")["step"] == 8


@pytest.mark.skipif(not Path("/proc").exists(), reason="finds the processes through /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_end_of_one_of_two_processes(number, tmp_path):
    """A killed worker ends the run with a clear message; Ctrl-C on torchrun saves first. The checkpoint is whole."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*torchrun, str(REPOSITORY / "train.py"), *TRAIN, "--epochs", "100000", "--out-dir", "two"]
    process = subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    last = tmp_path / "two" / "checkpoints" / "last.pth"
    deadline = time.monotonic() + 60
    while not last.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(workers[1]) if number == signal.SIGKILL else process.pid, number)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    if number == signal.SIGKILL:
        assert "train.py: error: process 0:" in err or "Stopped by SIGTERM" in err
    else:
        assert "Stopped by SIGINT" in err
    assert read_checkpoint(last)["step"] > 0


def test_a_batch_that_processes_cannot_share(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "16 can't be shared equally by 3" in fail("train.py", *TRAIN)


def test_amp_stays_close(tmp_path, cheap):
    """bfloat16 moves the loss by its rounding, not more; the checkpoint is an ordinary one."""
    losses = []
    for flags in ([], ["--amp"]):
        succeed("train.py", *TRAIN, "--epochs", 1, "--out-dir", tmp_path / f"run{len(flags)}", *flags)
        losses.append(float(read_metrics(tmp_path / f"run{len(flags)}")[0]["train_loss"]))
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=0.02)
    load_checkpoint(tmp_path / "run1" / "checkpoints" / "last.pth")


@pytest.mark.parametrize("mistake", ["--limit 8", "--channels 7 7 7"])
def test_overwrite_with_a_mistake_keeps_the_old_run(mistake, my_run):
    fail("train.py", *TRAIN, "--epochs", 1, "--out-dir", my_run, "--overwrite", *mistake.split())


@pytest.mark.parametrize("flag, given, saved", [
    ("--lr", "0.1", "0.002"),
    ("--batch-size", "32", "16"),
    ("--timesteps", "20", "10"),
    ("--seed", "1", "0"),
    ("--channels", "16 16 16", "[8, 8, 8]"),
])  # fmt: skip
def test_resume_with_disagreeing_settings_is_an_error(flag, given, saved, my_run):
    """It names the flag and both values."""
    line = fail("train.py", "--resume", "--epochs", 6, "--out-dir", my_run, flag, *given.split())
    assert flag in line and given.replace(" ", ", ") in line and saved in line


def test_resume_prefers_last_to_what_was_touched_later(my_run, cheap):
    """Copying or syncing a run changes the times of its files, not which is the newest."""
    later = my_run / "checkpoints" / "last.pth"
    checkpoint = read_checkpoint(later)
    os.utime(my_run / "checkpoints" / "model_epoch_4.pth")
    out = succeed("train.py", "--resume", "--epochs", 5, "--out-dir", my_run)
    assert "last.pth" in out.splitlines()[0] and read_checkpoint(later)["step"] == checkpoint["step"] + 4


def test_resume_of_an_older_run_knows_what_its_settings_meant(my_run):
    """A run from before there was --optimizer was AdamW's."""
    last = my_run / "checkpoints" / "last.pth"
    checkpoint = read_checkpoint(last)
    del checkpoint["settings"]["optimizer"]
    save_checkpoint(last, checkpoint)
    flags = "--epochs", 5, "--out-dir", my_run
    assert "--optimizer muon disagrees" in fail("train.py", "--resume", "--optimizer", "muon", *flags)


def test_resume_does_not_write_into_another_run(my_run):
    """A checkpoint from elsewhere may go on in an empty folder, not in one that holds a run."""
    shutil.copytree(my_run, "other")
    line = fail("train.py", "--resume", "other/checkpoints/last.pth", "--epochs", 6, "--out-dir", my_run)
    assert "holds another run" in line


def test_resume_of_weights_that_do_not_fit(my_run):
    path = my_run / "checkpoints" / "last.pth"
    checkpoint = read_checkpoint(path)
    checkpoint["weights"] = {"nonsense": torch.zeros(1)}
    save_checkpoint(path, checkpoint)
    assert "does not fit" in fail("train.py", "--resume", "--epochs", 6, "--out-dir", my_run)


def test_resume_needs_a_whole_run(my_run):
    """A checkpoint without the optimizer's state can be sampled from, not resumed."""
    path = my_run / "checkpoints" / "last.pth"
    checkpoint = read_checkpoint(path)
    del checkpoint["optimizer"]
    save_checkpoint(path, checkpoint)
    assert "weights only" in fail("train.py", "--resume", "--epochs", 6, "--out-dir", my_run)
    succeed("sample.py", path, "--n", 1, "--device", "cpu")


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def save_forever(path):
    for i in range(10**9):
        save_checkpoint(path, fake_checkpoint(i))


def fake_checkpoint(i):
    return {"network": {}, "diffusion": {}, "averaged_weights": torch.full((500_000,), float(i)), "step": i}


def test_kill_9_never_damages_a_checkpoint():
    """A process that saves over and over is killed at twelve moments: the file is always one whole checkpoint."""
    path = Path("last.pth")
    save_checkpoint(path, fake_checkpoint(-1))
    rng = np.random.default_rng(0)
    steps = []
    for _ in range(12):
        writer = multiprocessing.get_context("fork").Process(target=save_forever, args=(path,))
        before = path.stat().st_mtime_ns
        writer.start()
        while path.stat().st_mtime_ns == before and writer.is_alive():
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.03))  # a save takes about 5 ms
        writer.kill()
        writer.join()
        assert writer.exitcode == -signal.SIGKILL
        checkpoint = read_checkpoint(path)
        assert (checkpoint["averaged_weights"] == checkpoint["step"]).all()
        steps.append(checkpoint["step"])
    assert max(steps) > 0


class NoSpace(OSError):
    def __init__(self, *_):
        super().__init__(errno.ENOSPC, os.strerror(errno.ENOSPC))


def raise_no_space(*_):
    raise NoSpace


@pytest.mark.parametrize("function", ["fsync", "chmod", "replace"])
def test_failing_save_keeps_the_old_checkpoint(function, monkeypatch):
    """Whatever step of the write fails, the old file stays and no temporary file is left."""
    path = Path("checkpoints") / "last.pth"
    save_checkpoint(path, fake_checkpoint(1))
    before = snapshot(Path())
    with monkeypatch.context() as patch:
        patch.setattr(os, function, raise_no_space)
        with pytest.raises(NoSpace):
            save_checkpoint(path, fake_checkpoint(2))
    assert snapshot(Path()) == before
    save_checkpoint(path, fake_checkpoint(3))
    assert read_checkpoint(path)["step"] == 3


@pytest.mark.parametrize("error", [NoSpace, KeyboardInterrupt, ValueError])
def test_failing_block_of_atomic_write(error):
    """The same when the block itself fails after half of the bytes; and a new path stays absent."""
    Path("old").write_bytes(b"old")
    for name in ("old", "new"):
        with pytest.raises(error), atomic_write(name) as file:
            file.write(b"half" * 10_000)
            raise error
    assert snapshot(Path()) == {Path("old"): b"old"}
    with atomic_write("new") as file:
        file.write(b"whole")
    assert snapshot(Path()) == {Path("old"): b"old", Path("new"): b"whole"}


def test_full_disk_ends_training_with_one_line(monkeypatch, my_run, cheap):
    """A failing save is an error message, and the last good checkpoint is still there to resume."""
    before = read_checkpoint(my_run / "checkpoints" / "last.pth")["step"]
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", raise_no_space)
        code, _, err = call("train.py", "--resume", "--epochs", 5, "--out-dir", my_run)
    assert code == 1 and "Traceback" not in err
    assert "No space left" in err.splitlines()[-1] and "train.py: error" in err.splitlines()[-1]
    assert read_checkpoint(my_run / "checkpoints" / "last.pth")["step"] == before


@pytest.mark.parametrize("arguments, states, levels", [
    ("--transition absorbing", 3, 2),
    ("--transition absorbing --levels 4 --loss variational --schedule cosine", 5, 4),
    ("--transition gaussian --levels 4 --timesteps 20", 4, 4),
    ("--loss variational --binarize dynamic", 2, 2),
    ("--loss hybrid --hybrid-weight 0.5 --schedule mutual_info", 2, 2),
])  # fmt: skip
def test_design_choices_end_to_end(arguments, states, levels):
    """One short epoch, then digits and an animation from nothing but the checkpoint."""
    flags = [*TRAIN, *arguments.split(), "--epochs", 1, "--out-dir", "out"]
    succeed("train.py", *flags)
    d = diffusion.load_checkpoint("out/checkpoints/last.pth")
    assert (d.num_states, d.num_classes) == (states, levels)
    succeed("sample.py", "out/checkpoints/last.pth", "--n", 2, "--out", "a.png", "--save-tensor", "a.pt")
    assert torch.load("a.pt").max() < levels
    with Image.open("a.png") as picture:
        grey = set(np.linspace(0, 255, levels).round().astype(int))
        assert set(np.unique(picture)) <= grey | {96}
    succeed("visualize_denoising.py", "out/checkpoints/last.pth", "--n", 2, "--out", "a.gif")


def test_conditional_run(monkeypatch):
    """The network is told the labels, except one in ten; the checkpoint draws with a class, guided, and without.

    By default in 50 steps, and guided by 0.25 where there is a class.
    """
    told, loss = [], diffusion.DiscreteDiffusion.loss

    def spy(self, x_0, t, u, y):
        told.append(y)
        return loss(self, x_0, t, u, y)

    monkeypatch.setattr(diffusion.DiscreteDiffusion, "loss", spy)
    succeed("train.py", *TRAIN, "--limit", 320, "--timesteps", 60, "--conditional", "--epochs", 1, "--out-dir", "out")
    told = torch.cat(told)
    assert len(told) == 320 and set(told.tolist()) == set(range(-1, 10))
    assert 0.04 < (told == -1).double().mean() < 0.17
    drawn = {}
    for flags in ("", "--first 3", "--digit 3", "--guidance 2 --timesteps 5", "--digit 3 --guidance 0 --timesteps 5",
                  "--digit none --timesteps 5"):  # fmt: skip
        last = "out/checkpoints/last.pth", "--save-tensor", "a.pt", "--out", "a.png"
        succeed("sample.py", *last, "--n", 4, *flags.split())
        drawn[flags] = torch.load("a.pt")
    assert torch.equal(drawn[""][3], drawn["--digit 3"][3])  # by default image i is of class i mod 10
    assert torch.equal(drawn[""][3], drawn["--first 3"][0])
    d = load_checkpoint("out/checkpoints/last.pth")
    with Image.open("out/samples/sample_epoch_1.png") as picture:
        row = np.asarray(image_grid(d.sample(8, y=d.classes(8)), columns=8))[:-4]  # less the border below
        assert np.array_equal(np.asarray(picture)[: len(row)], row)
    threes, few = torch.full((4,), 3), d.respaced(5)
    assert torch.equal(drawn["--digit 3"], d.respaced(50).sample(4, y=threes, guidance=0.25))
    assert torch.equal(drawn["--guidance 2 --timesteps 5"], few.sample(4, y=d.classes(4), guidance=2))
    assert torch.equal(drawn["--digit 3 --guidance 0 --timesteps 5"], few.sample(4, y=threes))
    assert torch.equal(drawn["--digit none --timesteps 5"], few.sample(4))
    succeed("visualize_denoising.py", "out/checkpoints/last.pth", "--n", 4, "--timesteps", 50)
    with Image.open("denoising_process.gif") as gif:
        gif.seek(50)
        assert np.array_equal(np.asarray(gif.convert("L"))[24:], image_grid(drawn[""]))
    flags = ["--data", "offline", "--images", "2", "--repeats", "1", "--num-samples", "20", "--timesteps", "2"]
    assert "of these classes" in succeed("evaluate.py", "out/checkpoints/last.pth", *flags)
    report = json.loads(Path("out/evaluation.json").read_text())
    even = report["training_digits_of_these_classes"]
    assert even["images"] == 20
    assert even["class_histogram"] == pytest.approx([0.1] * 10, abs=0.051)  # a digit may be misread
    flags = "--digit 0123456789 --n 3 --timesteps 2 --out rows.png"
    succeed("sample.py", "out/checkpoints/last.pth", *flags.split())
    with Image.open("rows.png") as picture:
        assert picture.size == (2 * (3 * 34 + 2), 2 * (10 * 34 + 2))


# ---------------------------------------------------------------------------------------------------------------------
# sample.py and visualize_denoising.py


def test_sample_writes_picture_and_tensor(run):
    """The default name, the digits {0, 1} as uint8 [n, 1, 32, 32], and a picture of exactly these digits."""
    checkpoint = run / "checkpoints" / "model_epoch_4.pth"
    out = succeed("sample.py", checkpoint, "--n", 5, "--save-tensor", "new/digits.pt", "--device", "cpu")
    assert out.splitlines() == ["Wrote d3pm_generated_samples_model_epoch_4.png", "Wrote new/digits.pt"]
    digits = torch.load("new/digits.pt", weights_only=True)
    assert digits.shape == (5, 1, 32, 32) and digits.dtype == torch.uint8
    assert set(digits.unique().tolist()) == {0, 1}
    with Image.open("d3pm_generated_samples_model_epoch_4.png") as picture:
        assert picture.format == "PNG"
        assert np.array_equal(picture, image_grid(digits))
    assert {path.name for path in Path().rglob("*") if path.is_file()} == {
        "d3pm_generated_samples_model_epoch_4.png",
        "digits.pt",
    }


def test_both_outputs_are_checked_before_the_work(run, monkeypatch):
    monkeypatch.setattr(diffusion.DiscreteDiffusion, "sample", lambda *_, **__: pytest.fail("sampled for nothing"))
    checkpoint = run / "checkpoints" / "model_epoch_4.pth"
    Path("file").write_text("")
    assert "can't write" in fail("sample.py", checkpoint, "--out", "a.png", "--save-tensor", "file/a.pt")
    assert "the same file" in fail("sample.py", checkpoint, "--out", "a.png", "--save-tensor", "a.png")


def test_output_through_links_and_special_files(run):
    """A symbolic link is followed; a pipe is refused rather than replaced."""
    checkpoint = run / "checkpoints" / "model_epoch_4.pth"
    Path("link.png").symlink_to("target.png")
    succeed("sample.py", checkpoint, "--n", 1, "--out", "link.png", "--device", "cpu")
    assert Path("link.png").is_symlink() and Path("target.png").stat().st_size > 0
    with pytest.raises(OSError, match="not a regular file"), atomic_write("/dev/null"):
        pass


def test_sample_image_i_does_not_depend_on_the_call(run):
    """--n, --first and --batch-size choose which images are drawn, not what they look like; --seed does."""
    checkpoint = run / "checkpoints" / "last.pth"

    def draw(*arguments):
        succeed("sample.py", checkpoint, *arguments, "--out", "x.png", "--save-tensor", "x.pt", "--device", "cpu")
        return torch.load("x.pt", weights_only=True)

    sheet = draw("--n", 7)
    assert len(sheet.unique(dim=0)) == 7
    assert torch.equal(draw("--n", 7, "--batch-size", 3), sheet)
    assert torch.equal(draw("--n", 2, "--first", 5), sheet[5:])
    assert not torch.equal(draw("--n", 1, "--seed", 1), sheet[:1])


def test_gif_shows_the_whole_reverse_process(run):
    """T + 1 frames that loop, the last one held; it shows the digits that sample.py draws with the same seed."""
    checkpoint = run / "checkpoints" / "last.pth"
    out = succeed("visualize_denoising.py", checkpoint, "--timesteps", 10, "--n", 4, "--fps", 10, "--device", "cpu")
    assert out.splitlines() == ["Wrote denoising_process.gif"]
    succeed("sample.py", checkpoint, "--n", 4, "--save-tensor", "x.pt", "--device", "cpu")
    digits = image_grid(torch.load("x.pt", weights_only=True))
    with Image.open("denoising_process.gif") as gif:
        assert gif.n_frames == 11
        assert gif.info["loop"] == 0  # for ever
        durations, frames = [], []
        for i in range(gif.n_frames):
            gif.seek(i)
            durations.append(gif.info["duration"])
            frames.append(np.asarray(gif.convert("L")))
    assert durations[:-1] == [100] * 10 and durations[-1] >= 1000
    assert np.array_equal(frames[-1][-digits.height :], digits)
    assert not np.array_equal(frames[0][-digits.height :], digits)


def test_evaluation_end_to_end():
    """The bound in the report is the mean over binarizations drawn anew, the samples are those of sample.py."""
    last = "out/checkpoints/last.pth"
    succeed("train.py", *TRAIN, "--binarize", "dynamic", "--epochs", 1, "--out-dir", "out")
    flags = "--data offline --images 30 --binarizations 3 --num-samples 20 --repeats 2 --device cpu"
    out = succeed("evaluate.py", last, *flags.split())
    report = json.loads(Path("out/evaluation.json").read_text())
    d, grey = load_checkpoint(last), spread(load_digits("validation", "offline").images, 30)
    means = []
    for seed in range(3):
        x_0 = to_levels(grey, 2, "dynamic", torch.Generator().manual_seed(seed))
        means.append(summarize_bound(bound_terms(d, x_0, 2, "cpu", seed=seed))["nats_per_image"])
    bound = report["bound"]
    assert len(set(means)) == 3
    assert bound["nats_per_image"] == pytest.approx(np.mean(means))
    assert bound["standard_error_over_binarizations"] == pytest.approx(np.std(means, ddof=1) / math.sqrt(3))
    assert f"{bound['nats_per_image']:.2f}" in out and "offline validation digits" in out
    assert report["samples"]["ink"] == pytest.approx(d.sample(20).double().mean().item())
    for name in ("bound_terms.png", "nearest.png"):
        Image.open(f"out/{name}").verify()


def test_binarizations_of_digits_that_have_one(run):
    assert "not drawn at random" in fail("evaluate.py", run / "checkpoints" / "last.pth", "--binarizations", 2)


def test_no_labels_of_a_checkpoint_without(run):
    assert "without classes" in fail("evaluate.py", run / "checkpoints" / "last.pth", "--no-labels")
    assert "without classes" in fail("evaluate.py", run / "checkpoints" / "last.pth", "--guidance", 1)


@pytest.mark.parametrize("script", ["sample.py", "visualize_denoising.py", "evaluate.py"])
@pytest.mark.parametrize("timesteps", [11, 0])
def test_timesteps_that_training_did_not_have_are_an_error(script, timesteps, run):
    line = fail(script, run / "checkpoints" / "last.pth", "--timesteps", timesteps)
    assert "1..10" in line and str(timesteps) in line


def test_fewer_timesteps(run):
    """The animation shows the respaced chain, by its original t, and ends in what sample.py draws with it."""
    checkpoint = run / "checkpoints" / "last.pth"
    flags = "--timesteps", 5, "--n", 4, "--device", "cpu"
    succeed("visualize_denoising.py", checkpoint, *flags)
    succeed("sample.py", checkpoint, *flags, "--save-tensor", "x.pt")
    images = torch.load("x.pt", weights_only=True)
    assert torch.equal(images, load_checkpoint(checkpoint).respaced(5).sample(4))
    with Image.open("denoising_process.gif") as gif:
        assert gif.n_frames == 6
        gif.seek(5)
        assert np.array_equal(np.asarray(gif.convert("L"))[24:], image_grid(images))


@pytest.mark.parametrize("script", ["sample.py", "visualize_denoising.py"])
def test_without_a_checkpoint_the_released_one_is_used(script, run, monkeypatch):
    """And the script says so."""
    monkeypatch.setattr(diffusion, "RELEASED", run / "checkpoints" / "last.pth")
    out = succeed(script, "--n", 2)
    assert out.splitlines()[0] == f"Using the released model, {diffusion.RELEASED}"


# ---------------------------------------------------------------------------------------------------------------------
# Bad input: a non-zero exit, one line that says "error", no traceback, no file


@pytest.fixture(scope="module")
def bad_files_once(run, tmp_path_factory) -> Path:
    """A directory of things that are not checkpoints; and a good one."""
    folder = tmp_path_factory.mktemp("bad")
    good = (run / "checkpoints" / "last.pth").read_bytes()
    (folder / "good.pth").write_bytes(good)
    (folder / "cut.pth").write_bytes(good[: len(good) // 2])
    (folder / "noise.pth").write_bytes(np.random.default_rng(0).bytes(5000))
    (folder / "empty.pth").touch()
    (folder / "folder").mkdir()
    torch.save({"weights": torch.zeros(3)}, folder / "other.pth")
    torch.save(torch.zeros(3), folder / "tensor.pth")
    checkpoint = read_checkpoint(folder / "good.pth")
    checkpoint["network"]["channels"] = [16, 8, 8]
    torch.save(checkpoint, folder / "misfit.pth")
    return folder


@pytest.fixture
def bad_files(bad_files_once, tmp_path):
    """The same in the working directory."""
    shutil.copytree(bad_files_once, tmp_path, dirs_exist_ok=True)


@pytest.mark.parametrize("name", ["nowhere", "folder", "cut.pth", "noise.pth", "empty.pth", "other.pth", "tensor.pth"])
@pytest.mark.parametrize("script", ["train.py", "sample.py", "visualize_denoising.py"])
def test_bad_checkpoint(script, name, bad_files):
    """The message names the file."""
    arguments = [*TRAIN, "--epochs", 5, "--out-dir", "out", "--resume"] if script == "train.py" else []
    assert name in fail(script, *arguments, name)


@pytest.mark.parametrize("script", ["sample.py", "visualize_denoising.py"])
def test_checkpoint_whose_weights_do_not_fit(script, bad_files):
    assert "misfit.pth does not fit" in fail(script, "misfit.pth")


@pytest.mark.parametrize("arguments", [
    "--epochs 0",
    "--epochs -1",
    "--epochs two",
    "--batch-size 0",
    "--batch-size 65",
    "--timesteps 0",
    "--limit 0",
    "--limit 5000",
    "--lr -1",
    "--lr 0",
    "--lr nan",
    "--lr inf",
    "--seed -1",
    "--device nonsense",
    "--channels 7 7 7",
    "--channels 8 8 12",
    "--channels 8 8",
    "--network plain",  # with --channels
    "--label-dropout 0.5",  # without --conditional
    "--conditional --label-dropout 1.5",
    "--optimizer sgd",
    "--network big",
    "--schedule sine",
    "--transition nonsense",
    "--transition gaussian",  # with two levels
    "--transition gaussian --levels 4 --timesteps 2",
    "--transition gaussian --levels 4 --schedule cosine",
    "--transition absorbing --schedule linear",
    "--loss nonsense",
    "--loss hybrid --hybrid-weight -1",
    "--levels 1",
    "--levels 257",
    "--levels 4 --binarize dynamic",
    "--binarize nonsense",
    "--data fashion",
    "--resume",
    "--resume good.pth --overwrite",
    "--out-dir good.pth",
    "--out-dir good.pth/out",
    "--nonsense",
    "nonsense",
])  # fmt: skip
def test_bad_input_to_train(arguments, bad_files):
    fail("train.py", *TRAIN, "--epochs", 1, "--out-dir", "out", *arguments.split())


@pytest.mark.parametrize("arguments", [
    "good.pth --n 0",
    "good.pth --n -1",
    "good.pth --n many",
    "good.pth --seed -1",
    "good.pth --device nonsense",
    "good.pth --out digits.jpg",
    "good.pth --out digits",
    "good.pth --out folder",
    "good.pth --out cut.pth/digits.SUFFIX",
    "good.pth --out cut.pth/deeper/digits.SUFFIX",
    "good.pth nonsense",
])  # fmt: skip
@pytest.mark.parametrize("script", ["sample.py", "visualize_denoising.py"])
def test_bad_input_to_both_samplers(script, arguments, bad_files):
    fail(script, *arguments.replace("SUFFIX", "png" if script == "sample.py" else "gif").split())


@pytest.mark.parametrize("arguments", [
    "--batch-size 0",
    "--first -1",
    "--save-tensor folder",
    "--digit 12",
    "--digit x",
    "--digit 3",  # the checkpoint is unconditional
    "--guidance 1",
    "--digit 3 --guidance -1",
    "--digit none --guidance 1",
])  # fmt: skip
def test_bad_input_to_sample(arguments, bad_files):
    fail("sample.py", "good.pth", *arguments.split())


@pytest.mark.parametrize("arguments", ["--fps 0", "--fps nan", "--fps 1000", "--n 257"])
def test_bad_input_to_visualize(arguments, bad_files):
    fail("visualize_denoising.py", "good.pth", *arguments.split())


@pytest.mark.parametrize("script, suffix", [("sample.py", "png"), ("visualize_denoising.py", "gif")])
def test_unwritable_folder(script, suffix, bad_files):
    folder = Path("locked")
    folder.mkdir(mode=0o500)
    if os.access(folder, os.W_OK):
        pytest.skip("this user may write everywhere")
    assert "ermission denied" in fail(script, "good.pth", "--out", folder / f"digits.{suffix}")


def test_bad_input_to_a_real_process(tmp_path):
    """What `call` emulates, once for real: exit code 1 and a single line on stderr."""
    process = start("sample.py", "nowhere.pth", cwd=tmp_path)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 1 and out == ""
    (line,) = err.splitlines()
    assert line.startswith("sample.py: error: ") and "nowhere.pth" in line
    assert not list(tmp_path.iterdir())
