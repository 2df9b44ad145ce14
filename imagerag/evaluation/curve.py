"""SVG plots of one measure against another, such as recognition against copies."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 640, 400
_LEFT, _TOP, _RIGHT, _BOTTOM = 60, 20, 200, 50
_TICKS = 5
_COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#17becf", "#7f7f7f")


@dataclass(frozen=True, kw_only=True)
class Point:
    """The measurements of one setting."""

    label: str
    x: float
    y: float


def to_svg(curves: Mapping[str, Sequence[Point]], *, x_title: str, y_title: str) -> str:
    """Return an SVG plot of curves by name, with labelled points connected in the given order."""
    points = [point for curve in curves.values() for point in curve]
    most_x, most_y = (max([*values, 1e-6]) * 1.1 for values in ([p.x for p in points], [p.y for p in points]))
    width, height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        return round(_LEFT + width * x / most_x, 1), round(_TOP + height * (1 - y / most_y), 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        f'<path d="M{_LEFT} {_TOP}V{_TOP + height}H{_LEFT + width}" fill="none" stroke="black"/>',
        _text(_LEFT + width / 2, _HEIGHT - 10, x_title, "middle"),
        f'<g transform="rotate(-90 14 {_TOP + height / 2})">{_text(14, _TOP + height / 2, y_title, "middle")}</g>',
    ]
    for tick in range(_TICKS + 1):
        x, y = place(most_x * tick / _TICKS, most_y * tick / _TICKS)
        parts.append(_text(x, _TOP + height + 16, f"{most_x * tick / _TICKS:.2f}", "middle"))
        parts.append(_text(_LEFT - 6, y + 4, f"{most_y * tick / _TICKS:.2f}", "end"))
    for number, (title, curve) in enumerate(curves.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        places = [place(point.x, point.y) for point in curve]
        joined = " ".join(f"{x},{y}" for x, y in places)
        parts.append(f'<polyline points="{joined}" fill="none" stroke="{colour}"/>')
        for point, (x, y) in zip(curve, places, strict=True):
            parts.append(f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>{_text(x + 5, y - 5, point.label)}')
        parts.append(_text(_LEFT + width + 12, _TOP + 14 * (number + 1), title, colour=colour))
    return "\n".join([*parts, "</svg>\n"])


def _text(x: float, y: float, text: str, anchor: str = "start", colour: str = "black") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{escape(text)}</text>'
