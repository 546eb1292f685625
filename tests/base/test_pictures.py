"""Pictures: readable on a light and on a dark ground, told apart without colour, no legend over the data."""

from itertools import combinations
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from sae_italian.base.report import DARK, GROUND, INK, MARKERS, OTHERS, OURS, REFERENCE, svg
from sae_italian.papers.report import LOOKS


def luminance(colour: str) -> float:
    """WCAG 2.1's relative luminance."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def contrast(one: str, other: str) -> float:
    bright, dim = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


def test_ink_and_marks_stand_out_on_both_grounds():
    assert contrast(INK, GROUND) >= 4.5 and contrast(DARK[INK], DARK[GROUND]) >= 4.5
    for colour in set(DARK) - {GROUND}:
        assert contrast(DARK[colour], DARK[GROUND]) >= 3, colour
    for colour in (OURS, REFERENCE, *OTHERS[:2]):
        assert contrast(colour, GROUND) >= 3, colour


def test_series_are_told_apart_without_colour():
    assert len(set(MARKERS)) == len(MARKERS) > len(OTHERS)
    for one, other in combinations(LOOKS.values(), 2):
        assert one[1] != other[1] and one[2] != other[2]


@pytest.mark.parametrize("ask", [lambda axes: axes[0].legend(loc="center"), lambda axes: axes[0].figure.legend()])
def test_a_legend_is_below_the_panels_whoever_asks_for_it(ask):
    seen = []

    def draw(axes):
        for axis in axes:
            axis.plot([0, 1], [0, 1], label="the line")
        axes[1].axhline(0.5, label="half")
        axes[1].legend(title="chance")
        ask(axes)
        seen.append(axes)

    svg(draw, 2, (7, 3))
    figure = seen[0][0].figure
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()].count("the line") == 1
    assert not any(axis.get_legend() for axis in figure.axes)
    box = legend.get_window_extent()
    assert not any(box.overlaps(axis.get_window_extent()) for axis in figure.axes)


def test_a_picture_follows_the_colour_scheme_and_is_the_same_every_time():
    draw = lambda axes: axes[0].plot([0, 1], [1, 0], color=OURS, label="x")  # noqa: E731
    picture = svg(draw, 1, (3, 2))
    assert picture == svg(draw, 1, (3, 2)) == picture._repr_svg_()
    assert f"stroke: {OURS}; stroke: var(--c" in picture and "prefers-color-scheme:dark" in picture
    assert DARK[OURS] in picture and ElementTree.fromstring(picture).attrib["class"] == "sae-italian"
