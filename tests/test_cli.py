"""Shared by all scripts: arguments, the device, one-line errors, streams that may break."""

import argparse
import errno
import io
import os
import shlex
import shutil
import subprocess
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import cli
from cli import (
    SEED,
    UserError,
    add_data,
    add_device,
    add_last_step,
    add_speed,
    integer,
    number,
    parser,
    path,
    pick_device,
    provenance,
    user_errors,
)

import pytest
import torch
from scripts import ENVIRONMENT, REPOSITORY

# --------------------------------------------------------------------------------------------------
# Arguments

# The value or part of the message; ValueError: argparse says "invalid integer value"
ARGUMENTS = [
    (integer(1), "1", 1),
    (integer(1), "2147483647", 2**31 - 1),
    (integer(1), "0", "at least 1, got 0"),
    (integer(1), "2147483648", "at most 2147483647, got 2147483648"),
    (integer(2, 5), "5", 5),
    (integer(2, 5), "6", "at most 5, got 6"),
    (integer(2, 5), "1", "at least 2, got 1"),
    (integer(1), "1.5", ValueError),
    (integer(1), "", ValueError),
    (integer(1), "1" + "0" * 400, "at most 2147483647"),
    (SEED, "4294967295", 2**32 - 1),
    (SEED, "4294967296", "at most 4294967295"),
    (SEED, "-1", "at least 0"),
    (number(0), "0", 0.0),
    (number(0), "1e300", 1e300),
    (number(0), "-0.1", "at least 0, got -0.1"),
    (number(0), "inf", "at least 0, got inf"),
    (number(0), "nan", "at least 0, got nan"),
    (number(0), "x", ValueError),
    (number(0, above=True), "0", "above 0, got 0"),
    (number(0, above=True), "1e-9", 1e-9),
    (number(0, 1), "1", 1.0),
    (number(0, 1), "1.1", "at most 1, got 1.1"),
    (path(), "a/b.txt", Path("a/b.txt")),
    (path(), "", "is empty"),
    (path(), " ", "is empty"),
    (path(".png"), "x.png", Path("x.png")),
    (path(".png"), "x.jpg", "must end in .png, got x.jpg"),
    (path(".png"), "png", "must end in .png"),
    (path(".png"), ".png", "must end in .png"),
]


@pytest.mark.parametrize("parse, text, value", ARGUMENTS)
def test_types_of_arguments(parse, text, value):
    if value is ValueError:
        with pytest.raises(ValueError):
            parse(text)
    elif isinstance(value, str):
        with pytest.raises(argparse.ArgumentTypeError) as error:
            parse(text)
        assert value in str(error.value)
    else:
        result = parse(text)
        assert result == value and type(result) is type(value)


def test_names_of_types_in_messages(capsys):
    p = parser("text\n  kept as it is")
    assert "text\n  kept as it is" in p.format_help()
    for name, kind in (("integer", integer(1)), ("number", number(0))):
        p.add_argument(f"--{name}", type=kind)
        with pytest.raises(SystemExit):
            p.parse_args([f"--{name}", "x"])
        assert f"invalid {name} value: 'x'" in capsys.readouterr().err


def test_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert path(".png")("~/x.png") == tmp_path / "x.png"


def test_shared_flags():
    p = parser(None)
    for add_flags in (add_data, add_device, add_speed):
        add_flags(p.add_argument)
    add_last_step(p.add_argument, ("draw", "mode"))
    usual = {"data": "auto", "data_root": Path("data"), "device": "auto", "last_step": None}
    assert vars(p.parse_args([])) == usual | {"compile": False, "amp": False}
    given = "--data mnist --data-root x --device cpu --last-step mode --compile --amp"
    values = {"data": "mnist", "data_root": Path("x"), "device": "cpu", "last_step": "mode"}
    assert vars(p.parse_args(shlex.split(given))) == values | {"compile": True, "amp": True}


# --------------------------------------------------------------------------------------------------
# The device


BEST = [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")]


@pytest.mark.parametrize("cuda, mps, best", BEST)
def test_the_best_device(cuda, mps, best, monkeypatch):
    """Chosen by asking torch, and tried before the work."""
    tried, zeros = [], torch.zeros
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch, "zeros", lambda n, device: tried.append(device) or zeros(n))
    assert pick_device() == torch.device(best) and tried == [best]
    assert pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["nonsense", "cuda:99", "", "meta"])
def test_a_device_that_is_not_there(name):
    with pytest.raises(UserError, match="can't be used here") as error:
        pick_device(name)
    assert repr(name) in str(error.value) and "\n" not in str(error.value)


def test_message_of_cuda_is_cut_to_a_line(monkeypatch):
    """torch's message for a missing GPU has three lines."""

    def zeros(n, device):
        raise RuntimeError("CUDA error: invalid device ordinal\nGPU device may be out of range")

    monkeypatch.setattr(torch, "zeros", zeros)
    with pytest.raises(UserError) as error:
        pick_device("cuda:99")
    reason = "CUDA error: invalid device ordinal"
    assert str(error.value) == f"device 'cuda:99' can't be used here: {reason}"


# --------------------------------------------------------------------------------------------------
# Running a script


def run(main) -> tuple[int | None, str, str]:
    """Exit code, stdout and stderr of cli.run."""
    before = warnings.formatwarning
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        try:
            with pytest.raises(SystemExit) as end:
                cli.run(main)
        finally:
            warnings.formatwarning = before
    return end.value.code, out.getvalue(), err.getvalue()


NO_MEMORY = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"


FULL = "No space left on device"
ERRORS = [
    (UserError("too\nlong"), "too"),
    (UserError("\n"), "UserError"),
    (OSError(errno.ENOSPC, FULL, "x"), f"[Errno 28] {FULL}: 'x'"),
    (MemoryError(), "MemoryError"),
    (RuntimeError(f"[enforce fail] {NO_MEMORY}"), f"[enforce fail] {NO_MEMORY}"),
    (torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried"), "CUDA out of memory."),
]


@pytest.mark.parametrize("error, line", ERRORS)
def test_errors_are_one_line(error, line, monkeypatch):
    def main():
        raise error

    monkeypatch.setattr(sys, "argv", ["folder/script.py"])
    assert run(main) == (1, "", f"script.py: error: {line}\n")
    monkeypatch.setenv("RANK", "3")
    assert run(main) == (1, "", f"script.py: error: process 3: {line}\n")


@pytest.mark.parametrize("error", [ZeroDivisionError, ValueError, RuntimeError, ImportError])
def test_a_mistake_in_the_code_keeps_its_traceback(error):
    def main():
        raise error("mat1 and mat2 shapes cannot be multiplied")

    with (
        redirect_stdout(io.StringIO()),
        redirect_stderr(io.StringIO()),
        pytest.raises(error, match="mat1"),
    ):
        cli.run(main)


def test_user_errors():
    """ValueErrors become UserErrors; other errors and subclasses of UserError pass through."""
    special = type("Special", (UserError,), {})
    for raised, seen in ((ValueError, UserError), (special, special), (TypeError, TypeError)):
        with pytest.raises(raised) as error, user_errors():
            raise raised("too large")
        assert type(error.value) is seen and str(error.value) == "too large"


def test_exit_codes():
    assert run(lambda: print("said")) == (None, "said\n", "")
    assert run(lambda: 143)[0] == 143
    assert run(lambda: (_ for _ in ()).throw(KeyboardInterrupt))[0] == 130


# A real process for main's body, without torch, which takes seconds to import.
PROGRAM = f"""
import sys, types
sys.path.insert(0, {str(REPOSITORY)!r})
sys.modules["torch"] = types.SimpleNamespace(device=None)
import cli
def main():
    BODY
cli.run(main)
"""


def process(body: str, **options) -> subprocess.CompletedProcess:
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": ENVIRONMENT} | options
    return subprocess.run(
        [sys.executable, "-c", PROGRAM.replace("BODY", body)], timeout=120, **options
    )


def test_warnings_are_one_line():
    done = process("import warnings; warnings.warn('careful'); print('said')")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"said\n", b"warning: careful\n")


def test_characters_that_a_code_page_lacks():
    """On stdout and stderr, in output and in error messages."""
    done = process(
        "print('±1 é'); raise cli.UserError('±')", env=ENVIRONMENT | {"PYTHONIOENCODING": "ascii"}
    )
    assert done.returncode == 1 and done.stdout == b"?1 ?\n" and done.stderr == b"-c: error: ?\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_log_on_a_full_disk():
    """The work continues with its own exit code, without complaints at the end."""
    for code in ("", "return 7"):
        with open("/dev/full", "w") as full:
            done = process(f"for i in range(10**5): print('line', i)\n    {code}", stdout=full)
        assert done.returncode == (7 if code else 0) and done.stderr == b""


def test_a_closed_pipe():
    read, write = os.pipe()
    os.close(read)
    done = process("print('x' * 10**6); print('more'); return 3", stdout=write)
    os.close(write)
    assert done.returncode == 3 and done.stderr == b""


def test_stdout_that_is_closed():
    done = process("print('x', flush=True); return 3", stdout=None, preexec_fn=lambda: os.close(1))
    assert done.returncode == 3 and done.stderr == b""


def test_a_line_reaches_the_log_when_it_is_written():
    """Python buffers pipes in blocks, but after a kill the line is there."""
    done = process("print('hello'); import os; os.kill(os.getpid(), 9)")
    assert done.returncode == -9 and done.stdout == b"hello\n"


def test_wrapped_streams_keep_their_methods():
    stream = io.StringIO()
    wrapped = cli.Unbreakable(stream)
    assert wrapped.write("abc") == 3 and stream.getvalue() == "abc"
    assert not wrapped.isatty() and wrapped.getvalue() == "abc"
    stream.close()
    assert wrapped.write("abc") == 3
    wrapped.flush()


# --------------------------------------------------------------------------------------------------


def test_provenance(monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["/usr/bin/python3", "train.py", "--out-dir", "a b"])
    origin = provenance()
    assert origin.keys() == {"command", "machine", "torch", "commit"}
    assert origin["command"] == "python train.py --out-dir 'a b'"
    assert origin["torch"] == torch.__version__
    cores = f"{torch.get_num_threads()} of {os.cpu_count()} cores"
    assert origin["machine"].endswith(cores) and origin["machine"][0] != ","
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    assert provenance()["machine"].startswith("A GPU, ")


def git(folder, *command) -> str:
    user = ["-c", "user.name=x", "-c", "user.email=x", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", folder, *user, *command]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_is_our_own(monkeypatch, tmp_path):
    """Marked if files are modified; never an enclosing repository's or GIT_DIR's."""
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    ours, other = tmp_path / "thesis" / "ours", tmp_path / "thesis"
    ours.mkdir(parents=True)
    (ours / "cli.py").write_text("1")
    monkeypatch.setattr(cli, "REPOSITORY", ours)
    assert provenance()["commit"] == "unknown"
    for folder in (other, ours):
        git(folder, "init", "-q")
        git(folder, "add", "cli.py" if folder == ours else ".")
        git(folder, "commit", "-qm", f"in {folder.name}")
        if folder == other:
            assert provenance()["commit"] == "unknown"
    head = git(ours, "rev-parse", "HEAD")
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    commit = provenance()["commit"]
    assert head.startswith(commit) and len(commit) >= 7
    (ours / "cli.py").write_text("2")
    assert provenance()["commit"] == f"{commit}-dirty"
    monkeypatch.setenv("PATH", "")
    assert provenance()["commit"] == "unknown"


def test_waiting_threads_spin_on_an_idle_machine_in_our_scripts_only(tmp_path):
    """A choice of the user stays; a program that imports our modules keeps its own policy."""
    repository, names = tmp_path / "repository", (*cli.SLEEP, *cli.SPIN)
    lines = "import sys; sys.path.insert(0, sys.argv[1]); sys.modules['torch'] = sys\n"
    lines += "import os; sys.device = 0; os.cpu_count = lambda: 2\n"
    lines += "os.getloadavg = lambda: (float(sys.argv[2]), 0.0, 0.0)\n"
    lines += f"import cli; print([os.environ.get(name) for name in {names}])"
    inherited = {k: v for k, v in ENVIRONMENT.items() if k not in names}
    for program, load, chosen, policy in (
        ("repository/script.py", 0.9, {}, cli.SPIN),
        ("repository/script.py", 1.0, {}, cli.SLEEP),
        ("repository/script.py", 0.0, {"OMP_WAIT_POLICY": "ACTIVE"}, {}),
        ("repository/script.py", 1.0, {"GOMP_SPINCOUNT": "7"}, {}),
        ("repository/experiments/script.py", 0.0, {}, cli.SPIN),
        ("repository/.venv/bin/pytest", 0.0, {}, {}),
        ("other.py", 0.0, {}, {}),
    ):
        program = tmp_path / program
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(lines)
        shutil.copy(REPOSITORY / "cli.py", repository)
        command = [sys.executable, program, repository, str(load)]
        done = subprocess.run(command, env=inherited | chosen, capture_output=True, text=True)
        values = [(policy | chosen).get(name) for name in names]
        assert (done.stdout, done.stderr) == (f"{values}\n", "")
