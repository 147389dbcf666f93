"""Figures: one style, PNG that fits into a page, similarity matrices as pixels."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from dist_prune.pruning.figure_data import Curve, SimilarityMap
from dist_prune.report import figures, run_plots


@pytest.mark.parametrize("spines", [("left", "bottom"), ()])
def test_axes_have_the_spines_of_the_style(spines):
    _, panels = figures.subplots(4, 3, 2, 3, spines)
    assert panels.shape == (2, 3)
    for axes in panels.flat:
        assert {side for side, spine in axes.spines.items() if spine.get_visible()} == set(spines)


def test_a_png_is_the_pixels():
    pixels = np.arange(5 * 4 * 3, dtype=np.uint8).reshape(5, 4, 3)
    with Image.open(io.BytesIO(base64.b64decode(figures.png(pixels)))) as image:
        assert (np.asarray(image) == pixels).all()


def test_curves_of_the_same_axes_share_a_plot():
    curves = [Curve(name, (1, 2), (3, 4), ("x", label)) for name, label in (("a", "y"), ("b", "y"), ("a", "z"))]
    drawn = run_plots.method_figures(curves)
    assert [(figure["title"], len(figure["panels"][0]["lines"])) for figure in drawn] == [("y", 2), ("z", 1)]


def test_a_similarity_image_puts_clusters_side_by_side():
    likeness = np.full((6, 6), 0.5)
    for part in ([0, 3, 5], [1, 4]):
        likeness[np.ix_(part, part)] = 1.0
    labels = np.array([0, 1, -1, 0, 1, 0])
    kept = np.array([False, True, True, False, False, True])
    pixels = figures.similarity_image(SimilarityMap("conv", likeness, labels, kept, ""))
    inner = pixels[:, 4:, 0]
    assert inner.shape == (6, 6)
    assert (inner[:3, :3] == 0).all() and (inner[3:5, 3:5] == 0).all(), "alike: dark, first the larger cluster"
    assert (inner[:3, 3:] == 255).all() and inner[5, 5] == 255
    assert len(np.unique(pixels[:, 0].reshape(6, 3), axis=0)) == 3, "two clusters and the grey of the rest"
    assert (pixels[:, 2, 0] < 128).tolist() == [True, False, False, True, False, True], "kept first in each cluster"


def test_a_similarity_image_of_2048_channels_is_small():
    rng = np.random.default_rng(0)
    portrait = SimilarityMap("conv", rng.random((2048, 2048)), rng.integers(-1, 40, 2048), rng.random(2048) < 0.3, "")
    image = figures.similarity_image(portrait)
    assert image.shape == (128, 128 + 2 * 8, 3)
    assert image.dtype == np.uint8
