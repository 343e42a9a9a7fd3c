"""Outputs that are whole or not there, whatever happens; checkpoints that come back as they were or are refused."""

import errno
import json
import math
import multiprocessing
import os
import random
import signal
import stat
import time
from pathlib import Path

import filelock
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
    json_bytes,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
    write_json,
)
from diffusion import DiscreteDiffusion
from model import UNet

pytestmark = pytest.mark.usefixtures("fresh_directory")


# ---------------------------------------------------------------------------------------------------------------------
# Atomic writes


class NoSpace(OSError):
    def __init__(self, *_):
        super().__init__(errno.ENOSPC, os.strerror(errno.ENOSPC))


def raise_no_space(*_):
    raise NoSpace


def raise_not_permitted(*_):
    raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))


@pytest.mark.parametrize("error", [NoSpace, KeyboardInterrupt, ValueError])
def test_failing_block_writes_nothing(error):
    """After half of the bytes: old files stay as they were, new ones stay absent, and no temporary is left."""
    Path("old").write_bytes(b"old")
    with pytest.raises(error), atomic_writes("old", "new") as files:
        for file in files:
            file.write(b"half" * 10_000)
        raise error
    assert snapshot(Path()) == {Path("old"): b"old"}
    with atomic_writes("old", "new", "deep/er/new") as files:
        for i, file in enumerate(files):
            file.write(b"whole %d" % i)
        assert Path("old").read_bytes() == b"old" and not Path("new").exists()
    contents = {
        path.name: path.read_bytes()
        for path in Path().rglob("*")
        if path.is_file() and path.name == "old"
    }
    assert contents == {"old": b"whole 0"}
    assert Path("new").read_bytes() == b"whole 1" and Path("deep/er/new").read_bytes() == b"whole 2"


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("at", [0, 1])
def test_failing_end_writes_none_of_several(function, at, monkeypatch):
    """A disk that is full when the second is flushed costs the first, too; nothing is left beside them."""
    for name in ("a", "b"):
        Path(name).write_bytes(b"old")
    calls, real = [], getattr(os, function)

    def failing(*args):
        calls.append(args)
        return raise_no_space() if len(calls) == at + 1 else real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, function, failing)
        with pytest.raises(NoSpace), atomic_writes("a", "b") as files:
            for file in files:
                file.write(b"new")
    assert {path.name for path in Path().iterdir()} == {"a", "b"}
    if (function, at) != ("replace", 1):  # no file system renames two files at once
        assert Path("a").read_bytes() == b"old"
    assert Path("b").read_bytes() == b"old"


def test_outputs_that_cannot_be_written_are_known_before_the_block():
    Path("file").touch()
    Path("folder").mkdir()
    for name, words in (
        ("file/x", "can't write"),
        ("folder", "not a regular file"),
        ("/dev/null", "not a regular file"),
    ):
        with pytest.raises(OSError, match=words), atomic_writes("first", name):
            pytest.fail("began the work")
    assert {path.name for path in Path().iterdir()} == {"file", "folder"}


def test_data_reach_the_disk_before_the_name_does(monkeypatch):
    done, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda fd: (done.append(("fsync", os.fstat(fd).st_size)), fsync(fd))
    )
    monkeypatch.setattr(
        os, "replace", lambda x, y: (done.append((a.closed, Path(y).name)), replace(x, y))
    )
    with atomic_writes("a", "b") as (a, b):
        a.write(b"1")
        b.write(b"22")
    assert done == [("fsync", 1), ("fsync", 2), (True, "a"), (True, "b")]


@pytest.mark.parametrize("exists", [True, False])
def test_two_names_of_one_file(exists, tmp_path):
    """By another spelling, a symbolic link, a linked folder, a hard link."""
    if exists:
        Path("x").write_bytes(b"old")
        os.link("x", "hard")
    Path("link").symlink_to("x")
    Path("up").symlink_to(tmp_path)
    names = [
        "x",
        "./x",
        tmp_path / "x",
        "folder/../x",
        "link",
        "up/x",
        *(["hard"] if exists else []),
    ]
    for other in names:
        with (
            pytest.raises(ValueError, match="the same file is written"),
            atomic_writes("x", "y", other),
        ):
            pytest.fail("began the work")
        with (
            pytest.raises(ValueError, match="the same file is read"),
            atomic_writes("y", other, inputs=["x"]),
        ):
            pytest.fail("began the work")
        with (
            pytest.raises(ValueError, match="the same file is read"),
            atomic_writes("x", inputs=["y", other]),
        ):
            pytest.fail("began the work")
    with atomic_writes("y", "z", inputs=["x"]) as (_, _):
        pass


def test_links_are_followed():
    Path("folder").mkdir()
    Path("link").symlink_to("folder/target")
    for content in (b"1", b"2"):
        with atomic_write("link") as file:
            file.write(content)
        assert Path("link").is_symlink() and Path("folder/target").read_bytes() == content
    assert {path.name for path in Path().iterdir()} == {"folder", "link"}
    assert {path.name for path in Path("folder").iterdir()} == {"target"}


def mode(path) -> int:
    return stat.S_IMODE(Path(path).stat().st_mode)


def test_modes():
    """A new file has what the umask gives, a replaced one keeps its own."""
    Path("old").touch()
    os.chmod("old", 0o604)
    before = os.umask(0o027)
    try:
        with atomic_writes("old", "new"):
            pass
    finally:
        os.umask(before)
    assert mode("new") == 0o640 and mode("old") == 0o604


def test_file_system_without_modes(monkeypatch):
    """A FAT stick refuses chmod: nothing depends on it."""
    Path("old").write_bytes(b"old")
    for function in ("chmod", "fchmod"):
        monkeypatch.setattr(os, function, raise_not_permitted)
    with atomic_writes("old", "new") as files:
        for file in files:
            file.write(b"new")
    assert Path("old").read_bytes() == Path("new").read_bytes() == b"new"


def test_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with atomic_write("~/x") as file:
        file.write(b"1")
    assert Path("home/x").read_bytes() == b"1" and not Path("~").exists()


def test_json():
    """Infinities and what is not a number are strings, so that every reader can read it; provenance comes first."""
    value = {
        "a": [1, 2.5, math.inf, (-math.inf,)],
        "b": {"c": math.nan, 3: None},
        "p": Path("x"),
        "é": True,
    }
    write_json("x.json", value)

    def refuse(constant):
        pytest.fail(f"{constant} is no JSON")

    read = json.loads(Path("x.json").read_bytes(), parse_constant=refuse)
    assert next(iter(read)) == "provenance" and read.pop("provenance")["torch"] == torch.__version__
    assert read == {
        "a": [1, 2.5, "inf", ["-inf"]],
        "b": {"c": "nan", "3": None},
        "p": "x",
        "é": True,
    }
    assert json_bytes(value).endswith(b"}\n")


# ---------------------------------------------------------------------------------------------------------------------
# Saving


def fake_checkpoint(i):
    return {
        "network": {},
        "diffusion": {},
        "averaged_weights": {"w": torch.full((500_000,), float(i))},
        "step": i,
    }


def step_of(path) -> int:
    """The step of a fake checkpoint, after a look at whether it is whole."""
    state = read_checkpoint(path)
    assert (state["averaged_weights"]["w"] == state["step"]).all()
    return state["step"]


def in_a_process_that_dies(function, *args):
    """Run function(*args) in a child process, which has to die of SIGKILL."""
    child = multiprocessing.get_context("fork").Process(target=function, args=args)
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL


def save_and_die(path, where, when):
    """Save over `path`, but be killed before or after the first call of os.`where`."""
    real = getattr(os, where)

    def deadly(*args):
        if when == "after":
            real(*args)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(os, where, deadly)
    save_checkpoint(path, fake_checkpoint(2))


@pytest.mark.parametrize("where, when, step", [
    ("fsync", "before", 1), ("fsync", "after", 1), ("replace", "before", 1), ("replace", "after", 2),
])  # fmt: skip
def test_kill_9_at_each_stage_of_a_save(where, when, step):
    """The file is the old one or the new one, whole."""
    path = Path("last.pth")
    save_checkpoint(path, fake_checkpoint(1))
    in_a_process_that_dies(save_and_die, path, where, when)
    assert step_of(path) == step
    save_checkpoint(path, fake_checkpoint(3))
    assert step_of(path) == 3


def save_forever(path, saved):
    while True:
        save_checkpoint(path, fake_checkpoint(saved.value + 1))
        saved.value += 1


def test_kill_9_at_any_moment():
    """A process that saves over and over, killed at moments that chance picks: always one whole checkpoint."""
    path, context, chance = Path("last.pth"), multiprocessing.get_context("fork"), random.Random(0)
    saved = context.Value("q", 0)
    for _ in range(6):
        before = saved.value
        writer = context.Process(target=save_forever, args=(path, saved))
        writer.start()
        while saved.value < before + 2:  # however long that takes
            assert writer.is_alive()
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.02))  # a save takes about 5 ms
        writer.kill()
        writer.join()
        assert saved.value <= step_of(path) <= saved.value + 1


@pytest.mark.parametrize("function", ["fsync", "replace"])
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
    assert step_of(path) == 3


@pytest.mark.parametrize("value", [np.int64(20), np.float64(0.5), Path("x"), len])
def test_what_could_not_be_read_back_is_not_saved(value):
    """The old file stays; the message names the new one."""
    save_checkpoint("x.pth", fake_checkpoint(1))
    before = snapshot(Path())
    with pytest.raises(ValueError, match=r"x\.pth: this checkpoint could not be read back"):
        save_checkpoint("x.pth", fake_checkpoint(2) | {"value": value})
    assert snapshot(Path()) == before


def test_numbers_of_numpy_in_a_diffusion_can_be_saved():
    network = UNet(channels=(8, 8, 8))
    d = DiscreteDiffusion(network, np.int64(2), np.int64(20), hybrid_weight=np.float64(0.5))
    state = {
        "network": network.config,
        "diffusion": d.config,
        "averaged_weights": network.state_dict(),
    }
    save_checkpoint("x.pth", state)
    assert load_checkpoint("x.pth").timesteps == 20


# ---------------------------------------------------------------------------------------------------------------------
# Loading


def test_what_is_loaded_is_what_was_saved(run):
    """The averaged weights, not the current ones, in eval mode, with the diffusion's own numbers."""
    path = run / "checkpoints" / "last.pth"
    d, state = load_checkpoint(path), read_checkpoint(path)
    assert not d.training and d.timesteps == 10 and d.config == state["diffusion"]
    for name, weight in d.model.state_dict().items():
        assert torch.equal(weight, state["averaged_weights"][name])
    assert load_checkpoint(path, "cpu", 5).timesteps == 5
    with pytest.raises(ValueError, match=r"1\.\.10"):
        load_checkpoint(path, timesteps=11)
    assert next(load_checkpoint(path, "meta").parameters()).device.type == "meta"


def test_own_transition_matrices_and_a_shorter_chain_come_back():
    """Q with more states than levels, and what the network is told for t."""
    torch.manual_seed(0)
    network = UNet(2, 3, channels=(8, 8, 8))
    mask = torch.tensor([[0.5, 0, 0.5], [0, 0.5, 0.5], [0, 0, 1]], dtype=torch.float64)
    gone = torch.tensor([[0, 0, 1]] * 3, dtype=torch.float64)
    d = DiscreteDiffusion(
        network, 2, 4, Q=torch.stack([torch.eye(3).double(), mask, mask, mask, gone])
    )
    for chain in (d, d.respaced(2)):
        state = {
            "network": network.config,
            "diffusion": chain.config,
            "averaged_weights": network.state_dict(),
        }
        save_checkpoint("x.pth", state)
        again = load_checkpoint("x.pth")
        assert torch.equal(again.Q, chain.Q) and torch.equal(again.network_t, chain.network_t)
        assert torch.equal(again.sample(2), chain.sample(2))


@pytest.mark.parametrize("name, T, protocol, labels", [
    ("d3pm_mnist", 1000, "threshold", 10), ("d3pm_mnist_dynamic", 1000, "dynamic", 0),
])  # fmt: skip
def test_released_models_load(name, T, protocol, labels):
    path = REPOSITORY / "results_d3pm" / "released" / f"{name}.pth"
    d, state = load_checkpoint(path), read_checkpoint(path)
    assert (d.timesteps, d.num_levels, d.num_labels) == (T, 2, labels)
    assert (state["data"], state["binarize"]) == ("mnist", protocol)
    assert d.config["schedule"] == "cosine"


def test_older_checkpoints_load():
    """num_levels was called num_classes; the Gaussian schedule, linear, which in other families it still is."""
    network = UNet(4, channels=(8, 8, 8))
    for transition, then, now in (
        ("gaussian", "linear", "fitted"),
        ("uniform", "linear", "linear"),
    ):
        d = DiscreteDiffusion(network, 4, 20, transition, now)
        config = {
            key: value
            for key, value in d.config.items()
            if key not in ("num_levels", "image_shape")
        }
        config |= {"num_classes": 4, "schedule": then}
        state = {
            "network": network.config,
            "diffusion": config,
            "averaged_weights": network.state_dict(),
        }
        save_checkpoint("old.pth", state)
        assert torch.equal(load_checkpoint("old.pth").Q, d.Q)
        save_checkpoint("old.pth", state | {"settings": {"schedule": then}})
        assert read_checkpoint("old.pth")["settings"]["schedule"] == now


@pytest.mark.parametrize("part, key, value, words", [
    ("network", "channels", [80_000, 80_000, 80_000], "a larger network"),
    ("network", "channels", (80_000, 80_000, 80_000), "a larger network"),
    ("network", "channels", [16, 8, 8], "size mismatch"),
    ("network", "channels", [7, 8, 8], "multiples of 8"),
    ("network", "channels", None, ""),
    ("network", "channels", 8, ""),
    ("network", "channels", [10**18, 8, 8], "a larger network"),
    ("diffusion", "hybrid_weight", 10**400, "too large"),
    ("network", "blocks", 2, "Missing key"),
    ("network", "blocks", 10**12, "larger network"),
    ("network", "num_states", 10**9, "larger network"),
    ("network", "num_labels", 10**9, "larger network"),
    ("network", "name", "transformer", "unknown network"),
    ("network", "depth", 3, "depth"),
    ("diffusion", "timesteps", 10**9, "fit into memory"),
    ("diffusion", "timesteps", 10**30, "fit into memory"),
    ("diffusion", "timesteps", "ten", ""),
    ("diffusion", "num_levels", 10**9, "fit into memory"),
    ("diffusion", "transition", "nonsense", "unknown transition"),
    ("diffusion", "image_shape", [3, 32, 32], "one channel"),
])  # fmt: skip
def test_claims_that_its_weights_do_not_bear_out(part, key, value, words, run, monkeypatch):
    """Refused in one line, before anything of that size is asked for."""
    state = read_checkpoint(run / "checkpoints" / "last.pth")
    state[part][key] = value
    build = checkpoint.build_network

    def watched(config):
        if part == "network" and "0000" in str(config):
            pytest.fail("asked for memory")
        return build(config)

    monkeypatch.setattr(checkpoint, "build_network", watched)
    with pytest.raises(
        ValueError, match=r"^x\.pth does not fit this version of the repository: "
    ) as error:
        build_diffusion(state, "x.pth")
    assert (
        words in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 400
    )


@pytest.mark.parametrize("weights", [{}, {"fold.weight": 3}, {"nonsense": torch.zeros(1)}])
def test_weights_that_are_none(weights, run):
    state = read_checkpoint(run / "checkpoints" / "last.pth")
    with pytest.raises(ValueError, match="does not fit"):
        build_diffusion(state | {"averaged_weights": weights}, "x.pth")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite(value):
    untrained("x.pth")
    state = read_checkpoint("x.pth")
    state["averaged_weights"]["fold.bias"][3] = value
    with pytest.raises(
        ValueError, match=r"x\.pth holds weights that are not finite: its training has diverged"
    ):
        build_diffusion(state, "x.pth")


@pytest.mark.parametrize("state", [
    torch.zeros(3),
    [1, 2],
    {"weights": torch.zeros(3)},
    {"network": {}, "diffusion": {}},
    {"network": {}, "diffusion": [], "averaged_weights": {}},
    {"network": {}, "diffusion": {}, "averaged_weights": torch.zeros(3)},
    {"network": "unet", "diffusion": {}, "averaged_weights": {}},
])  # fmt: skip
def test_what_is_no_checkpoint(state):
    torch.save(state, "x.pth")
    with pytest.raises(ValueError, match=r"x\.pth is not a checkpoint of this repository"):
        read_checkpoint("x.pth")


def test_damaged_and_missing_files(bad_files):
    for name in ("cut.pth", "noise.pth", "empty.pth"):
        with pytest.raises(ValueError, match=f"{name} is damaged or is not a checkpoint") as error:
            read_checkpoint(name)
        assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError):
        read_checkpoint("nowhere.pth")
    with pytest.raises(IsADirectoryError):
        read_checkpoint("folder")


class Malice:
    def __reduce__(self):
        return os.mkdir, ("owned",)


def test_a_checkpoint_runs_no_code():
    torch.save({"network": Malice(), "diffusion": {}, "averaged_weights": {}}, "x.pth")
    with pytest.raises(ValueError, match="damaged or is not a checkpoint"):
        read_checkpoint("x.pth")
    assert not Path("owned").exists()


# ---------------------------------------------------------------------------------------------------------------------
# The folder of a run


def make(*names):
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("x")


def test_a_folder_is_owned_by_one():
    folder = RunFolder("a/run")
    with folder.owned():
        with (
            pytest.raises(ValueError, match="another run is alive in a/run"),
            RunFolder("a/run").owned(),
        ):
            pytest.fail("owned twice")
        with pytest.raises(filelock.Timeout):
            filelock.FileLock("a/run/.lock").acquire(timeout=0)
        make("a/run/metrics.csv")
    with RunFolder("a/run").owned():
        pass
    assert Path("a/run/metrics.csv").exists()


def test_a_folder_that_cannot_be_owned():
    make("file")
    for name in ("file", "file/run"):
        with pytest.raises(OSError, match="can't write"), RunFolder(name).owned():
            pytest.fail("owned a file")


def test_what_a_run_is_known_by():
    folder = RunFolder("run")
    make("run/notes.txt", "run/checkpoints/best.pth", "run/samples/sample_epoch_1.png")
    assert not folder.holds_a_run()
    with pytest.raises(ValueError, match="there is no checkpoint in run"):
        folder.newest()
    for name in (
        "metrics.csv",
        "checkpoints/constant.pth",
        "checkpoints/weights.pth",
        "checkpoints/model_epoch_5.pth",
    ):
        make(f"run/{name}")
        assert folder.holds_a_run()
        Path(f"run/{name}").unlink()


def test_the_newest_checkpoint():
    """last.pth, whatever the times say; else the youngest with all that a run needs."""
    make(
        *(
            f"run/checkpoints/{name}.pth"
            for name in ("constant", "model_epoch_5", "weights", "best", "last")
        )
    )
    for age, name in enumerate(("best", "weights", "model_epoch_5", "constant", "last")):
        os.utime(f"run/checkpoints/{name}.pth", (1e9 - age, 1e9 - age))
    folder = RunFolder("run")
    assert folder.newest().name == "last.pth"
    Path("run/checkpoints/last.pth").unlink()
    assert folder.newest().name == "model_epoch_5.pth"


def test_clearing_and_tidying():
    """By the names that this program writes, in its own folders."""
    ours = [
        f"run/checkpoints/{name}.pth"
        for name in ("last", "constant", "weights", "model_epoch_5", "model_epoch_10")
    ]
    ours += ["run/samples/sample_epoch_5.png"]
    ours += [
        f"run/{name}"
        for name in (
            "metrics.csv",
            "loss_curve.png",
            "evaluation.json",
            "bound_terms.png",
            "nearest.png",
        )
    ]
    leftovers = [
        "run/checkpoints/.last.pth.0123abcd",
        "run/checkpoints/.model_epoch_5.pth.0123abcd",
    ]
    theirs = ["run/notes.txt", "run/last.pth", "run/checkpoints/notes.txt", "run/checkpoints/.notes.pth.0123abcd",
              "run/samples/.last.pth.0123abcd", "run/samples/x.png", "run/samples/deep/sample_epoch_5.png",
              "run/checkpoints/model_epoch_5.pth.bak"]  # fmt: skip
    make(*ours, *theirs, *leftovers)
    Path("run/checkpoints/model_epoch_7.pth").mkdir()
    RunFolder("run").tidy()
    assert {str(path) for path in Path().rglob("*") if path.is_file()} == {*ours, *theirs}
    RunFolder("run").clear()
    assert {str(path) for path in Path().rglob("*") if path.is_file()} == {*theirs}
    RunFolder("nowhere").clear()
