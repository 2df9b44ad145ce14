"""Plots: points are where their values are."""

import re
from xml.etree import ElementTree

import pytest

from imagerag.evaluation.curve import Point, to_svg

SVG = "{http://www.w3.org/2000/svg}"


def drawn(curves: dict[str, list[Point]]) -> ElementTree.Element:
    return ElementTree.fromstring(to_svg(curves, x_title="copies", y_title="recognised"))


def point(x: float, y: float, label: str = "") -> Point:
    return Point(label=label, x=x, y=y)


def positions(svg: ElementTree.Element) -> list[tuple[float, float]]:
    return [(float(each.attrib["cx"]), float(each.attrib["cy"])) for each in svg.iter(f"{SVG}circle")]


def ticks(svg: ElementTree.Element, anchor: str) -> dict[float, tuple[float, float]]:
    """The positions of an axis's numbers by their values."""
    texts = [each for each in svg.iter(f"{SVG}text") if each.attrib["text-anchor"] == anchor]
    numbers = [each for each in texts if re.fullmatch(r"\d\.\d\d", each.text or "")]
    return {float(each.text or ""): (float(each.attrib["x"]), float(each.attrib["y"])) for each in numbers}


def test_points_are_where_the_axes_numbers_say() -> None:
    svg = drawn({"slerp": [point(0, 0), point(0.5, 1.0)], "adapter": [point(1.0, 0.25)]})
    (left, bottom), (middle, top), (right, low) = positions(svg)
    assert middle - left == pytest.approx((right - left) / 2, abs=0.1)
    assert bottom - low == pytest.approx((bottom - top) / 4, abs=0.1), "larger values are higher"
    across, up = ticks(svg, "middle"), ticks(svg, "end")
    assert sorted(across) == sorted(up) == [0, 0.22, 0.44, 0.66, 0.88, 1.1], "a tenth more than the largest values"
    assert across[0][0] == pytest.approx(left)
    assert across[1.1][0] == pytest.approx(left + 1.1 * (right - left), abs=0.2)
    assert up[0][1] - 4 == pytest.approx(bottom)
    assert up[1.1][1] - 4 == pytest.approx(bottom - 1.1 * (bottom - top), abs=0.2)
    width, height = (float(part) for part in svg.attrib["viewBox"].split()[2:])
    assert all(0 < x < width and 0 < y < height for x, y in (*positions(svg), *across.values(), *up.values()))


def test_a_curve_connects_its_points_in_their_order_in_a_colour_of_its_own() -> None:
    svg = drawn({"slerp": [point(1, 1), point(0, 0), point(0.5, 0.2)], "adapter": [point(0.3, 0.3), point(0.1, 0.9)]})
    lines = list(svg.iter(f"{SVG}polyline"))
    joined = [tuple(map(float, pair.split(","))) for line in lines for pair in line.attrib["points"].split()]
    assert joined == positions(svg)
    colours = [line.attrib["stroke"] for line in lines]
    assert len(set(colours)) == 2
    titles = {each.text: each.attrib for each in svg.iter(f"{SVG}text") if each.text in ("slerp", "adapter")}
    assert [titles[name]["fill"] for name in ("slerp", "adapter")] == colours
    assert float(titles["slerp"]["y"]) < float(titles["adapter"]["y"])
    assert [each.attrib["fill"] for each in svg.iter(f"{SVG}circle")] == [colours[0]] * 3 + [colours[1]] * 2


def test_labels_are_text_whatever_they_contain() -> None:
    svg = drawn({"<script>": [point(0, 0, "w = 0 & more")]})
    assert {"<script>", "w = 0 & more", "copies", "recognised"} <= {each.text for each in svg.iter(f"{SVG}text")}
    assert not list(svg.iter(f"{SVG}script"))
    assert positions(svg) == [(60.0, 350.0)], "a plot of zeros alone divides by none"
