"""Pictures, pixel by pixel."""

import io
import os
import subprocess
import sys

import cli
from cli import UserError

import numpy as np
import pytest
import torch
from PIL import Image

from pictures import (
    image_grid,
    plot_gains,
    plot_history,
    plot_terms,
    read_partial_digit,
    save_figure,
    titled_frame,
    write_report,
)


def test_image_grid_two_levels():
    """Three 2x3 images in two columns and rows, two grey pixels around each, at twice the size."""
    x = torch.tensor(
        [[[1, 0, 0], [0, 1, 0]], [[0, 0, 0], [1, 1, 1]], [[1, 1, 1], [1, 0, 1]]]
    ).unsqueeze(1)
    # g: grey, w: white, b: black; each row of text is a row of pixels
    rows = "gggggggggggg gggggggggggg ggwbbggbbbgg ggbwbggwwwgg gggggggggggg gggggggggggg"
    rows += " ggwwwggggggg ggwbwggggggg gggggggggggg gggggggggggg"
    sheet = np.array([[{"g": 96, "w": 255, "b": 0}[c] for c in row] for row in rows.split()])
    for images in (x, x.to(torch.uint8)):
        picture = image_grid(images)
        assert picture.mode == "L"
        assert np.array_equal(np.asarray(picture), sheet.repeat(2, axis=0).repeat(2, axis=1))


def test_image_grid_four_levels_in_a_row():
    """Levels 0..3 are evenly spaced greys; `columns` is respected."""
    picture = image_grid(torch.arange(4).view(4, 1, 1, 1), num_levels=4, columns=4)
    row = [96, 96, 0, 96, 96, 85, 96, 96, 170, 96, 96, 255, 96, 96]
    sheet = np.full((5, 14), 96)
    sheet[2] = row
    assert np.array_equal(np.asarray(picture), sheet.repeat(2, axis=0).repeat(2, axis=1))


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_states_beyond_the_levels_show_the_background(dtype):
    """One mask or two."""
    x = torch.tensor([[[[0, 1, 2], [3, 1, 2]]]]).to(dtype)
    assert np.array(image_grid(x, 2))[4:8:2, 4:10:2].tolist() == [[0, 255, 96], [96, 255, 96]]
    assert np.array(image_grid(x, 3))[4:8:2, 4:10:2].tolist() == [[0, 128, 255], [96, 128, 255]]


def test_256_levels_are_the_grey_values():
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert np.array_equal(np.array(image_grid(x, 256))[4:36:2, 4:36:2], x[0, 0])


@pytest.mark.parametrize("n, columns", [(1, 1), (2, 2), (4, 2), (5, 3), (17, 5)])
def test_image_grid_is_about_square(n, columns):
    """The smallest square that holds all images, without empty rows."""
    picture = image_grid(torch.zeros(n, 1, 32, 32, dtype=torch.uint8))
    rows = -(-n // columns)
    assert picture.size == (2 * (columns * 34 + 2), 2 * (rows * 34 + 2))


def test_large_image_grid_is_not_doubled():
    assert image_grid(torch.zeros(1025, 1, 1, 1, dtype=torch.uint8), columns=41).size == (
        41 * 3 + 2,
        25 * 3 + 2,
    )


def test_titled_frame():
    """The grid below a white strip with the title."""
    x = torch.randint(0, 2, (4, 1, 32, 32), generator=torch.Generator().manual_seed(0))
    frame, grid = np.array(titled_frame(x, "t = 7")), np.array(image_grid(x))
    assert np.array_equal(frame[24:], grid)
    assert (frame[:24] == 255).mean() > 0.8 and (frame[:24] < 64).any()
    assert not np.array_equal(np.array(titled_frame(x, "t = 8"))[:24], frame[:24])


@pytest.mark.parametrize("alpha", [128, 200, 255])
def test_nothing_to_draw(alpha, tmp_path):
    """If every pixel is at least half opaque."""
    Image.new("LA", (28, 28), (255, alpha)).save(tmp_path / "x.png")
    with pytest.raises(UserError, match="nothing to draw"):
        read_partial_digit(tmp_path / "x.png")
    Image.new("LA", (28, 28), (255, 127)).save(tmp_path / "x.png")
    known = read_partial_digit(tmp_path / "x.png")[0, 0]
    assert (known[2:-2, 2:-2] == -1).all() and (known == 0).sum() == 32**2 - 28**2


def test_a_picture_that_fails_is_a_warning(tmp_path, capsys):
    """The old file stays."""
    path = tmp_path / "x.png"
    assert write_report(path, lambda file: file.write(b"a picture"))

    def broken(file):
        file.write(b"half")
        raise RuntimeError("one line\nand another")

    assert not write_report(path, broken)
    assert capsys.readouterr().err == f"warning: {path} was not written: one line\n"
    assert path.read_bytes() == b"a picture" and len(list(tmp_path.iterdir())) == 1


# --------------------------------------------------------------------------------------------------
# Figures

HISTORY = [
    {"epoch": 3, "train_loss": 0.5, "validation_bound": 90.0},
    {"epoch": 4, "train_loss": 0.25, "validation_bound": 80.0},
]


def test_plots_hold_the_numbers():
    """Loss and bound by epoch; mean bound terms by the network's t; the plain bound, and that minus
    the gain."""
    left, right = plot_history(HISTORY).axes
    assert left.lines[0].get_xydata().tolist() == [[3, 0.5], [4, 0.25]]
    assert right.lines[0].get_xydata().tolist() == [[3, 90], [4, 80]]
    t, terms = torch.tensor([1, 1, 3, 3, 3]), torch.tensor([1.0, 2, 3, 6, 9], dtype=torch.float64)
    (axis,) = plot_terms(torch.tensor([0, 10, 20, 50]), t, terms).axes
    assert axis.lines[0].get_xydata().tolist() == [[10, 1.5], [50, 6]]
    rows = [
        {"trajectories": 1, "nats_per_image": 80.0, "gain_standard_error": 0.0},
        {"trajectories": 2, "nats_per_image": 77.0, "gain_standard_error": 0.5},
    ]
    bound = {"nats_per_image": 80.0, "importance_weighted": {"by_trajectories": rows}}
    (axis,) = plot_gains({"no labels": bound}).axes
    plain, (weighted, _, (errors,)) = axis.lines[0], axis.containers[0]
    assert list(plain.get_ydata()) == [80, 80]
    assert weighted.get_xydata().tolist() == [[1, 80], [2, 77]]
    assert [segment[:, 1].tolist() for segment in errors.get_segments()] == [[80, 80], [76.5, 77.5]]
    labels = [plain.get_label(), axis.containers[0].get_label()]
    assert labels == ["plain bound, no labels: 80.00", "importance-weighted, no labels: 77.00"]


def test_figures_ignore_a_users_settings(tmp_path):
    """A notebook's backend and LaTeX, neither of which may be installed."""
    settings = "text.usetex: True\nfigure.facecolor: black\nsavefig.bbox: tight\n"
    (tmp_path / "matplotlibrc").write_text(settings)
    expected = io.BytesIO()
    save_figure(plot_history(HISTORY), expected)
    code = f"""
import sys
sys.path.insert(0, {str(cli.REPOSITORY)!r})
from pictures import plot_history, save_figure
with open("x.png", "wb") as file:
    save_figure(plot_history({HISTORY}), file)
import matplotlib, os
assert matplotlib.rcParams["text.usetex"] and "matplotlib.backends.backend_agg" in sys.modules
assert "matplotlib.pyplot" not in sys.modules and os.environ["MPLBACKEND"] == "inline"
"""
    environment = {**os.environ, "MPLBACKEND": "inline"}
    environment["MATPLOTLIBRC"] = str(tmp_path)
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment)
    assert np.array_equal(Image.open(tmp_path / "x.png"), Image.open(expected))


def test_figures_leave_settings_as_they_were():
    import matplotlib

    with matplotlib.rc_context({"text.usetex": True, "figure.dpi": 50}):
        before = dict(matplotlib.rcParams)
        save_figure(plot_history(HISTORY), io.BytesIO())
        assert dict(matplotlib.rcParams) == before
