"""Atomic writes under all conditions; checkpoints load as saved or are rejected."""

import errno
import fcntl
import json
import math
import multiprocessing
import os
import signal
import stat
from pathlib import Path

from cli import UserError

import numpy as np
import pytest
import torch
from scripts import REPOSITORY, snapshot, untrained

import checkpoint
from checkpoint import (
    RunFolder,
    atomic_write,
    atomic_writes,
    build_diffusion,
    default_last_step,
    json_bytes,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
    write_json,
)
from diffusion import DiscreteDiffusion
from model import UNet
from trajectories import respaced

pytestmark = pytest.mark.usefixtures("fresh_directory")


# --------------------------------------------------------------------------------------------------
# Atomic writes


def failing(number, at=0, function=lambda *_: None):
    """Make a system call fail with this errno, always or only at call number `at`."""
    calls = []

    def call(*args):
        calls.append(args)
        if at in (0, len(calls)):
            raise OSError(number, os.strerror(number))
        return function(*args)

    return call


def files_below(folder) -> set[str]:
    return {str(path) for path in Path(folder).rglob("*") if path.is_file()}


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, ValueError])
def test_failing_block_writes_nothing(error):
    """Old files are unchanged, new ones absent, and no temporary file remains."""
    Path("old").write_bytes(b"old")
    with pytest.raises(error), atomic_writes("old", "new") as files:
        for file in files:
            file.write(b"half" * 10_000)
        raise error
    assert snapshot(Path()) == {Path("old"): b"old"}
    names = ["old", "new", "deep/er/new"]
    with atomic_writes(*names) as files:
        for name, file in zip(names, files, strict=True):
            file.write(name.encode() * 2)
        assert Path("old").read_bytes() == b"old" and not Path("new").exists()
    assert files_below(".") == set(names)
    assert all(Path(name).read_bytes() == name.encode() * 2 for name in names)


@pytest.mark.parametrize("function", ["open", "fsync", "replace"])
@pytest.mark.parametrize("at", [1, 2])
def test_failing_end_writes_none_of_several(function, at, monkeypatch):
    """A full disk at the second file prevents the first, too; the error names the full one."""
    for name in ("a", "b"):
        Path(name).write_bytes(b"old")
    where, real = (os, getattr(os, function)) if function != "open" else (checkpoint, open)
    monkeypatch.setattr(where, function, failing(errno.ENOSPC, at, real), raising=False)
    words = f"^can't write .*/{' ab'[at]}: No space left on device$"
    with pytest.raises(OSError, match=words), atomic_writes("a", "b") as files:
        for file in files:
            file.write(b"new")
    # No file system renames two files at once.
    a = b"new" if (function, at) == ("replace", 2) else b"old"
    assert snapshot(Path()) == {Path("a"): a, Path("b"): b"old"}


@pytest.mark.parametrize("name", ["n" * 255, "é" * 127, "n" * 251 + ".pth"])
def test_names_of_all_lengths(name):
    with atomic_write(name) as file:
        file.write(b"1")
    assert snapshot(Path()) == {Path(name): b"1"}


def test_outputs_that_cannot_be_written_are_known_before_the_block():
    Path("file").touch()
    Path("folder").mkdir()
    os.mkfifo("pipe")
    irregular = "it is not a regular file"
    for name, words in (
        ("file/x", "Not a directory|File exists"),
        *((name, irregular) for name in ("folder", "/", "/dev/null", "pipe")),
    ):
        words = f"^can't write .*{Path(name).name}: ({words})$"
        with pytest.raises(OSError, match=words), atomic_writes("first", name):
            pytest.fail("began the work")
    with pytest.raises(OSError, match="File name too long"), atomic_writes("first", "n" * 256):
        pytest.fail("began the work")
    assert {path.name for path in Path().iterdir()} == {"file", "folder", "pipe"}


def test_data_reach_the_disk_before_the_rename(monkeypatch):
    done, fsync, replace = [], os.fsync, os.replace

    def watched_fsync(descriptor):
        done.append(("fsync", os.fstat(descriptor).st_size))
        fsync(descriptor)

    def watched_replace(source, target):
        done.append((Path(source).stat().st_size, target.name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    with atomic_writes("a", "b") as (a, b):
        a.write(b"1")
        b.write(b"22")
    assert done == [("fsync", 1), ("fsync", 2), (1, "a"), (2, "b")]


@pytest.mark.parametrize("exists", [True, False])
def test_two_names_of_one_file(exists, tmp_path):
    """Through another spelling, a symbolic link, a linked folder or a hard link."""
    if exists:
        Path("x").write_bytes(b"old")
        os.link("x", "hard")
    Path("link").symlink_to("x")
    Path("up").symlink_to(tmp_path)
    names = ["x", "./x", tmp_path / "x", "folder/../x", "link", "up/x"]
    names += ["hard"] if exists else []
    for other in names:
        for use, outputs, inputs in (
            ("written", ["x", "y", other], []),
            ("read", ["y", other], ["x"]),
            ("read", ["x"], ["y", other]),
        ):
            with (
                pytest.raises(UserError, match=f"the same file is {use}"),
                atomic_writes(*outputs, inputs=inputs),
            ):
                pytest.fail("began the work")
    with atomic_writes("y", "z", inputs=["x"]) as (_, _):
        pass


def test_links_are_followed(monkeypatch, tmp_path):
    """And ~ is the home folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    Path("folder").mkdir()
    Path("link").symlink_to("folder/target")
    for content in (b"1", b"2"):
        with atomic_write("~/link") as file:
            file.write(content)
        assert Path("link").is_symlink() and Path("folder/target").read_bytes() == content
    assert files_below(".") == {"link", "folder/target"}


def test_modes(monkeypatch):
    """New files follow the umask, replaced ones keep their mode; a FAT stick has none."""
    Path("old").touch()
    os.chmod("old", 0o604)
    before = os.umask(0o027)
    try:
        with atomic_writes("old", "new"):
            pass
    finally:
        os.umask(before)
    modes = [stat.S_IMODE(Path(name).stat().st_mode) for name in ("old", "new")]
    assert modes == [0o604, 0o640]
    monkeypatch.setattr(os, "chmod", failing(errno.EPERM))
    with atomic_write("old") as file:
        file.write(b"new")
    assert Path("old").read_bytes() == b"new"


def test_json():
    """Infinities and NaN become strings, for any JSON reader; provenance comes first."""
    value = {"a": [1, 2.5, math.inf, (-math.inf,)], "b": {"c": math.nan, 3: None}}
    write_json("x.json", value | {"p": Path("x"), "é": True})

    def refuse(constant):
        pytest.fail(f"{constant} is no JSON")

    read = json.loads(Path("x.json").read_bytes(), parse_constant=refuse)
    assert next(iter(read)) == "provenance" and read.pop("provenance")["torch"] == torch.__version__
    written = {"a": [1, 2.5, "inf", ["-inf"]], "b": {"c": "nan", "3": None}}
    assert read == written | {"p": "x", "é": True}
    assert json_bytes(value).endswith(b"}\n")


# --------------------------------------------------------------------------------------------------
# Saving


def fake_checkpoint(i):
    weights = {"w": torch.full((500_000,), float(i))}
    return {"network": {}, "diffusion": {}, "averaged_weights": weights, "step": i}


def state_of(network, diffusion):
    """The parts of a checkpoint that loading needs."""
    state = {"network": network.config, "diffusion": diffusion.config}
    return state | {"averaged_weights": network.state_dict()}


def step_of(path) -> int:
    """The step of a fake checkpoint, after checking that it is complete."""
    state = read_checkpoint(path)
    assert (state["averaged_weights"]["w"] == state["step"]).all()
    return state["step"]


def save_and_die(path, where, when):
    """Save to `path`, but be killed before or after the first call of os.`where`."""
    real = getattr(os, where)

    def deadly(*args):
        if when == "after":
            real(*args)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(os, where, deadly)
    save_checkpoint(path, fake_checkpoint(2))


STAGES = [("fsync", "before", 1), ("fsync", "after", 1)]
STAGES += [("replace", "before", 1), ("replace", "after", 2)]


@pytest.mark.parametrize("where, when, step", STAGES)
def test_kill_9_at_each_stage_of_a_save(where, when, step):
    """The file is the complete old one or the complete new one."""
    path = Path("last.pth")
    save_checkpoint(path, fake_checkpoint(1))
    fork = multiprocessing.get_context("fork")
    child = fork.Process(target=save_and_die, args=(path, where, when))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert step_of(path) == step
    save_checkpoint(path, fake_checkpoint(3))
    assert step_of(path) == 3


@pytest.mark.parametrize("value", [np.int64(20), np.float64(0.5), Path("x"), len])
def test_unreadable_checkpoints_are_not_saved(value):
    """The old file stays, and the message names the new one."""
    save_checkpoint("x.pth", fake_checkpoint(1))
    before = snapshot(Path())
    with pytest.raises(ValueError, match=r"x\.pth: this checkpoint could not be read back"):
        save_checkpoint("x.pth", fake_checkpoint(2) | {"value": value})
    assert snapshot(Path()) == before


def test_numbers_of_numpy_in_a_diffusion_can_be_saved():
    network = UNet(channels=(8, 8, 8))
    d = DiscreteDiffusion(network, np.int64(2), np.int64(20), hybrid_weight=np.float64(0.5))
    save_checkpoint("x.pth", state_of(network, d))
    assert load_checkpoint("x.pth").timesteps == 20


# --------------------------------------------------------------------------------------------------
# Loading


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The checkpoint of a small network. Read-only."""
    path = tmp_path_factory.mktemp("saved") / "x.pth"
    untrained(path, 10, weights={"fold.weight": torch.zeros(1)})
    return path


def test_save_and_load(saved):
    """Loads the averaged weights in eval mode, with the diffusion's settings."""
    d, state = load_checkpoint(saved), read_checkpoint(saved)
    assert not d.training and d.timesteps == 10 and d.config == state["diffusion"]
    assert d.model.state_dict().keys() == state["averaged_weights"].keys()
    for name, weight in d.model.state_dict().items():
        assert torch.equal(weight, state["averaged_weights"][name])
    assert load_checkpoint(saved, "cpu", 5).timesteps == 5
    with pytest.raises(UserError, match=r"1\.\.10"):
        load_checkpoint(saved, timesteps=11)
    assert next(load_checkpoint(saved, "meta").parameters()).device.type == "meta"


def test_the_default_of_the_last_step():
    for reverse, choice in (("mixture", "mode"), ("joint", "draw")):
        d = DiscreteDiffusion(UNet(channels=(8, 8, 8)), 2, 4, reverse=reverse)
        assert default_last_step(d) == choice


def test_own_transition_matrices_and_respacing_are_kept():
    """Q with more states than levels, and the t that the network sees."""
    torch.manual_seed(0)
    network = UNet(2, 3, channels=(8, 8, 8))
    mask = torch.tensor([[0.5, 0, 0.5], [0, 0.5, 0.5], [0, 0, 1]], dtype=torch.float64)
    gone = torch.tensor([[0, 0, 1]] * 3, dtype=torch.float64)
    d = DiscreteDiffusion(
        network, 2, 4, Q=torch.stack([torch.eye(3).double(), mask, mask, mask, gone])
    )
    for chain in (d, respaced(d, 2)):
        save_checkpoint("x.pth", state_of(network, chain))
        again = load_checkpoint("x.pth")
        assert torch.equal(again.Q, chain.Q) and torch.equal(again.network_t, chain.network_t)
        assert torch.equal(again.sample(2), chain.sample(2))


DIGITS = {"source": "mnist", "classes": [*"0123456789"], "size": [28, 28], "palette": None}


def test_what_old_checkpoints_were_trained_on():
    """Old ones say only "data"; new ones are unchanged."""
    for data in ("mnist", "offline"):
        save_checkpoint("x.pth", fake_checkpoint(1) | {"data": data})
        assert read_checkpoint("x.pth")["dataset"] == DIGITS | {"source": data}
    own = {"source": "/x", "classes": ["a"], "size": [40, 24], "palette": [[0, 0, 0], [9, 9, 9]]}
    save_checkpoint("x.pth", fake_checkpoint(1) | {"dataset": own})
    assert read_checkpoint("x.pth")["dataset"] == own


def test_released_models_load():
    for name, protocol, labels in (("", "threshold", 10), ("_dynamic", "dynamic", 0)):
        path = REPOSITORY / "results_d3pm" / "released" / f"d3pm_mnist{name}.pth"
        d, state = load_checkpoint(path), read_checkpoint(path)
        assert (d.timesteps, d.num_levels, d.num_labels) == (1000, 2, labels)
        assert (state["data"], state["binarize"]) == ("mnist", protocol)
        assert state["dataset"] == DIGITS and d.config["schedule"] == "cosine"


def test_the_first_released_models_load():
    """With their configurations of commits 77d7e85 and 0766d4b."""
    network = {"name": "unet", "num_levels": 2, "num_states": 2, "channels": [24, 64, 96]}
    network |= {"blocks": 1, "num_labels": 10}
    model = UNet(2, 2, (24, 64, 96), num_labels=10)
    diffusion = {"transition": "uniform", "schedule": "cosine", "loss_type": "variational"}
    diffusion |= {"hybrid_weight": 0.01, "timesteps": 200}
    for levels in ("num_classes", "num_levels"):
        state = state_of(model, DiscreteDiffusion(model, 2, 200, "uniform", "cosine"))
        state |= {"network": network, "diffusion": diffusion | {levels: 2}}
        save_checkpoint("old.pth", state | {"data": "mnist", "binarize": "threshold", "step": 8000})
        d = load_checkpoint("old.pth")
        assert (d.num_levels, d.num_labels, d.timesteps, d.reverse) == (2, 10, 200, "mixture")


CLAIMS = [
    ("network", "channels", [16, 8, 8], "size mismatch"),
    ("network", "channels", [7, 8, 8], "multiples of 8"),
    ("network", "channels", None, ""),
    ("network", "channels", 8, ""),
    ("diffusion", "hybrid_weight", 10**400, "too large"),
    ("network", "blocks", 2, "Missing key"),
    ("network", "blocks", 10**12, "1..16"),
    ("network", "name", "transformer", "unknown network"),
    ("network", "depth", 3, "depth"),
    ("diffusion", "timesteps", 10**9, "fit into memory"),
    ("diffusion", "timesteps", 10**30, "fit into memory"),
    ("diffusion", "timesteps", "ten", ""),
    ("diffusion", "num_levels", 10**9, "fit into memory"),
    ("diffusion", "transition", "nonsense", "unknown transition"),
    ("diffusion", "image_shape", [3, 32, 32], "one channel"),
]


@pytest.mark.parametrize("part, key, value, words", CLAIMS)
def test_configurations_that_do_not_fit(part, key, value, words, saved):
    """Rejected in one line, before a chain too large for the memory is allocated."""
    state = read_checkpoint(saved)
    state[part][key] = value
    prefix = r"^x\.pth does not fit this version of the repository: "
    with pytest.raises(UserError, match=prefix) as error:
        build_diffusion(state, "x.pth")
    line = str(error.value)
    assert words in line and "\n" not in line and len(line) < 400


def test_weights_that_are_missing_or_not_finite(saved):
    state = read_checkpoint(saved)
    for weights in ({}, {"fold.weight": 3}, {"nonsense": torch.zeros(1)}):
        with pytest.raises(UserError, match="does not fit"):
            build_diffusion(state | {"averaged_weights": weights}, "x.pth")
    for value in (math.nan, math.inf):
        state["averaged_weights"]["fold.bias"][3] = value
        words = r"x\.pth has weights that are not finite: its training diverged"
        with pytest.raises(UserError, match=words):
            build_diffusion(state, "x.pth")


def test_files_that_are_no_checkpoints():
    parts = {"network": {}, "diffusion": {}, "averaged_weights": {}}
    states = [torch.zeros(3), [1, 2], {"network": {}, "diffusion": {}}]
    states += [parts | {part: value} for part in parts for value in ([], "unet", torch.zeros(3))]
    for state in states:
        torch.save(state, "x.pth")
        with pytest.raises(UserError, match=r"x\.pth is not a checkpoint of this repository"):
            read_checkpoint("x.pth")


def test_damaged_and_missing_files(saved):
    good = saved.read_bytes()
    noise = np.random.default_rng(0).bytes(5000)
    for content in (good[: len(good) // 2], noise, b""):
        Path("bad.pth").write_bytes(content)
        with pytest.raises(UserError, match=r"^bad\.pth is damaged or is not a checkpoint .*\)$"):
            read_checkpoint("bad.pth")
    with pytest.raises(FileNotFoundError):
        read_checkpoint("nowhere.pth")
    with pytest.raises(UserError, match="not a regular file"):
        read_checkpoint(".")


class Malice:
    def __reduce__(self):
        return os.mkdir, ("owned",)


def test_a_checkpoint_runs_no_code():
    torch.save({"network": Malice(), "diffusion": {}, "averaged_weights": {}}, "x.pth")
    with pytest.raises(UserError, match="damaged or is not a checkpoint"):
        read_checkpoint("x.pth")
    assert not Path("owned").exists()


# --------------------------------------------------------------------------------------------------
# The folder of a run


def make(*names):
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("x")


def assert_owned():
    """Neither this program nor a system lock can take a/run again."""
    with (
        pytest.raises(UserError, match="another run is alive in a/run"),
        RunFolder("a/run").owned(),
    ):
        pytest.fail("owned twice")
    with open("a/run/.lock", "rb") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_folder_has_one_owner():
    """Its lock is released but not deleted, so that all processes lock the same file."""
    with pytest.raises(UserError, match="bad flag"), RunFolder("a/run").owned():
        assert_owned()
        raise UserError("bad flag")
    number = Path("a/run/.lock").stat().st_ino
    with RunFolder("a/run").owned():
        assert_owned()
        make("a/run/metrics.csv")
    assert files_below("a/run") == {"a/run/metrics.csv", "a/run/.lock"}
    assert Path("a/run/.lock").stat().st_ino == number


@pytest.mark.parametrize("name", ["ENOSYS", "ENOLCK", "ENOTSUP"])
def test_file_system_without_locks(name, monkeypatch, capsys):
    """Only a warning, as on some network disks."""
    monkeypatch.setattr(fcntl, "flock", failing(getattr(errno, name)))
    with RunFolder("run").owned():
        make("run/metrics.csv")
    assert "warning: run can't be locked" in capsys.readouterr().err


def test_a_folder_that_cannot_be_owned():
    make("file")
    for name in ("file", "file/run"):
        with pytest.raises(OSError, match="can't write"), RunFolder(name).owned():
            pytest.fail("owned a file")


def test_what_counts_as_a_run():
    folder = RunFolder("run")
    make("run/notes.txt", "run/checkpoints/best.pth", "run/samples/sample_epoch_1.png")
    assert not folder.holds_a_run()
    with pytest.raises(UserError, match="there is no checkpoint run"):
        folder.newest()
    for name in ("metrics.csv", *(f"checkpoints/{n}.pth" for n in ("weights", "model_epoch_5"))):
        make(f"run/{name}")
        assert folder.holds_a_run()
        Path(f"run/{name}").unlink()


def test_the_newest_checkpoint():
    """last.pth, whatever the file times; damage is reported when it is read."""
    folder = RunFolder("run")
    make("run/checkpoints/last.pth", "run/checkpoints/model_epoch_5.pth")
    os.utime(folder.checkpoints / "last.pth", (1e9, 1e9))
    assert folder.newest() == folder.checkpoints / "last.pth"


def test_clearing_and_tidying():
    """Only the names that this program writes, in its own folders."""
    names = ("last", "constant", "weights", "model_epoch_5", "model_epoch_10")
    ours = [f"run/checkpoints/{name}.pth" for name in names]
    names = ("metrics.csv", "loss_curve.png", "evaluation.json")
    names += ("bound_terms.png", "gain.png", "nearest.png", "samples/sample_epoch_5.png")
    ours += [f"run/{name}" for name in names]
    leftovers = ["run/checkpoints/.last.pth.0123abcd"]
    leftovers += ["run/checkpoints/.model_epoch_5.pth.0123abcd"]
    theirs = ["run/notes.txt", "run/last.pth", "run/checkpoints/notes.txt"]
    theirs += ["run/checkpoints/.notes", "run/samples/.last.pth.0123abcd"]
    theirs += ["run/samples/x.png", "run/samples/deep/sample_epoch_5.png"]
    theirs += ["run/checkpoints/model_epoch_5.pth.bak"]
    make(*ours, *theirs, *leftovers)
    Path("run/checkpoints/model_epoch_7.pth").mkdir()
    RunFolder("run").tidy()
    assert files_below(".") == {*ours, *theirs}
    RunFolder("run").clear()
    assert files_below(".") == {*theirs}
    RunFolder("nowhere").clear()
