"""The scatter charts of a sweep's page."""

from __future__ import annotations

import math
import re

import pytest

from softprompt.report.charts import Dot, log_ticks, scatter_chart


def circles(picture: str) -> list[tuple[str, float, float]]:
    found = re.findall(r'<circle class="(\w+)" cx="([\d.]+)" cy="([\d.]+)"', picture)
    return [(group, float(x), float(y)) for group, x, y in found]


def test_dots_stand_at_the_logarithm_and_bars_are_as_long_as_the_deviation() -> None:
    dots = [Dot(10, 1.0, 0.0, 0, "a"), Dot(100, 2.0, 0.5, 1, "b"), Dot(1000, 3.0, 0.0, 7, "<c>")]
    picture = str(scatter_chart(dots, "x & y"))
    (one, two, three) = circles(picture)
    assert [group for group, _, _ in (one, two, three)] == ["g0", "g1", "g1"]
    assert two[1] - one[1] == pytest.approx(three[1] - two[1], abs=0.2) and one[1] < two[1]
    assert one[2] - two[2] == pytest.approx(two[2] - three[2], abs=0.2) and one[2] > two[2]
    (low, high) = re.findall(r'class="bar g1" .* y1="([\d.]+)" y2="([\d.]+)"', picture)[0]
    assert float(low) - float(high) == pytest.approx(one[2] - two[2], abs=0.2)
    assert "&lt;c&gt;" in picture and "<c>" not in picture and "x &amp; y" in picture


def test_what_cannot_be_drawn_is_left_out() -> None:
    assert scatter_chart([], "none") == ""
    assert scatter_chart([Dot(0, 1.0, 0.0, 0, "free"), Dot(5, math.nan, 0.0, 0, "lost")], "none") == ""
    assert len(circles(str(scatter_chart([Dot(5, 1.0, 0.0, 0, "alone")], "one")))) == 1


@pytest.mark.parametrize(("low", "high"), [(9.0, 11.0), (64.0, 130.0), (1.0, 1e6), (0.3, 900.0), (1000.0, 1001.0)])
def test_ticks_of_a_logarithmic_axis_are_few_and_inside(low: float, high: float) -> None:
    found = log_ticks(low, high)
    assert len(found) <= 5 and all(low <= value <= high for value in found)
    assert found or high / low < 1.5
