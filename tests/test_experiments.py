"""Every experiment from end to end at toy size; tables by hand; the baseline is the common one."""

import functools
import io
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

from cli import REPOSITORY, UserError

import matplotlib
import pytest
import torch
from fontTools import subset
from PIL import Image
from scripts import ENVIRONMENT, call, fail, spy, succeed, untrained

import dataset
import train
from checkpoint import json_bytes, read_checkpoint
from dataset import Dataset, to_levels
from diffusion import DiscreteDiffusion
from experiments import baseline, benchmark, common, figures, letters, page, tables
from model import UNet
from trainer import Muon, Trainer

SMALL = {
    "train.py": "--limit 64 --batch-size 16 --channels 8 8 8 --timesteps 60 --device cpu",
    "evaluate.py": "--num-samples 20 --repeats 1 --device cpu",
}
TRIAL = ("--data", "offline")
CHOICES = ("experiments.tables", "choices", *TRIAL)

load_offline = functools.cache(dataset.load_offline)  # it takes half a second each time


@pytest.fixture
def out(fresh_directory, tmp_path, monkeypatch):
    """The folder that results go to."""
    monkeypatch.setattr(common, "OUT", tmp_path / "out")
    monkeypatch.setattr(dataset, "load_offline", load_offline)
    return tmp_path / "out"


@pytest.fixture
def commands(out, monkeypatch):
    """The commands of tables.py, which run in here and are made small."""
    done = []

    def command(script, *arguments):
        done.append(" ".join([script, *map(str, arguments)]))
        small = SMALL[script]
        if "--num-samples 0" in done[-1]:
            small = "--images 20 --repeats 1 --device cpu"
        code, _, err = call(script, *arguments, *small.split())
        if code:
            raise UserError(err.strip().splitlines()[-1])

    monkeypatch.setattr(tables, "command", command)
    return done


@pytest.fixture
def only(monkeypatch):
    """Replace the rows of a table."""

    def keep(name, rows):
        title, _, show = tables.TABLES[name]
        monkeypatch.setitem(tables.TABLES, name, (title, lambda: rows, show))

    return keep


@pytest.fixture
def constants(monkeypatch):
    """Replace names of a module."""

    def replace(module, **values):
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)

    return replace


def no_power_at(at, step=Trainer.step):
    """Trainer.step, which fails after so many steps."""

    def breaks(self, *batch):
        if self.steps == at:
            raise UserError("no power")
        return step(self, *batch)

    return breaks


def result_of(name, out):
    return json.loads((out / name / f"{name}.json").read_text())


def random_digits(n=8):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, 1, 28, 28), generator=generator, dtype=torch.uint8)
    return Dataset(torch.nn.functional.pad(images, (2, 2, 2, 2)), torch.arange(n), "offline")


# ------------------------------------------------------------------------------------------------
# Tables that are lists of commands


def test_choices(commands, only, cheap, out):
    label, other = "absorbing, mutual_info, variational", "uniform, cosine, cross-entropy"
    keys = [f"{other}, seed 0", f"{label}, seed 1"]
    rows = {key: tables.choices()[key] for key in keys}
    short = {key: row.train.replace("--steps 650", "--steps 2") for key, row in rows.items()}
    only("choices", {key: row._replace(train=short[key]) for key, row in rows.items()})
    flags = *CHOICES, "--rows", label
    text = succeed(*flags)
    result = result_of("choices", out)
    assert text.strip() == common.table(result)
    assert list(result["rows"]) == keys[1:]
    train, bound, samples = commands[:3]
    assert train.startswith("train.py") and "--lr 2e-3 --optimizer adamw" in train
    assert "--num-samples 0" in bound and "--split validation" in bound
    assert "--timesteps 50 --last-step draw" in samples and "--split validation" in samples
    one = result["rows"][keys[1]]
    assert one["timesteps"] == 60 and one["samples"]["timesteps"] == 50  # bound of the whole chain
    assert one["bound"]["images"] > 2
    assert "--seed 1" in one["flags"] and "--data offline" in one["flags"]
    assert {"command", "machine", "torch", "commit"} == one["provenance"].keys()

    commands.clear()  # a row with the same flags is not measured again, one with others is refused
    assert succeed(*flags) == text and not commands
    assert "with other flags" in fail(*flags, "--amp")
    assert "there is no row 'x'" in fail(*flags[:-1], "x")
    assert not commands


def test_a_run_goes_on_where_it_was_and_is_not_used_with_other_flags(
    commands, only, cheap, out, monkeypatch
):
    label = "uniform, cosine, cross-entropy"
    row = tables.Row(label, ["--num-samples 0 --images 20"], "--steps 6")

    def scripts(row=row):
        commands.clear()
        only("choices", {f"{label}, seed 0": row})
        (out / "choices" / "choices.json").unlink(missing_ok=True)
        succeed(*CHOICES)
        return [line.split()[0] for line in commands]

    only("choices", {f"{label}, seed 0": row})
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", no_power_at(5))  # in the second epoch
        code, _, err = call(*CHOICES)
    assert code == 1 and err.strip().endswith("error: no power")
    assert scripts() == ["train.py", "evaluate.py"] and commands[0].endswith("--resume")
    assert scripts() == ["evaluate.py"]  # the run is finished
    assert scripts(row._replace(train="--steps 2"))[0] == "train.py"
    assert "--resume" not in commands[0]
    steps = {read_checkpoint(file)["step"] for file in out.rglob("last.pth")}
    assert steps == {6, 2}


def test_rows_that_are_done_are_kept(out, only, monkeypatch):
    """When another row fails, and when they are of an older file."""
    old = {"provenance": {"command": "old"}, "title": "a", "rows": {"old": report("old", 70)}}
    (out / "choices").mkdir(parents=True)
    (out / "choices" / "choices.json").write_bytes(json_bytes(old))
    works = ["a"]

    def measure(row, folder, every):
        if row.label not in works:
            raise UserError("no power")
        return report(row.label, 1)

    monkeypatch.setattr(tables, "measure", measure)
    only("choices", {label: tables.Row(label, [], "x") for label in "ab"})
    assert "no power" in call(*CHOICES)[2]
    result = result_of("choices", out)
    assert list(result["rows"]) == ["old", "a"] and result["provenance"] == {"command": "old"}
    works[:] = ["b"]
    succeed(*CHOICES)
    result = result_of("choices", out)
    assert list(result["rows"]) == ["old", "a", "b"] and result["rows"]["old"] == old["rows"]["old"]
    only("choices", {"old": tables.Row("old", [])})
    assert "'old' with other flags" in fail(*CHOICES)
    (out / "choices" / "choices.json").write_text("{")
    assert "choices.json is damaged" in fail(*CHOICES)


ROWS = [("headline", "thresholded, class given"), ("steps", "5 timesteps")]
ROWS.append(("guidance", "--guidance 0.25"))


@pytest.mark.parametrize("name, label", ROWS)
def test_released_models(name, label, commands, only, out, tmp_path):
    """The flags of the tables of released models are those that evaluate.py takes."""
    file = tmp_path / "model.pth"
    untrained(file, timesteps=100, config={"num_labels": 10})
    row = tables.TABLES[name][1]()[label]
    only(name, {label: row._replace(evaluate=[f"{row.evaluate[0]} --images 2"], checkpoint=file)})
    succeed("experiments.tables", name, *TRIAL)
    (one,) = result_of(name, out)["rows"].values()
    assert ("bound" in one) == (name == "steps")
    assert one["samples"]["guidance"] == (0.25 if name == "guidance" else 0)
    assert one["sha256"] == dataset.sha256(file)
    mode = "draw" if name == "headline" else "mode"
    assert one["samples"]["last_step"] == mode and one["samples"]["labels"]
    assert ["--split validation" in line for line in commands] == [name == "guidance"]


def test_flags():
    row = tables.choices()["the paper's configuration, seed 2"]
    assert row.train == "--steps 650 --recipe paper --seed 2"
    rows = tables.headline()
    assert all("--num-samples 5000" in row.evaluate[0] for row in rows.values())
    drawn = ["--last-step draw" in row.evaluate[0] for row in rows.values()]
    assert drawn == [True, True, False, True]
    assert [row.checkpoint == tables.DYNAMIC for row in rows.values()] == [False] * 3 + [True]
    for row in (*rows.values(), *tables.likelihood().values()):
        (flags,) = row.evaluate
        dynamic = row.checkpoint == tables.DYNAMIC
        assert dynamic == ("--binarizations 2" in flags) == row.label.startswith("dyn")
        # The weights are of a few digits, the plain bound is of all of them.
        assert ("--trajectories" in flags) == ("--weighted-images" in flags)
        assert "--images" not in flags or tables.NO_BOUND in flags


def test_levels(commands, cheap, only):
    rows = tables.levels()
    assert len(rows) == 7 + 7 + 11 and "256 levels, uniform, seed 1" in rows
    key = "8 levels, gaussian, joint form, logistic, seed 0"
    row = rows[key]._replace(train=rows[key].train.replace("400", "2"))
    only("levels", {key: row._replace(evaluate=[row.evaluate[0].replace("1000", "20")])})
    text = succeed("experiments.tables", "levels", *TRIAL)
    assert text.splitlines()[0] == "| bits per dimension | 8 levels | L_0 alone |"
    assert "--split validation" in commands[1] and "--loss variational" in commands[0]


def test_a_command_that_fails(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(tables, "REPOSITORY", tmp_path)
    (tmp_path / "train.py").write_text("import sys; sys.exit(f'no {sys.argv[1:]}')")
    with pytest.raises(UserError, match=r"train.py failed with code 1; finished rows are kept"):
        tables.command("train.py", "--steps", 0)
    assert "no ['--steps', '0']" in capfd.readouterr().err


def test_from_anywhere(tmp_path):
    """As a user runs it: python -m, another working directory."""
    line = [sys.executable, "-m", "experiments.page", "missing.md"]
    environment = ENVIRONMENT | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("page.py: error: ")
    assert len(done.stderr.splitlines()) == 1 and not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------
# Tables by hand

QUALITY = {"images": 300, "frechet_distance": 0.5, "precision": 0.25, "recall": 0.75}
QUALITY |= {"isolated_white": 0.25, "ink": 0.1}


def report(row, nats, **changes):
    bound = {"nats_per_image": nats, "standard_error": 0.25}
    one = {"row": row, "levels": 2, "bound": bound, "samples": QUALITY | changes}
    return one | {"real_digits": QUALITY}


def weighted(nats):
    last = {"trajectories": 1000, "nats_per_image": nats - 2, "standard_error": 0.5}
    bound = {"nats_per_image": nats, "standard_error": 0.25}
    return bound | {"importance_weighted": {"by_trajectories": [{}, last]}}


def test_table_by_hand():
    rows = {
        "a": report("a", 70),
        "b": report("a", 71, frechet_distance=1.0),
        "c": report("b", "inf"),
        "d": {"row": "d", "bound": weighted(60)},
    }
    assert common.table({"title": "7 steps", "rows": rows}).splitlines() == [
        "| 7 steps | seeds | bound | importance-weighted bound | Fréchet distance | precision "
        "| recall | isolated white | ink |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| a | 2 | 70.5 (70.0 to 71.0) |  | 0.750 (0.500 to 1.000) | 0.25 (0.25 to 0.25) "
        "| 0.75 (0.75 to 0.75) | 0.250 (0.250 to 0.250) | 0.100 (0.100 to 0.100) |",
        # sqrt(0.25 * 0.75 / 300)
        "| b |  | inf ± 0.25 |  | 0.500 | 0.25 | 0.75 | 0.250 ± 0.025 | 0.100 |",
        "| d |  | 60.00 ± 0.25 | 58.00 ± 0.50 |  |  |  |  |  |",
        "| *real digits* |  |  |  | 0.500 | 0.25 | 0.75 | 0.250 ± 0.025 | 0.100 |",
    ]


def test_cells():
    assert common.cell([-1e-15], 3) == "0.000" and common.cell([], 1) == ""
    assert common.cell(["inf"], 1) == "inf" and common.cell([1, 2, 6], 1) == "3.0 (1.0 to 6.0)"
    assert json.loads(json_bytes(report("a", math.inf)))["bound"]["nats_per_image"] == "inf"


def test_headline_by_hand():
    rows = {label: report(label, 0) for label in tables.headline()}
    none, given, default, dynamic = rows
    rows[none] |= {"bound": weighted(60), "bound_with_labels": weighted(59)}
    rows[dynamic]["bound"] = weighted(80)
    for label in (given, default):
        del rows[label]["bound"]
    rows[given] |= {"real_digits_of_these_classes": QUALITY | {"frechet_distance": 7}}
    for one in rows.values():
        one["samples"] = one["samples"] | {"timesteps": 30}
    rows[given]["samples"]["label_accuracy"] = 0.9
    small = tables.headline_table({"title": "5", "rows": rows}, small=True).splitlines()
    assert small[0].count("|") == 6 and len(small) == 6  # five columns, four rows
    assert small[2:] == [
        f"| {none} | 60.0 ± 0.2 | 58.0 ± 0.5 | 0.500 (0.500) |  |",
        f"| {given} | 59.0 ± 0.2 | 57.0 ± 0.5 | 0.500 (7.000) | 0.900 |",
        f"| {default} |  |  | 0.500 (0.500) |  |",
        f"| {dynamic} | 80.0 ± 0.2 | 78.0 ± 0.5 | 0.500 (0.500) |  |",
    ]
    full = tables.headline_table({"title": "5", "rows": rows})
    assert f"| {none} | 30 | 60.0" in full and "0.250 ± 0.025 (0.250 ± 0.025)" in full


def test_levels_by_hand():
    """L_0 is in nats, of which each run has as many to a bit as its bound says."""
    keys = "bits_per_dimension", "nats_per_image", "L_0"
    runs = [("a", 256, (2, 10, 1)), ("a", 256, (4, 10, 5)), ("b", 8, (1, 1, 1))]
    rows = {
        f"{i}": {"row": row, "levels": K, "bound": dict(zip(keys, bound, strict=True))}
        for i, (row, K, bound) in enumerate(runs)
    }
    lines = tables.levels_table({"title": "bits", "rows": rows}).splitlines()
    assert lines[0] == "| bits | 8 levels | 256 levels | L_0 alone |"
    assert lines[2] == "| a |  | 3.000 (2.000 to 4.000) | 1.100 (0.200 to 2.000) |"
    assert lines[3] == "| b | 1.000 |  |  |"


def test_offline_by_hand():
    """Three seeds of the longest runs that are compared; columns in order of their number."""
    rows = tables.offline()
    assert len(rows) == len({row.train for row in rows.values()}) == 2 * (3 + 3) + 4
    assert "--epochs 5 --loss hybrid" in rows["5 epochs, hybrid, rate 4e-3, seed 0"].train
    runs = [("10 epochs, a", 70.04, 0.5), ("5 epochs, a", 90, 2), ("5 epochs, a", 92, 3)]
    rows = {
        f"{i}": {
            "row": row,
            "bound": {"nats_per_image": bound, "standard_error": 1},
            "samples": {"frechet_distance": distance},
        }
        for i, (row, bound, distance) in enumerate([*runs, ("5 epochs, b", 80, 1)])
    }
    lines = tables.offline_table({"title": "both", "rows": rows}).splitlines()
    assert lines[0] == "| both | 5 epochs | 10 epochs |"
    a = "91.0 (90.0 to 92.0); 2.50 (2.00 to 3.00)"
    assert lines[2:] == [f"| a | {a} | 70.0 ± 1.0; 0.50 |", "| b | 80.0 ± 1.0; 1.00 |  |"]


def test_what_helps_few_pictures(commands, cheap, only, out, monkeypatch):
    """The best validation bound is one on the way; training losses are per image."""
    rows = tables.augment()
    assert ["--augment 0.5" in row.train for row in rows.values()] == [False, True] * 4
    assert all("--steps 2625" in row.train for row in rows.values())
    assert "--validate-every 15 --limit 4500" in rows["4,500 digits"].train
    rows = tables.small()
    for name, row in rows.items():
        assert ("--augment 0 " in f"{row.train} ") == ("augment" not in name)
    bounds = iter([70.0, 60.06, 65.0])
    monkeypatch.setattr(Trainer, "validate", lambda self, x_0: next(bounds))
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    (key, row), made = ("augment 0.5", rows["augment 0.5"]), spy(monkeypatch, train, "Trainer")
    only("small", {key: row._replace(train=row.train.replace("--epochs 150", "--epochs 3"))})
    lines = succeed("experiments.tables", "small", *TRIAL).splitlines()
    assert made[0][0][0].config["loss_type"] == "variational" and made[0][1]["lr"] == 2e-3
    one = result_of("small", out)["rows"][key]
    assert one["best"]["epoch"] == 2 and one["last"]["validation_bound"] == 65
    bound, loss = one["bound"], one["last"]["train_loss"] * 1024
    assert lines[0].startswith("| 150 epochs | bound | best and last on the way | training")
    start = f"{bound['nats_per_image']:.1f} ± {bound['standard_error']:.1f} | 60.1 (epoch 2); 65.0"
    assert lines[2].startswith(f"| augment 0.5 | {start} | {loss:.1f} | ")


# ------------------------------------------------------------------------------------------------
# The page


@pytest.fixture
def filled_page(fresh_directory, tmp_path):
    result = {"title": "7 steps", "rows": {"a": report("a", 70)}}
    (tmp_path / "choices.json").write_bytes(json_bytes(result))
    text = "# Results\n<!-- table: choices -->\n<!-- end -->\nmore\n"
    (tmp_path / "page.md").write_text(text)
    (tmp_path / "page.md").write_text(succeed("experiments.page", "page.md"))
    return (tmp_path / "page.md").read_text()


def test_page(filled_page, tmp_path):
    p = json.loads((tmp_path / "choices.json").read_text())["provenance"]
    source = f"{p['machine']}, torch {torch.__version__}, commit {p['commit']}"
    source = f"\n`python -m experiments.tables choices`: {source} <!-- end -->\n"
    assert "| a | 70.00 ± 0.25 |" in filled_page and source in filled_page
    assert filled_page.startswith("# Results\n") and filled_page.endswith("<!-- end -->\nmore\n")
    assert succeed("experiments.page", "page.md") == filled_page  # filled again, it stays
    assert succeed("experiments.page", "page.md", "--check") == ""
    (tmp_path / "page.md").write_text(filled_page.replace("70.0", "69.0"))
    error = fail("experiments.page", "page.md", "--check")
    assert error.endswith("the table choices differs from choices.json")


def test_source_says_what_differs():
    p = {"command": "c", "machine": "m", "torch": "2", "commit": "1"}
    rows = {f"a, seed {seed}": {"row": "a"} for seed in range(2)}
    other = p | {"machine": "n", "commit": "3"}
    rows |= {name: {"row": name[0], "provenance": other} for name in ("b, 0", "b, 1", "d")}
    line = "m, torch 2, commit 1"
    assert page.source({"provenance": p, "rows": rows}) == f"{line}; b, d: n, torch 2, commit 3"
    assert page.source({"provenance": p}) == line


def test_the_front_page_has_the_small_table():
    released = REPOSITORY / "results_d3pm" / "released"
    assert page.filled("released/headline", released.parent).splitlines()[0].count("|") == 6
    assert page.filled("headline", released).splitlines()[0].count("|") > 6


def test_our_own_page():
    text = (REPOSITORY / "results_d3pm" / "released" / "README.md").read_text()
    assert "<!-- table: " in text
    succeed("experiments.page", "--check")
    succeed("experiments.page", REPOSITORY / "README.md", "--check")


NO_END = "a table has no one-word name or no end"
BROKEN = {
    "<!-- table: choices -->\n": NO_END,
    "<!-- table: choices -->\n<!-- table: choices -->\n<!-- end -->\n": NO_END,
    "<!-- table: noise -->\n<!-- end -->\n": "there is no experiment 'noise' with a table",
    "<!-- table: fill -->\n<!-- end -->\n": "fill.json",
    "<!-- table: benchmark -->\n<!-- end -->\n": "benchmark.json is damaged",
}


@pytest.mark.parametrize("text", BROKEN)
def test_page_that_cannot_be_filled(text, filled_page, tmp_path):
    (tmp_path / "benchmark.json").write_text("{")
    (tmp_path / "page.md").write_text(text)
    assert BROKEN[text] in fail("experiments.page", "page.md")


# ------------------------------------------------------------------------------------------------
# The baseline


def test_most_probable_gives_the_posterior_of_the_argmax():
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randint(0, 2, (3, 1, 4, 4), generator=generator)
    logits, t = torch.randn(3, 2, 4, 4, generator=generator), torch.tensor([1, 5, 10])
    network = baseline.most_probable(lambda x_t, t: logits)
    d = DiscreteDiffusion(network, timesteps=10, schedule="linear", image_shape=(1, 4, 4))
    best = torch.nn.functional.one_hot(logits.argmax(1), 2).movedim(-1, 1).float()
    assert torch.allclose(d.p_theta(x_t, t), d.q_posterior(x_t, best, t), atol=1e-6)


def test_usual_trainer_is_plain_adam(monkeypatch):
    """Two steps against torch's Adam at 1e-4 on the gradients of the same loss."""
    monkeypatch.setattr(baseline, "PlainUNet", lambda: UNet(channels=(8, 8, 8)))
    torch.manual_seed(0)
    trainer = baseline.usual_trainer(batch_size=4)
    assert trainer.diffusion.config["schedule"] == "linear"
    assert trainer.diffusion.loss_type == "cross_entropy"
    twin = UNet(channels=(8, 8, 8))
    twin.load_state_dict(trainer.network.state_dict())
    adam = torch.optim.Adam(twin.parameters(), 1e-4)
    for x_0 in torch.randint(0, 2, (2, 4, 1, 32, 32)):
        trainer.step(x_0)
        pairs = list(zip(twin.parameters(), trainer.network.parameters(), strict=True))
        for p, q in pairs:
            p.grad = q.grad.clone()
        adam.step()
        assert all(torch.equal(p, q) for p, q in pairs)


# ------------------------------------------------------------------------------------------------
# The experiments that measure in their own process


class Tiny(UNet):
    def __init__(self):
        super().__init__(channels=(8, 8, 8))


class Normed(Tiny):
    """With a batch norm in front of the output, to see what becomes of it."""

    def __init__(self):
        super().__init__()
        self.unfold[0] = torch.nn.BatchNorm2d(8)


@pytest.fixture
def tiny(out, constants):
    sizes = {"BATCH_SIZE": 2, "RACE_SAMPLES": 20, "RACE_TIMESTEPS": 2, "RACE_MINUTES": 1e-9}
    data = {"load_dataset": lambda *_: random_digits()}
    constants(figures, UNet=Normed, SHARES=(1 / 2, 1), **sizes, **data)
    constants(baseline, PlainUNet=Normed)


def test_time_to_quality(tiny, out):
    text = succeed("experiments.figures", "time_to_quality")
    result = result_of("time_to_quality", out)
    assert text.strip() == common.table(result)
    assert list(result["rows"]) == ["this repository", "PlainUNet, as usual"]
    for name, one in result["rows"].items():
        assert [point["steps"] for point in one["curve"]] == [5, 5]
        assert one["row"] == f"{name}, 5 steps" and one["samples"]["images"] == 20
        assert one["curve"][0]["minutes"] > 0
    assert Image.open(out / "time_to_quality" / "time_to_quality.png").size[0] > 100


@pytest.mark.parametrize("usual", [False, True])
def test_the_race_judges_what_was_trained(usual, tiny, monkeypatch):
    """The weights, or their average; the usual way draws by the argmax, but not for its bound."""
    drawn_by, bounds_of = [], []
    for method, seen in (("sample", drawn_by), ("bound_terms", bounds_of)):
        original = getattr(DiscreteDiffusion, method)
        watched = lambda self, *args, o=original, s=seen: s.append(self) or o(self, *args)  # noqa: E731
        monkeypatch.setattr(DiscreteDiffusion, method, watched)
    digits = random_digits()
    trainer = figures.usual_trainer(2) if usual else figures.ours(10**6, 2e-3, "variational")
    figures.compete(trainer, usual, digits, to_levels(digits.images))
    network = trainer.network if usual else trainer.averaged.model
    assert bounds_of[0].model is network and not network.training
    assert network.unfold[0].num_batches_tracked == 20  # of the weights that are judged alone
    assert bounds_of[0].loss_type == ("cross_entropy" if usual else "variational")
    assert bounds_of[0].config["schedule"] == ("linear" if usual else "cosine")
    assert type(trainer.optimizer) is (torch.optim.Adam if usual else Muon)
    assert trainer.total_steps == 5 and drawn_by[0].timesteps == 2
    assert (drawn_by[0].model is network) != usual


def test_noise(out, monkeypatch):
    drawn = {}
    monkeypatch.setattr(figures, "draw", lambda figure, name: drawn.update({name: figure}))
    succeed("experiments.figures", "noise", *TRIAL)
    assert Image.open(out / "noise" / "forward.png").size[0] > 500
    lines = drawn["noise"].axes[1].lines
    assert all(line.get_ydata()[0] == pytest.approx(1) for line in lines)
    assert all(line.get_ydata()[200] < 0.03 for line in lines)


def process(*seconds):
    """Answers each name with 7 weights and the next of these seconds."""
    answers = "".join(f"7 {one}\n" for one in seconds)
    return SimpleNamespace(stdin=io.StringIO(), stdout=io.StringIO(answers))


def test_benchmark(out, tmp_path, constants):
    """All names in turns; ours, the plain network and the other clone in three processes."""
    started = {}

    def start(folder, device, script=""):
        started[folder, script] = process(*[1 if folder == tmp_path else 0.5] * 100)
        return started[folder, script]

    constants(benchmark, BATCH_SIZE=2, DRAWN=(1, 2, 3), FEW=2, start=start)
    flags = "experiments.benchmark", "--no-compile", "--device", "cpu"
    text = succeed(*flags, "--before", tmp_path)
    result = result_of("benchmark", out)
    assert text.strip() == benchmark.table(result)
    assert "| UNet | 7 | 4 | 2 | 2.00 | 1.0 |" in text
    names = ["UNet", "UNet, variational", "UNet, --amp"]
    drawn, plain = [f"UNet, batch {n}" for n in (1, 2, 3)], ["PlainUNet", "PlainUNet, batch 3"]
    networks = result["training"]["networks"]
    assert list(networks) == [*names, "PlainUNet"]
    assert all(one == {"weights": 7, "images_per_second": 4} for one in networks.values())
    assert result["drawing"] == dict(zip([*drawn, plain[1]], [4, 8, 12, 12], strict=True))
    assert result["before"] == dict(zip([*names, *drawn], [2, 2, 2, 2, 4, 6], strict=True))
    asked = {who: one.stdin.getvalue().splitlines() for who, one in started.items()}
    assert asked.pop((REPOSITORY, "")) == plain * benchmark.ROUNDS
    assert asked.keys() == {(REPOSITORY, "train.py"), (tmp_path, "train.py")}
    assert all(theirs == [*names, *drawn] * benchmark.ROUNDS for theirs in asked.values())
    succeed(*flags)
    rates = benchmark.table(result_of("benchmark", out) | {"drawing": {"UNet, batch 3": 90.0}})
    assert "| UNet, batch 3 | 90 | 3.0 |" in rates  # 30 passes an image
    assert "can't be used" in fail("experiments.benchmark", "--device", "nonsense")


def test_benchmark_takes_medians(constants):
    constants(benchmark, ROUNDS=3)
    rates = benchmark.take_turns([("ours", process(1, 5, 3), "UNet")])
    assert rates == {"ours": {"UNet": (7, 128 / 3)}}
    with pytest.raises(UserError, match="'UNet' failed in ours"):
        benchmark.take_turns([("ours", process(1), "UNet")])


def test_work_of_the_benchmark(monkeypatch, capsys):
    """In here; its process starts as the clone's scripts do."""
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", Mock())
        patch.setattr(benchmark, "WAITING", {"GOMP_SPINCOUNT": "7", "KMP_BLOCKTIME": "7"})
        patch.setenv("GOMP_SPINCOUNT", "7")
        patch.setenv("KMP_BLOCKTIME", "other")
        benchmark.start(REPOSITORY, "cpu", "train.py")
        (command,), options = subprocess.Popen.call_args
    assert "GOMP_SPINCOUNT" not in options["env"] and options["env"]["KMP_BLOCKTIME"] == "other"
    assert options["cwd"] == REPOSITORY and compile(command[-1], "worker", "exec")
    assert command[-1].endswith(f"worker({str(REPOSITORY / 'train.py')!r}, 'cpu', 128, 5)")
    main, names = sys.modules["__main__"], ["UNet", "UNet, variational", "UNet, batch 3"]
    names += ["PlainUNet", "PlainUNet, batch 1", "UNet"]
    monkeypatch.setattr(main, "__file__", getattr(main, "__file__", None), raising=False)
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(names)))
    benchmark.worker("train.py", "cpu", 1, 2)
    answers = [line.split() for line in capsys.readouterr().out.splitlines()]
    weights = {"UNet": 759_308, "PlainUNet": 1_883_074}  # of the common one
    assert [int(n) for n, _ in answers] == [weights[name.split(",")[0]] for name in names]
    assert all(float(seconds) > 0 for _, seconds in answers)


def test_fill(out, tmp_path, constants):
    """A row for each part and N; the real digits are read best."""
    untrained(tmp_path / "model.pth", timesteps=2)
    constants(figures, RELEASED=tmp_path / "model.pth", TIMESTEPS=2, PARTICLES=1)
    constants(figures, COMPLETIONS=2, NUM_DIGITS=20, TRAJECTORIES=(1, 2))
    text = succeed("experiments.figures", "fill", *TRIAL, "--device", "cpu")
    result = result_of("fill", out)
    assert text.strip() == figures.filling_table(result) and result["digits"] == 20
    for rows in result["parts"].values():
        assert set(rows) == {"part alone", "N = 1", "N = 2", "real digits"}
        assert rows["real digits"]["read_as_true_class"] > 0.9
        others = [rows[name]["frechet_distance"] for name in ("part alone", "N = 1", "N = 2")]
        assert rows["real digits"]["frechet_distance"] < min(others)
    assert Image.open(out / "fill" / "fill.png").size[0] > 100


def test_expect(out, constants, monkeypatch):
    """Each mark once, the last ones at the end of the run; a run that was stopped goes on."""
    data = {"load_dataset": lambda *_: random_digits(64), "BATCH_SIZE": 16, "UNet": Tiny}
    constants(figures, TIMESTEPS=2, RATE=16 / 60, EPOCHS=2, SAVED=5, **data)
    flags, expect = ("experiments.figures", "expect", "--minutes"), out / "expect"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", no_power_at(5))
        assert "no power" in call(*flags, 1, 6, 100)[2]
    steps = spy(monkeypatch, Trainer, "step")
    succeed(*flags, 1, 6, 100, 200)
    rows = result_of("expect", out)["rows"]
    assert list(rows) == ["offline digits", "full MNIST"] and len(steps) == 8 - 5 + 8
    assert rows["full MNIST"][2]["train_loss"] < 1  # cross-entropy per pixel
    for points in rows.values():
        assert [point["steps"] for point in points] == [1, 6, 8]
        assert [point["minutes"] for point in points] == pytest.approx([1, 6, 8])
        assert points[0]["bound"] > points[2]["bound"] and points[2]["train_loss"] > 0.5
    height, width = Image.open(expect / "expect.png").size
    assert min(height, width) > 100
    steps.clear()
    succeed(*flags, 1, 6, 100)
    assert not steps  # both are finished
    for file in expect.glob("*.pth"):
        file.unlink()
    succeed(*flags, 1, 6, 100)
    assert result_of("expect", out)["rows"] == rows  # the same as in one go


def test_letters(fresh_directory, tmp_path):
    """The fonts that come with matplotlib: a dozen of text, several of symbols."""
    fonts = tmp_path / "fonts"
    shutil.copytree(Path(matplotlib.get_data_path()) / "fonts" / "ttf", fonts)
    shutil.copy(fonts / "DejaVuSans.ttf", fonts / "again.TTF")
    (fonts / "broken.otf").write_bytes(b"no font")
    options = [f"--text={letters.LETTERS[:-1]}", "--notdef-outline"]
    subset.main([str(fonts / "DejaVuSans.ttf"), f"--output-file={fonts / 'noZ.ttf'}", *options])
    text = succeed("experiments.letters", "my letters", "--fonts", fonts)
    assert text.splitlines()[-1] == "python train.py --data 'my letters' --conditional"
    folders = {folder.name: list(folder.iterdir()) for folder in Path("my letters").iterdir()}
    assert "".join(sorted(folders)) == letters.LETTERS
    for files in folders.values():
        pictures = [Image.open(file) for file in files]
        assert {(p.mode, p.size) for p in pictures} == {("L", (28, 28))}
        boxes = [p.getbbox() for p in pictures]  # left, top, right, bottom
        assert all(max(b[2] - b[0], b[3] - b[1]) == 24 for b in boxes)
        assert len({p.tobytes() for p in pictures}) == len(pictures)
        stems = {file.stem.split("-")[0] for file in files}
        assert "DejaVuSans" in stems or "again" in stems
        assert not stems & {"cmex10", "STIXSizOneSymReg", "broken", "noZ"}
    assert "my letters exists" in fail("experiments.letters", "my letters", "--fonts", fonts)
    (tmp_path / "none").mkdir()
    assert "has the letters A to Z" in fail("experiments.letters", "x", "--fonts", "none")


@pytest.mark.parametrize("name", ["tables", "page", "figures", "benchmark", "letters"])
def test_help(name):
    assert "usage:" in succeed(f"experiments.{name}", "--help")
