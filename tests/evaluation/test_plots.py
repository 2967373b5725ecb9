"""Tests of plots: they are written, reflect their data, and leave matplotlib's global state alone."""

import sys

import numpy as np
import pytest
from PIL import Image

from gdino_hf.evaluation.plots import plot_confusion_matrix, plot_curves, plot_precision_recall, prediction_mosaic

pytestmark = pytest.mark.usefixtures("rendered_plots")

HISTORY = [
    *({"step": step, "loss": 10 / step, "learning_rate": 1e-4} for step in range(1, 60)),
    {"step": 30, "eval_loss": 1.0, "eval_AP": 0.1, "eval_AP50": 0.2},
    {"step": 59, "eval_loss": 0.8, "eval_AP": 0.3, "eval_AP50": 0.5},
    {"step": 59, "train_runtime": 1.0, "train_loss": 2.0},
]


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def test_curves_show_loss_and_average_precision(tmp_path):
    pytest.importorskip("matplotlib")
    plot_curves(HISTORY, tmp_path / "new" / "with.png")
    plot_curves([entry for entry in HISTORY if "loss" in entry], tmp_path / "without.png")
    with_metrics, without = pixels(tmp_path / "new" / "with.png"), pixels(tmp_path / "without.png")
    assert with_metrics.shape[1] > without.shape[1]
    assert np.ptp(without) > 200


def test_empty_data_gives_an_empty_plot(tmp_path):
    pytest.importorskip("matplotlib")
    plot_curves([], tmp_path / "curves.png")
    plot_precision_recall({}, tmp_path / "pr.png")
    plot_confusion_matrix(np.zeros((3, 3), dtype=int), ["cat", "dog"], tmp_path / "confusion.png")
    assert all(pixels(path).size for path in tmp_path.glob("*.png"))


def test_different_numbers_give_different_plots(tmp_path):
    pytest.importorskip("matplotlib")
    for name, level in (("low", 0.2), ("high", 0.9)):
        plot_precision_recall({"cat": np.full(101, level)}, tmp_path / f"pr-{name}.png")
        matrix = np.array([[round(10 * level), 3], [1, 0]])
        plot_confusion_matrix(matrix, ["cat"], tmp_path / f"confusion-{name}.png")
    for kind in ("pr", "confusion"):
        low, high = pixels(tmp_path / f"{kind}-low.png"), pixels(tmp_path / f"{kind}-high.png")
        assert low.shape == high.shape
        assert (low != high).any()


def test_labels_without_counts_are_left_out_of_the_confusion_plot(tmp_path):
    pytest.importorskip("matplotlib")
    matrix = np.zeros((61, 61), dtype=int)
    matrix[3, 3] = 5
    plot_confusion_matrix(matrix, [f"label {i}" for i in range(60)], tmp_path / "many.png")
    plot_confusion_matrix(np.array([[5, 0], [0, 0]]), ["label 3"], tmp_path / "one.png")
    assert (pixels(tmp_path / "many.png") == pixels(tmp_path / "one.png")).all()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["$\\frac{$", "US$ and $", "\x1b[31mred", "two\nlines"])
def test_labels_are_drawn_as_text(name, tmp_path):
    pytest.importorskip("matplotlib")
    plot_precision_recall({name: np.full(101, 0.5)}, tmp_path / "curve.png")
    plot_confusion_matrix(np.array([[3, 1], [0, 0]]), [name], tmp_path / "matrix.png")
    plot_confusion_matrix(np.array([[3, 1], [0, 0]]), ["cat"], tmp_path / "plain.png")
    assert not np.array_equal(pixels(tmp_path / "matrix.png"), pixels(tmp_path / "plain.png"))


def test_no_figure_is_left_open(tmp_path):
    helpers = pytest.importorskip("matplotlib._pylab_helpers")
    plot_curves(HISTORY, tmp_path / "curves.png")
    assert helpers.Gcf.get_num_fig_managers() == 0


def test_without_matplotlib_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "gdino-hf\[train\]"'):
        plot_curves(HISTORY, tmp_path / "curves.png")


def test_mosaic_shows_ground_truth_beside_predictions_above_the_threshold(tmp_path):
    image = Image.new("RGB", (200, 100), (90, 90, 90))
    reference = {"boxes": [[20, 20, 120, 80]], "labels": [0]}
    prediction = {"boxes": [[20, 20, 120, 80], [5, 5, 60, 60]], "labels": [0, 1], "scores": [0.9, 0.2]}
    nothing = {"boxes": [], "labels": [], "scores": []}
    names = ["cat", "dog"]
    prediction_mosaic([(image, reference, prediction)], names, tmp_path / "one.png", threshold=0.3)
    prediction_mosaic([(image, reference, prediction)], names, tmp_path / "all.png", threshold=0.1)
    prediction_mosaic([(image, nothing, nothing)] * 3, names, tmp_path / "none.png")
    one, every = pixels(tmp_path / "one.png"), pixels(tmp_path / "all.png")
    half = one.shape[1] // 2
    assert (one[30:, :half] == every[30:, :half]).all()
    assert (one[30:, half:] != every[30:, half:]).any()
    assert pixels(tmp_path / "none.png").shape[0] > one.shape[0]
    with pytest.raises(ValueError, match="no image"):
        prediction_mosaic([], names, tmp_path / "x.png")
