"""Every experiment from end to end at toy size; its tables and counts by hand; the baseline is the common one."""

import functools
import json
import math
import subprocess
import sys
from concurrent.futures import Executor, Future
from pathlib import Path
from types import SimpleNamespace

from cli import REPOSITORY

import pytest
import torch
from PIL import Image
from scripts import ENVIRONMENT, TRAIN, call, fail, succeed

import dataset
import evaluate
from checkpoint import json_bytes, read_checkpoint
from dataset import Digits, to_levels
from diffusion import DiscreteDiffusion
from experiments import (
    baseline,
    benchmark,
    choices,
    common,
    curve,
    default,
    evaluation,
    fill,
    guidance,
    headline,
    levels,
    noise,
    pilot,
    rate,
    recipe,
    steps,
    time_to_quality,
    trajectories,
)
from model import Attention, Autocast, UNet
from trainer import Muon, Trainer

SMALL = {
    "train.py": "--limit 64 --batch-size 16 --channels 8 8 8 --timesteps 30 --device cpu",
    "evaluate.py": "--num-samples 20 --images 20 --repeats 1 --device cpu",
}
TRIAL = ("--data", "offline", "--jobs", 1)


load_offline = functools.cache(dataset.load_offline)  # it takes half a second each time


class Now(Executor):
    """A pool that does all work at once and in this thread, where scripts may handle signals."""

    def __init__(self, jobs):
        pass

    def submit(self, work, *arguments):
        future = Future()
        try:
            future.set_result(work(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future


@pytest.fixture
def commands(fresh_directory, tmp_path, monkeypatch):
    """The commands that experiments run, which are run in here and made small; results go to a fresh `out`."""
    done = []

    def command(script, arguments, log):
        done.append([script, *map(str, arguments)])
        code, _, err = call(script, *arguments, *SMALL[script].split())
        if code:
            raise RuntimeError(err.strip().splitlines()[-1])

    for module in (
        "common",
        "curve",
        "forward",
        "benchmark",
        "fill",
        "headline",
        "noise",
        "trajectories",
        "default",
    ):
        monkeypatch.setattr(f"experiments.{module}.OUT", tmp_path / "out")
    monkeypatch.setattr(common, "command", command)
    monkeypatch.setattr(common, "ThreadPoolExecutor", Now)
    monkeypatch.setattr(dataset, "load_offline", load_offline)
    monkeypatch.setattr(torch, "compile", lambda network: network)
    return done


@pytest.fixture(scope="module")
def conditional(tmp_path_factory):
    folder = tmp_path_factory.mktemp("conditional")
    succeed("train.py", *TRAIN, "--conditional", "--steps", 2, "--out-dir", folder)
    return folder / "checkpoints" / "last.pth"


def result_of(name, tmp_path):
    return json.loads((tmp_path / "out" / name / f"{name}.json").read_text())


# ---------------------------------------------------------------------------------------------------------------------
# Comparisons that are lists of commands


def test_choices(commands, cheap, tmp_path):
    out = succeed("experiments.choices", *TRIAL, "--steps", 2, "--seeds", 1)
    result = result_of("choices", tmp_path)
    assert out.strip() == choices.table(result)
    assert {"command", "machine", "torch", "commit"} == result["provenance"].keys()
    assert list(result["rows"]) == [f"{row}, seed 0" for row in choices.ROWS]
    assert all(math.isfinite(one["bound"]["nats_per_image"]) for one in result["rows"].values())
    trained = [line for line in commands if line[0] == "train.py"]
    assert [line[0] for line in commands] == ["train.py", "evaluate.py"] * len(choices.ROWS)
    assert all(
        "--split validation" in " ".join(line) for line in commands if line[0] == "evaluate.py"
    )
    for line, (row, flags) in zip(trained, choices.ROWS.items(), strict=True):
        assert flags in " ".join(line) and row in out
    run = tmp_path / "out" / "choices" / "absorbing-mutual_info-variational-0"
    settings = read_checkpoint(run / "checkpoints" / "last.pth")["settings"]
    assert (settings["transition"], settings["loss"], settings["lr"]) == (
        "absorbing",
        "variational",
        2e-3,
    )
    assert (settings["steps"], settings["seed"], settings["optimizer"]) == (2, 0, "adamw")

    commands.clear()
    assert (
        succeed("experiments.choices", *TRIAL, "--steps", 2, "--seeds", 1) == out and not commands
    )
    assert "is of other arguments" in fail("experiments.choices", *TRIAL, "--steps", 3)


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"title": "2 steps", "rows": [1]}', '{"rows": {"a": {}}}', "{"]
)
def test_results_of_another_shape(content, commands, tmp_path):
    file = tmp_path / "out" / "rate" / "rate.json"
    file.parent.mkdir(parents=True)
    file.write_text(content)
    assert "is no result of this experiment" in fail("experiments.rate", *TRIAL, "--steps", 2)
    assert not commands


def test_recipe(commands, cheap, tmp_path):
    succeed("experiments.recipe", *TRIAL, "--steps", 2)
    assert list(result_of("recipe", tmp_path)["rows"]) == [f"{row}, seed 0" for row in recipe.ROWS]
    assert all("--lr 0.0001" in " ".join(line) for line in commands if line[0] == "train.py")


def test_default(commands, cheap, tmp_path):
    out = succeed("experiments.default", *TRIAL, "--steps", 2, 4)
    assert all(
        ("--compile" in line) == ("released" in line) for line in commands if line[0] == "train.py"
    )
    result = result_of("default", tmp_path)
    assert out.strip() == default.table(result)
    for run, loss, step in (("default", "cross_entropy", 2), ("released", "variational", 4)):
        folder = tmp_path / "out" / "default" / run
        checkpoint = read_checkpoint(folder / "checkpoints" / "last.pth")
        assert (checkpoint["settings"]["loss"], checkpoint["step"]) == (loss, step)
        (folder / "metrics.csv").write_text("epoch,seconds\n1,5400\n2,360\n")
        assert default.hours(folder) == 1.6
    assert [one["row"] for one in result["rows"].values()] == [
        "`python train.py`, 2 steps, 0.0 hours",
        "`python train.py --recipe released --amp --compile`, 4 steps, 0.0 hours",
    ]
    assert all(one["bound"]["images"] == 20 for one in result["rows"].values())

    (tmp_path / "out" / "default" / "default.json").unlink()
    commands.clear()
    succeed(
        "experiments.default", *TRIAL, "--steps", 2, 6
    )  # goes on with the second, and doesn't train the first
    assert [line[0] for line in commands] == [
        "evaluate.py",
        "train.py",
        "evaluate.py",
    ] and "--resume" in commands[1]


def test_pilot(commands, cheap, tmp_path, monkeypatch):
    rows = {row: (1 + i % 2, flags) for i, (row, (_, flags)) in enumerate(pilot.ROWS.items())}
    monkeypatch.setattr(pilot, "ROWS", rows)
    succeed("experiments.pilot", *TRIAL, "--minutes", 2)
    assert list(result_of("pilot", tmp_path)["rows"]) == [f"{row}, seed 0" for row in rows]
    trained = [" ".join(line) for line in commands if line[0] == "train.py"]
    for line, (count, flags) in zip(trained, rows.values(), strict=True):
        assert flags in line and f"--steps {2 * count} " in line and "--binarize dynamic" in line


def test_rate_goes_on_where_it_was_stopped(commands, cheap, tmp_path, monkeypatch):
    command = common.command

    def breaks(script, arguments, log):
        if len(commands) == 5:  # inside the third of four runs, after its training
            raise RuntimeError("no power\nat all")
        command(script, arguments, log)

    monkeypatch.setattr(common, "command", breaks)
    code, _, err = call("experiments.rate", *TRIAL, "--steps", 2, "--seeds", 2)
    assert code == 1 and err.strip().splitlines()[-1] == "experiments.rate: error: no power"
    assert list(result_of("rate", tmp_path)["rows"]) == ["late decay, seed 0", "late decay, seed 1"]

    monkeypatch.setattr(common, "command", command)
    commands.clear()
    out = succeed("experiments.rate", *TRIAL, "--steps", 2, "--seeds", 2)
    assert [line[0] for line in commands] == ["evaluate.py", "train.py", "evaluate.py"]
    result = result_of("rate", tmp_path)
    assert out.strip() == rate.table(result) and len(result["rows"]) == 4
    for name, decay in (("late_decay-1", "late"), ("cosine-1", "cosine")):
        settings = read_checkpoint(tmp_path / "out" / "rate" / name / "checkpoints" / "last.pth")[
            "settings"
        ]
        assert (settings["decay"], settings["seed"], settings["optimizer"]) == (decay, 1, "muon")
        assert (settings["loss"], settings["binarize"]) == ("variational", "dynamic")
    assert {one["samples"]["last_step"] for one in result["rows"].values()} == {"draw"}


def test_unfinished_training_is_resumed(commands, cheap, tmp_path):
    train = ["--data", "offline"]
    common.command("train.py", [*train, "--steps", 2, "--out-dir", "run"], "log.txt")
    report = common.trained_and_evaluated("a row", tmp_path / "run", 3, train, train)
    assert "--resume" in commands[1] and read_checkpoint("run/checkpoints/last.pth")["step"] == 3
    assert report["row"] == "a row" and report["samples"]["images"] == 20


def test_guidance(commands, conditional, tmp_path, monkeypatch):
    monkeypatch.setattr(guidance, "NUM_SAMPLES", 30)
    out = succeed("experiments.guidance", conditional, *TRIAL)
    result = result_of("guidance", tmp_path)
    assert out.strip() == guidance.table(result)
    assert "bound" not in out and all("bound" not in one for one in result["rows"].values())
    assert all("bound_with_labels" not in one for one in result["rows"].values())
    assert list(result["rows"]) == list(guidance.ROWS)
    assert [result["rows"][row]["samples"]["guidance"] for row in guidance.ROWS] == [
        0,
        0,
        0.1,
        0.25,
        0.5,
        1,
    ]
    assert [result["rows"][row]["samples"]["labels"] for row in guidance.ROWS] == [False] + [
        True
    ] * 5
    assert all("--split validation" in " ".join(line) for line in commands)
    assert "--num-samples 30" in " ".join(commands[0])


def test_headline(commands, conditional, tmp_path, monkeypatch):
    """Bound and samples of the same chain in a row; the bound given the class beside samples that are given one."""
    monkeypatch.setattr(headline, "RELEASED", conditional)
    succeed("train.py", *TRAIN, "--binarize", "dynamic", "--steps", 2, "--out-dir", "dynamic")
    monkeypatch.setattr(headline, "DYNAMIC", Path("dynamic/checkpoints/last.pth").resolve())
    out = succeed("experiments.headline", *TRIAL, "--timesteps", 3, "--trajectories", 2)
    result = result_of("headline", tmp_path)
    rows = result["rows"]
    assert out.strip() == headline.table(result) and list(rows) == list(headline.ROWS)
    none, *_, dynamic = rows.values()
    assert [one["samples"]["last_step"] for one in rows.values()] == [
        "draw",
        "draw",
        "mode",
        "draw",
    ]
    assert [one["samples"]["labels"] for one in rows.values()] == [False, True, True, False]
    assert [one["timesteps"] for one in rows.values() if "bound" in one] == [3, 3]
    assert [one["samples"]["timesteps"] for one in rows.values()] == [
        3,
        3,
        10,
        3,
    ]  # sample.py: all that there are
    assert not any(flag in line for line in commands for flag in ("--amp", "--compile"))
    assert [one["row"] for one in rows.values() if "bound" in one] == [none["row"], dynamic["row"]]
    assert dynamic["bound"]["binarizations"] == 2 and none["bound_with_labels"][
        "label_cost"
    ] == math.log(10)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines()[2:6]]
    bounds = none["bound"], none["bound_with_labels"], None, dynamic["bound"]
    for line, one, bound in zip(lines, rows.values(), bounds, strict=True):
        weighted = bound and bound["importance_weighted"]["by_trajectories"][1]
        both = [
            f"{b['nats_per_image']:.1f} ± {b['standard_error']:.1f}" if b else ""
            for b in (bound, weighted)
        ]
        assert line[1:4] == [str(one["samples"]["timesteps"]), *both]
        real = one["real_digits_of_these_classes" if one["samples"]["labels"] else "real_digits"]
        assert (
            line[4] == f"{one['samples']['frechet_distance']:.3f} ({real['frechet_distance']:.3f})"
        )
    rows["thresholded, class given"]["real_digits_of_these_classes"]["precision"] = (
        7  # here as good as any others
    )
    assert headline.table(result).count("(7.000)") == 1


def test_trajectories(commands, conditional, tmp_path, monkeypatch):
    """Timesteps times trajectories are the same in each row; what evaluate.py says of the most trajectories."""
    monkeypatch.setattr(trajectories, "TIMESTEPS", (10, 20))
    out = succeed(
        "experiments.trajectories", conditional, *TRIAL, "--passes", 1000, "--amp", "--compile"
    )
    result = result_of("trajectories", tmp_path)
    assert out.strip() == trajectories.table(result) and list(result["rows"]) == [
        "10 timesteps"
    ]  # of 10
    (one,) = result["rows"].values()
    weighted = one["bound"]["importance_weighted"]["by_trajectories"][-1]
    assert weighted["trajectories"] == 100 and "--split validation" in " ".join(commands[0])
    assert "--amp" in commands[0] and "--compile" in commands[0]
    cells = [cell.strip() for cell in out.splitlines()[2].split("|")[1:-1]]
    assert cells[:2] == ["10", "100"]
    assert cells[2].endswith(f" ± {one['bound']['standard_error']:.2f}")
    assert cells[3] == f"{weighted['gain']:.2f} ± {weighted['gain_standard_error']:.2f}"
    assert cells[4] == f"{weighted['nats_per_image']:.2f} ± {weighted['standard_error']:.2f}"
    plain, gain, total = (float(cell.split()[0]) for cell in cells[2:])
    assert plain - gain == pytest.approx(total, abs=0.02)


def test_steps(commands, conditional, tmp_path):
    out = succeed("experiments.steps", conditional, *TRIAL, "--amp")
    result = result_of("steps", tmp_path)
    assert out.strip() == steps.table(result)
    assert [one["timesteps"] for one in result["rows"].values()] == [5, 10]  # the chain has no more
    assert [one["samples"]["timesteps"] for one in result["rows"].values()] == [5, 10]
    assert not any("--split" in line or "--compile" in line for line in commands)
    assert all("--amp" in line for line in commands)
    figure = steps.plot(result)
    curve, real = figure.axes[1].lines
    assert list(curve.get_xdata()) == [5, 10]
    for axis in figure.axes:  # ticks where the points are, and none between them
        labels = [
            label.get_text()
            for minor in (False, True)
            for label in axis.get_xticklabels(minor=minor)
        ]
        assert labels == ["5", "10"]
    last = result["rows"]["10 timesteps"]
    assert curve.get_ydata()[1] == last["samples"]["frechet_distance"]
    assert real.get_ydata()[0] == last["real_digits_of_these_classes"]["frechet_distance"]
    assert figure.axes[0].lines[0].get_ydata()[1] == last["bound"]["nats_per_image"]
    assert Image.open(tmp_path / "out" / "steps" / "steps.png").size[0] > 100
    for distance, scale in (
        (0.2, "linear"),
        (0.01, "log"),
    ):  # against that of real digits, drawn to 0 or over decades
        rows = {"5": report("5", 60, frechet_distance=distance) | {"timesteps": 5}}
        rows["5"]["real_digits"] = QUALITY | {"frechet_distance": 0.5}
        right = steps.plot({"title": "", "rows": rows}).axes[1]
        assert right.get_yscale() == scale and (right.get_ylim()[0] == 0) == (scale == "linear")
    assert "other arguments" in fail(
        "experiments.steps", *TRIAL
    )  # another checkpoint, the released one
    assert "is damaged" in fail("experiments.steps", __file__, *TRIAL)
    assert len(commands) == 2


def test_a_command_that_fails(tmp_path):
    with pytest.raises(
        RuntimeError,
        match=r"must be at least 1, got 0 \(train.py ended with code 2, see .*log.txt\)",
    ):
        common.command("train.py", ["--steps", 0], tmp_path / "run" / "log.txt")
    assert "usage:" in (tmp_path / "run" / "log.txt").read_text()


def test_from_anywhere(tmp_path):
    """As a user runs it: python -m, another working directory."""
    line = [sys.executable, "-m", "experiments.page", "missing.md"]
    done = subprocess.run(
        line, cwd=tmp_path, env=ENVIRONMENT | {"PYTHONPATH": str(REPOSITORY)}, capture_output=True
    )
    assert done.returncode == 1 and done.stderr.decode().startswith("page.py: error: ")
    assert len(done.stderr.splitlines()) == 1 and not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# Tables


QUALITY = {
    "frechet_distance": 0.5,
    "precision": 0.25,
    "recall": 0.75,
    "isolated_white": 0.125,
    "ink": 0.1,
}


def report(row, nats, **changes):
    bound = {"nats_per_image": nats, "standard_error": 0.25}
    return {
        "row": row,
        "levels": 2,
        "bound": bound,
        "samples": QUALITY | changes,
        "real_digits": QUALITY,
    }


def test_table_by_hand():
    rows = {
        "a": report("a", 70),
        "b": report("a", 71, frechet_distance=1.0),
        "c": report("b", "inf"),
    }
    assert common.table({"title": "7 steps", "rows": rows}).splitlines() == [
        "| 7 steps | seeds | bound | frechet distance | precision | recall | isolated white | ink |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| a | 2 | 70.5 (70.0 to 71.0) | 0.750 (0.500 to 1.000) | 0.25 (0.25 to 0.25) | 0.75 (0.75 to 0.75) "
        "| 0.125 (0.125 to 0.125) | 0.100 (0.100 to 0.100) |",
        "| b |  | inf ± 0.2 | 0.500 | 0.25 | 0.75 | 0.125 | 0.100 |",
        "| *real digits, 2 levels* |  |  | 0.500 | 0.25 | 0.75 | 0.125 | 0.100 |",
    ]


EVALUATION = report("", 60.04) | {
    "digits": "MNIST test split",
    "binarization": "dynamic",
    "timesteps": 200,
    "sha256": "0123456789abcdef",
}
EVALUATION["samples"] = QUALITY | {"images": 500, "timesteps": 50, "labels": True, "guidance": 0.25}


def test_evaluation_keeps_the_bound_and_the_samples_of_another_chain_apart():
    lines = evaluation.table(EVALUATION).splitlines()
    assert lines[2] == "| 200 timesteps, no labels | 60.0 ± 0.2 |  |  |  |  |  |"
    assert lines[3].startswith(
        "| 500 samples in 50 timesteps, labels, guidance 0.25 |  | 0.500 | 0.25 |"
    )
    assert len(lines) == 5
    mode = EVALUATION | {"samples": EVALUATION["samples"] | {"last_step": "mode"}}
    assert (
        "| 500 samples in 50 timesteps, labels, guidance 0.25, the last step's mode |"
        in evaluation.table(mode)
    )


def test_evaluation_of_the_bound_alone():
    """With labels, too, where the network takes them."""
    both = {
        key: value for key, value in EVALUATION.items() if key not in ("samples", "real_digits")
    }
    lines = evaluation.table(both | {"bound_with_labels": report("", 59)["bound"]}).splitlines()
    assert lines[2:] == [
        "| 200 timesteps, no labels | 60.0 ± 0.2 |",
        "| 200 timesteps, the true label, ln 10 for it included | 59.0 ± 0.2 |",
    ]


def test_evaluation_tells_the_importance_weighted_bound_of_the_most_trajectories():
    rows = [
        {
            "trajectories": k,
            "gain": k / 2,
            "gain_standard_error": 0.125,
            "nats_per_image": 60.25 - k,
            "standard_error": 0.5,
        }
        for k in (1, 2)
    ]
    weighted = EVALUATION["bound"] | {
        "importance_weighted": {"images": 40, "by_trajectories": rows}
    }
    last = evaluation.table(EVALUATION | {"bound": weighted}).splitlines()[-1]
    assert (
        "weighted, 2 trajectories, 200 timesteps, no labels: **58.25 ± 0.50 nats per image**"
        in last
    )
    assert last.endswith("(plain: 60.04; gain 1.00 ± 0.12, from 40 digits)")


@pytest.fixture
def page(fresh_directory, tmp_path):
    (tmp_path / "evaluation-small.json").write_bytes(json_bytes(EVALUATION))
    (tmp_path / "choices.json").write_bytes(
        json_bytes({"title": "7 steps", "rows": {"a": report("a", 70)}})
    )
    tables = "".join(
        f"<!-- table: {name} -->\n<!-- end -->\nmore\n" for name in ("evaluation-small", "choices")
    )
    (tmp_path / "page.md").write_text("# Results\n" + tables)
    filled = succeed("experiments.page", "page.md")
    (tmp_path / "page.md").write_text(filled)
    return filled


def test_page(page, tmp_path):
    assert evaluation.table(EVALUATION) in page and "| a | 70.0 ± 0.2 |" in page
    provenance = json.loads((tmp_path / "choices.json").read_text())["provenance"]
    assert (
        page.count(f"`{provenance['command']}`, {provenance['machine']}, torch {torch.__version__}")
        == 2
    )
    assert page.count(f"commit {provenance['commit']}, checkpoint 0123456789ab") == 1
    assert page.startswith("# Results\n") and page.count("<!-- end -->\nmore\n") == 2
    assert succeed("experiments.page", "page.md") == page  # filled again, it stays
    assert succeed("experiments.page", "page.md", "--check") == ""


def test_page_whose_tables_are_of_another_folder(page, tmp_path):
    (tmp_path / "above.md").write_text(f"<!-- table: {tmp_path.name}/choices -->\n<!-- end -->\n")
    (tmp_path / "above.md").rename(tmp_path.parent / f"{tmp_path.name}.md")
    assert "| a | 70.0 ± 0.2 |" in succeed(
        "experiments.page", tmp_path.parent / f"{tmp_path.name}.md"
    )


@pytest.mark.parametrize("name", ["README.md", "results_d3pm/released/README.md"])
def test_our_own_pages(name):
    assert "<!-- table: " in (REPOSITORY / name).read_text()
    succeed("experiments.page", REPOSITORY / name, "--check")


def test_page_check_notices_a_changed_number(page, tmp_path):
    (tmp_path / "page.md").write_text(page.replace("70.0", "69.0"))
    assert fail("experiments.page", "page.md", "--check").endswith(
        "the table choices is not what choices.json gives"
    )
    (tmp_path / "page.md").write_text(page)
    (tmp_path / "choices.json").write_bytes(
        json_bytes({"title": "7 steps", "rows": {"a": report("a", 71)}})
    )
    assert "choices" in fail("experiments.page", "page.md", "--check")


@pytest.mark.parametrize(
    "text, error",
    [
        ("<!-- table: choices -->\n", "has no name of one word, or no end"),
        (
            "<!-- table: choices -->\n<!-- table: choices -->\n<!-- end -->\n",
            "has no name of one word, or no end",
        ),
        (
            "<!-- table: nothing -->\n<!-- end -->\n",
            "there is no experiment 'nothing' with a table",
        ),
        (
            "<!-- table: forward -->\n<!-- end -->\n",
            "there is no experiment 'forward' with a table",
        ),
        ("<!-- table: choices-2 -->\n<!-- end -->\n", "choices-2.json"),
        (
            "<!-- table: benchmark -->\n<!-- end -->\n",
            "benchmark.json is no result of this experiment",
        ),
    ],
)
def test_page_that_cannot_be_filled(text, error, page, tmp_path):
    (tmp_path / "benchmark.json").write_text("{}")
    (tmp_path / "page.md").write_text(text)
    assert error in fail("experiments.page", "page.md")


# ---------------------------------------------------------------------------------------------------------------------
# evaluate.py --split


@pytest.mark.parametrize("split, other", [("test", "validation"), ("validation", "test")])
def test_split(split, other, monkeypatch):
    splits = {
        name: Digits(torch.zeros(1), torch.zeros(1), "mnist")
        for name in ("train", "validation", "test")
    }
    monkeypatch.setattr(evaluate, "load_digits", lambda name, *_: splits[name])
    digits = evaluate.real_digits(SimpleNamespace(data="mnist", data_root="", split=split), "mnist")
    assert (
        digits.test is splits[split]
        and digits.other is splits[other]
        and digits.train is splits["train"]
    )
    assert digits.name == f"MNIST {split} split" and not digits.seen


def test_split_is_test_by_default(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["evaluate.py"])
    assert evaluate.parse_arguments().split == "test"


# ---------------------------------------------------------------------------------------------------------------------
# The baseline


def test_plain_unet_is_the_common_one():
    network = baseline.PlainUNet()
    assert sum(p.numel() for p in network.parameters()) == 1_883_074
    assert (
        len(network.hidden_matrices()) == 11
    )  # nine 3x3 convolutions and two transposed ones, between the ends
    assert all(p.ndim == 4 and min(p.shape[:2]) >= 64 for p in network.hidden_matrices())


def test_mflop_of_the_plain_unet_by_hand():
    """2 x 9 x in x out x pixels for each 3x3 convolution, and so on."""
    double = lambda i, o, side: 2 * 9 * (i * o + o * o) * side**2  # noqa: E731
    by_hand = (
        double(1, 64, 32)
        + double(64, 128, 16)
        + double(128, 256, 8)
        + double(256, 128, 16)
        + double(128, 64, 32)
    )
    by_hand += 2 * 4 * (256 * 128 * 8**2 + 128 * 64 * 16**2)  # the transposed convolutions
    by_hand += 2 * 64 * 2 * 32**2 + 2 * (32 * 64 + 64 * 256)  # the last layer, the embedding of t
    assert benchmark.mflop(baseline.PlainUNet()) == pytest.approx(by_hand / 1e6)
    assert round(by_hand / 1e6) == 790


def test_mflop_of_the_unet():
    """Every convolution and linear layer by its weights and positions, attention as two products of N x N x C."""
    network, flops = UNet(), []

    def count(layer, inputs, output):
        positions = (
            (inputs[0] if isinstance(layer, torch.nn.ConvTranspose2d) else output).shape[2:].numel()
        )
        flops.append(
            2 * layer.weight.numel() * (1 if isinstance(layer, torch.nn.Linear) else positions)
        )

    def count_attention(layer, inputs, output):
        _, C, H, W = output.shape
        flops.append(2 * 2 * (H * W) ** 2 * C)

    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.ConvTranspose2d | torch.nn.Linear):
            layer.register_forward_hook(count)
        elif isinstance(layer, Attention):
            layer.register_forward_hook(count_attention)
    network(torch.zeros(1, 1, 32, 32, dtype=torch.long), torch.ones(1).long())
    by_hand = sum(flops) + 2 * 2 * 2 * 32**2  # and the table of the own state
    assert benchmark.mflop(network) == pytest.approx(by_hand / 1e6)


def random_digits(n=8):
    images = torch.randint(
        0, 256, (n, 1, 28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    return Digits(torch.nn.functional.pad(images, (2, 2, 2, 2)), torch.arange(n), "offline")


def test_usual_data_path_gives_the_same_images():
    digits = random_digits()
    usual, ours = baseline.PerSample(digits), to_levels(digits.images)
    assert len(usual) == 8
    assert all(torch.equal(usual[i][0], ours[i]) and usual[i][1] == i for i in range(8))


def test_usual_trainer_is_plain_adam(monkeypatch):
    """Two steps against torch's Adam at 1e-4 on the gradients of the same loss."""
    monkeypatch.setattr(baseline, "PlainUNet", lambda: UNet(channels=(8, 8, 8)))
    torch.manual_seed(0)
    trainer = baseline.usual_trainer(batch_size=4)
    assert (trainer.diffusion.config["schedule"], trainer.diffusion.loss_type) == (
        "linear",
        "cross_entropy",
    )
    assert trainer.max_grad_norm == math.inf
    twin = UNet(channels=(8, 8, 8))
    twin.load_state_dict(trainer.network.state_dict())
    adam = torch.optim.Adam(twin.parameters(), 1e-4)
    for x_0 in torch.randint(0, 2, (2, 4, 1, 32, 32)):
        trainer.step(x_0)
        for p, q in zip(twin.parameters(), trainer.network.parameters(), strict=True):
            p.grad = 1 * q.grad
        adam.step()
    assert all(
        torch.equal(p, q)
        for p, q in zip(twin.parameters(), trainer.network.parameters(), strict=True)
    )


# ---------------------------------------------------------------------------------------------------------------------
# The experiments that measure in their own process


@pytest.fixture
def toy_race(monkeypatch):
    for name, value in {
        "BATCH_SIZE": 2,
        "BOUND_IMAGES": 2,
        "NUM_SAMPLES": 20,
        "NORM_BATCHES": 2,
    }.items():
        monkeypatch.setattr(time_to_quality, name, value)
    monkeypatch.setattr(time_to_quality, "FRACTIONS", (1 / 2, 1))
    monkeypatch.setattr("experiments.common.load_digits", lambda *_: random_digits())


def test_time_to_quality(toy_race, commands, tmp_path):
    out = succeed(
        "experiments.time_to_quality", "--data", "offline", "--minutes", 1e-9, "--timesteps", 1
    )
    result = result_of("time_to_quality", tmp_path)
    assert out.strip() == time_to_quality.table(result)
    assert list(result["rows"]) == list(time_to_quality.CONTESTANTS)
    for name, one in result["rows"].items():
        assert [point["steps"] for point in one["curve"]] == [1, 2] and name in out
        assert 0 < one["curve"][0]["minutes"] < one["curve"][1]["minutes"]
        assert one["curve"][1]["bound"] == one["bound"] and one["samples"]["images"] == 20
    bounds = result["rows"]["PlainUNet, our recipe"]["bounds_of_rates"]
    assert list(bounds) == ["0.0005", "0.001", "0.002"]
    best = min(bounds, key=bounds.get)
    assert f"PlainUNet, our recipe, 2 steps, rate {best} |" in out
    assert len(time_to_quality.plot(result).axes[0].lines) == 3
    assert Image.open(tmp_path / "out" / "time_to_quality" / "time_to_quality.png").size[0] > 100
    assert "other arguments" in fail(
        "experiments.time_to_quality", "--data", "offline", "--timesteps", 1
    )


@pytest.mark.parametrize("rate", [None, 1e-3])
def test_race_judges_what_was_trained(rate, toy_race, monkeypatch):
    class Small(UNet):
        """With a batch norm in front of the output, to see what becomes of it."""

        def __init__(self):
            super().__init__(channels=(8, 8, 8))
            self.unfold[0] = torch.nn.BatchNorm2d(8)

    monkeypatch.setattr(baseline, "PlainUNet", Small)
    race = time_to_quality.Race(Small, rate, 4, random_digits()).train(3)
    trainer, x_0 = race.trainer, to_levels(random_digits().images)
    assert len(race.seconds) == 3 and trainer.steps == 3
    before = [p.clone() for p in trainer.network.parameters()]
    race.bound(x_0)
    network = trainer.network if rate is None else trainer.averaged.model
    assert race.judged.model is network and not network.training
    assert network.unfold[0].num_batches_tracked == 2  # those of NORM_BATCHES alone
    assert race.judged.loss_type == ("cross_entropy" if rate is None else "variational")
    assert race.judged.config["schedule"] == ("linear" if rate is None else "cosine")
    assert type(trainer.optimizer) is (baseline.ConstantAdam if rate is None else Muon)
    assert all(torch.equal(p, q) for p, q in zip(before, trainer.network.parameters(), strict=True))
    drawn_by = []
    sample = DiscreteDiffusion.sample
    monkeypatch.setattr(
        DiscreteDiffusion, "sample", lambda self, n: drawn_by.append(self) or sample(self, n)
    )
    race.samples(2)
    assert (
        drawn_by[0].reverse == ("argmax" if rate is None else "mixture")
        and race.judged.reverse == "mixture"
    )
    assert drawn_by[0].model is network and drawn_by[0].timesteps == 2
    race.train(4)
    assert trainer.network.training


def test_forward(commands, tmp_path):
    succeed("experiments.forward", "--data", "offline", "--digit", 3)
    result = result_of("forward", tmp_path)
    assert result["t"] == list(range(0, 201, 25)) and result["share_of_pixels_changed"][0] == 0
    expected = 1 - DiscreteDiffusion(torch.nn.Identity()).bar_Q[result["t"], 0, 0]
    assert torch.allclose(
        torch.tensor(result["share_of_pixels_changed"]).double(), expected, atol=0.06
    )
    assert Image.open(tmp_path / "out" / "forward" / "forward.png").size[0] > 500


def test_benchmark(commands, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(benchmark, "BATCHES", (1, 2, 3))
    monkeypatch.setattr(benchmark, "PRODUCT", 64)
    monkeypatch.setattr(benchmark, "FEW", 1)
    monkeypatch.setattr(benchmark, "peak_memory_mb", lambda command: 321.0)
    process = SimpleNamespace(run=lambda line, **_: started.append([str(word) for word in line]))
    monkeypatch.setattr(benchmark, "subprocess", process)
    monkeypatch.setattr(benchmark, "load_digits", lambda *_: random_digits())
    trainers, take_turns = [], benchmark.take_turns

    def half_a_second_each(*arguments):
        return dict.fromkeys(take_turns(*arguments), 0.5)

    def trainer(diffusion, total, batch_size, **options):
        trainers.append((diffusion.loss_type, batch_size, options))
        return Trainer(diffusion, total, batch_size, **options)

    monkeypatch.setattr(benchmark, "take_turns", half_a_second_each)
    monkeypatch.setattr(benchmark, "Trainer", trainer)
    out = succeed("experiments.benchmark", "--batch-size", 2, "--rounds", 1, "--device", "cpu")
    result = result_of("benchmark", tmp_path)
    assert out.strip() == benchmark.table(result) and "321" in out
    rates = {"UNet, batch 3": 90.0}
    assert "| UNet, batch 3 | 90 | 3.0 |" in benchmark.table(
        result | {"drawing": rates}
    )  # 30 passes an image
    networks = result["training"]["networks"]
    assert list(networks) == [
        "UNet",
        "UNet, variational",
        "UNet, --amp",
        "UNet, --compile",
        "PlainUNet",
    ]
    for one in networks.values():
        assert list(one["shares"]) == list(benchmark.PARTS) and sum(
            one["shares"].values()
        ) == pytest.approx(1)
        assert min(one["shares"].values()) > 0 and one["images_per_second"] == 4
        assert one["gflops"] == pytest.approx(3 * one["mflop_per_image"] * 4 / 1000)
    muon = {"optimizer": "muon"}
    assert trainers == [
        ("cross_entropy", 2, muon),
        ("variational", 2, muon),
        ("cross_entropy", 2, muon | {"amp": True}),
        ("cross_entropy", 2, muon | {"compiled": True}),
    ]
    assert result["training"]["matrix_product_gflops"] == pytest.approx(2 * 64**3 / 0.5 / 1e9)
    assert list(result["drawing"].values()) == [2, 4, 6, 6]
    assert networks["PlainUNet"]["weights"] == 1_883_074
    assert list(result["drawing"]) == [
        *(f"UNet, batch {B}" for B in (1, 2, 3)),
        "PlainUNet, batch 3",
    ]
    assert [line[1].endswith("sample.py") for line in started] == [
        True,
        False,
    ] * 2  # warm-up and one round, in turns


def test_benchmark_looks_before_it_measures(commands, monkeypatch):
    monkeypatch.setattr(benchmark, "sixteen_digits", lambda *_: pytest.fail("has begun to measure"))
    assert "batch size" in fail("experiments.benchmark", "--data", "offline", "--batch-size", 5000)
    assert "can't be used" in fail(
        "experiments.benchmark", "--data", "offline", "--device", "nonsense"
    )


def test_median_of_turns(monkeypatch):
    """The first turn warms up and does not count; on CUDA the first four, the last of which records the step."""
    clock = iter([0, 100, 0, 1, 0, 5, 0, 3])
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: next(clock))
    assert benchmark.take_turns({"a": lambda: None}, 3, torch.device("cpu")) == {"a": 3}
    clock = iter([*[0, 100] * 4, 0, 1, 0, 5, 0, 3])
    waits = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(1))
    assert (
        benchmark.take_turns({"a": lambda: None}, 3, torch.device("cuda")) == {"a": 3}
        and len(waits) == 7
    )


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_peak_memory(tmp_path):
    """Of a process that holds 200 MB for a moment, and of one that fails."""
    small, large = (
        [sys.executable, "-c", f"bytearray({n} * 10**6); import time; time.sleep(0.2)"]
        for n in (1, 200)
    )
    assert 150 < benchmark.peak_memory_mb(large) - benchmark.peak_memory_mb(small) < 250
    with pytest.raises(RuntimeError, match="ended with code 3"):
        benchmark.peak_memory_mb([sys.executable, "-c", "raise SystemExit(3)"])


def test_cells():
    assert (
        common.cell([-1e-15], 3) == "0.000"
        and common.cell(["inf"], 1) == "inf"
        and common.cell([], 1) == ""
    )
    assert common.cell([1, 2, 6], 1) == "3.0 (1.0 to 6.0)"


def test_levels(commands, cheap, tmp_path):
    out = succeed(
        "experiments.levels", *TRIAL, "--levels", 3, "--steps", 2, "--timesteps", 15, "--seeds", 2
    )
    result = result_of("levels-3", tmp_path)
    assert out.strip() == levels.table(result)
    assert [line.count(" to ") for line in out.splitlines()[2:]] == [1] * 4 + [
        0
    ] * 3  # ranges of the bound alone
    again = [f"{row}, seed 1" for row in levels.ROWS]
    assert list(result["rows"]) == [
        *(f"{row}, seed 0" for row in levels.ROWS | levels.ONCE),
        *again,
    ]


def test_table_of_levels_in_bits():
    """By hand: the parts are in nats, of which each run has as many to a bit as its bound says."""
    bounds = [(2, 10, 1, 0, 9, 1), (4, 10, 2, 0, 5, 5)]
    keys = "bits_per_dimension", "nats_per_image", "standard_error", "L_T", "sum_L_t_minus_1", "L_0"
    runs = {
        f"{seed}": {"row": "a", "bound": dict(zip(keys, bound, strict=True))}
        for seed, bound in enumerate(bounds)
    }
    last = levels.table({"title": "few", "rows": runs}).splitlines()[-1]
    assert last == "| a | 2 | 3.000 (2.000 to 4.000) | 0.500 | 0.000 | 1.900 | 1.100 |"


def test_noise(commands, tmp_path):
    out = succeed("experiments.noise", "--levels", 3, "--timesteps", 15)
    assert (
        out.strip() == noise.table(result_of("noise", tmp_path)) and "absorbing, mutual_info" in out
    )
    assert Image.open(tmp_path / "out" / "noise" / "noise.png").size[0] > 100
    curves = {"a": {"changed": [0, 0, 0], "mutual_information": [1, 0.256, 0]}}
    last = noise.table({"levels": 3, "timesteps": 2, "curves": curves}).splitlines()[-1]
    assert (
        last == "| a | 100 | 100 | 100 | 26 | 0 | 0 |"
    )  # t = 0, 0, 0, 1, 2, 2 of 2: round takes the even one


def metrics(folder, bounds, rates):
    """A run's metrics.csv, an epoch of 100 steps in an hour."""
    folder.mkdir()
    lines = [
        f"{n},{100 * n},0.1,{bound},{rate},50,3600"
        for n, (bound, rate) in enumerate(zip(bounds, rates, strict=True), 1)
    ]
    (folder / "metrics.csv").write_text(
        "\n".join(["epoch,step,train_loss,validation_bound,lr,images_per_second,seconds", *lines])
    )
    return folder


def test_curve(commands, tmp_path):
    """A power law is found and prolonged; the branch is drawn from the last epoch that it shares."""
    bounds = [90, 90, *(79 + 30 / (100 * n) ** 0.25 for n in range(3, 21))]
    run, branch = (
        metrics(tmp_path / "run", bounds, [1] * 20),
        metrics(tmp_path / "branch", [*bounds[:9], 80], [1] * 9 + [0]),
    )
    out = succeed("experiments.curve", run, branch)
    result = result_of("curve", tmp_path)
    assert result["fit"] == pytest.approx([79, 30, 0.25])
    assert out.splitlines() == [
        "| 79.0 + 30 / step^0.25 | steps | hours | validation bound, nats per image |",
        "| --- | ---: | ---: | ---: |",
        f"| run | 2,000 | 20.0 | {bounds[-1]:.2f} |",
        "| branch | 1,000 | 10.0 | 80.00 |",
        f"| *the first, prolonged* | 4,000 |  | {79 + 30 / 4000**0.25:.2f} |",
        f"| *the first, prolonged* | 8,000 |  | {79 + 30 / 8000**0.25:.2f} |",
    ]
    first, second, fit = curve.figure(result).axes[0].lines
    assert (
        len(first.get_xdata()) == 20
        and list(second.get_xdata()) == [900, 1000]
        and fit.get_xdata()[-1] == pytest.approx(8000)
    )
    assert Image.open(tmp_path / "out" / "curve" / "curve.png").size[0] > 100


def test_curve_of_a_run_that_brings_its_rate_down_itself(commands, tmp_path):
    """Which is drawn to its end, but says nothing about where a longer one would be."""
    bounds = [79 + 30 / (100 * n) ** 0.25 for n in range(1, 21)]
    run = metrics(tmp_path / "run", [*bounds[:14], *[70] * 6], [1] * 14 + [0.5] * 6)
    succeed("experiments.curve", run, metrics(tmp_path / "other", range(9), [1] * 9))
    result = result_of("curve", tmp_path)
    assert result["fit"] == pytest.approx([79, 30, 0.25])
    run, other, fit = curve.figure(result).axes[0].lines
    assert len(other.get_xdata()) == 9  # another run of a constant rate is drawn whole
    assert (
        list(run.get_ydata()) == result["rows"]["run"]["validation_bound"]
        and run.get_ydata()[-1] == 70
    )
    assert (fit.get_xdata()[0], fit.get_xdata()[-1]) == pytest.approx((700, 8000))


def test_curve_refuses_what_is_no_run(commands, tmp_path):
    run = metrics(tmp_path / "run", range(20), [1] * 20)
    assert "metrics.csv" in fail("experiments.curve", tmp_path)
    for name, rates in (("short", [1] * 8), ("low", [1] * 8 + [0] * 12)):
        short = metrics(tmp_path / name, range(len(rates)), rates)
        assert "2 validations at a constant rate" in fail("experiments.curve", short)
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "metrics.csv").write_text(
        "epoch,step,train_loss,validation_bound,lr,seconds\n"
    )
    assert "validated nothing" in fail("experiments.curve", run, tmp_path / "none")
    assert "of one name" in fail("experiments.curve", run, run)
    (tmp_path / "short" / "metrics.csv").write_text("a,b\n1,2\n")
    assert "no metrics.csv" in fail("experiments.curve", tmp_path / "short")


def test_fill(commands, conditional, tmp_path, monkeypatch):
    """A row for each part and N, the part alone and the real digits beside them; drawn where nothing was given."""
    digits = dataset.load_digits("validation", "offline")
    monkeypatch.setattr(fill, "load_digits", lambda *_: digits)
    flags = "--timesteps", 2, "--digits", 20, "--particles", 1, 2, "--device", "cpu"
    made, make = [], fill.accelerated
    monkeypatch.setattr(fill, "accelerated", lambda *args: made.append(make(*args)) or made[-1])
    out = succeed("experiments.fill", conditional, *flags, "--amp")
    assert [type(network) for network in made] == [Autocast]
    result = result_of("fill", tmp_path)
    assert out.splitlines()[:-1] == fill.table(result).splitlines() and result["digits"] == 20
    for rows in result["parts"].values():
        assert list(rows) == ["part alone", "N = 1", "N = 2", "real digits"]
        assert (
            rows["real digits"]["read_as_true_class"]
            > 0.9
            > rows["part alone"]["read_as_true_class"]
        )
        assert rows["real digits"]["frechet_distance"] < min(
            rows[f"N = {N}"]["frechet_distance"] for N in (1, 2)
        )
    assert Image.open(tmp_path / "out" / "fill" / "fill.png").size[0] > 100


@pytest.mark.parametrize(
    "name", sorted(path.stem for path in (REPOSITORY / "experiments").glob("*.py"))
)
def test_each_is_an_experiment_or_a_room(name):
    if name not in ("__init__", "common", "baseline", "evaluation"):
        assert "usage:" in succeed(f"experiments.{name}", "--help")
