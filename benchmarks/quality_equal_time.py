"""A curve against orders by cluster in the same time: what an order costs, attention could have spent on more density.

An order by cluster is made and applied in every layer, a curve once a forward. The times are those of gpu_orders.md and
gpu_attention.md at the size of Wan2.1-1.3B, the errors those of `quality.py`. The curve is given the time that the
clusters take as density, and its error there is read off the line through its measured points, both axes logarithmic.
"""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from quality_metrics import geometric_interval
from quality_policies import CLUSTERS, QUOTAS, WITH_TAIL, Row
from quality_report import points_of, table
from quality_store import Found

LAYERS = 30
"""Of Wan2.1-1.3B."""
ORDERED = {"semantic": f"Semantic, K {CLUSTERS}, iterations: 1", "hybrid": f"Hybrid, K {CLUSTERS}, iterations: 1"}
CURVE = "Gilbert, tokens, rotary tables and output (once a forward)"
OF_DENSITY = ("quotas .10/.05/0/.20, rest as means", "level 1 for 4%, rest as means")
"""Two rows of attention that read the rest as means and refine more or less, whose times give what density costs."""


def cells(page: str, name: str) -> list[str]:
    """What stands after the first cell of the first row of that name in a page's tables.

    Raises:
        ValueError: no table has the row.
    """
    found = re.search(rf"^\| {re.escape(name)} \|(.*)\|$", page, re.MULTILINE)
    if found is None:
        raise ValueError(f"the page must have a table's row {name!r}")
    return [cell.strip() for cell in found[1].split("|")]


def order_milliseconds(orders_page: str) -> dict[str, float]:
    """By order, what it costs a layer beyond the curve."""
    curve = float(cells(orders_page, CURVE)[0]) / LAYERS
    return {order: float(cells(orders_page, name)[0]) - curve for order, name in ORDERED.items()}


def density_milliseconds(attention_page: str) -> float:
    """What a layer's attention would cost more at a density higher by 1, pooling and kernel."""
    heads = cells(attention_page, "what")
    more, less = (
        [float(cells(attention_page, name)[heads.index(head)]) for head in ("density", "call")] for name in OF_DENSITY
    )
    return (more[1] - less[1]) / (more[0] - less[0])


def error_at(density: float, points: Sequence[tuple[float, float]]) -> float:
    """On the line through points (density, error) with both axes logarithmic.

    Raises:
        ValueError: the density lies outside the points.
    """
    for (x0, y0), (x1, y1) in itertools.pairwise(sorted(points)):
        if x0 <= density <= x1:
            share = math.log(density / x0) / math.log(x1 / x0)
            return y0 * (y1 / y0) ** share
    raise ValueError(f"density must lie within {sorted(x for x, _ in points)}, got {density:g}")


def equal_time_table(results: Mapping[str, Any], rows: Sequence[Row], orders_page: str, attention_page: str) -> str:
    """Error of each order by cluster, and of the curve at the density that the same time buys."""
    lists: dict[str, list[Found]] = {"tiny model": results["attention"]["found"]}
    lists |= {chr(ord("A") + i): setting["found"] for i, setting in enumerate(results["fields"]["settings"])}
    named = {row.name: row for row in rows}
    costs, price = order_milliseconds(orders_page), density_milliseconds(attention_page)
    lines = []
    for base in (QUOTAS, WITH_TAIL):
        for order, cost in costs.items():
            line = [f"{base}, {order}", f"{cost:.2f}"]
            for found in lists.values():
                own = points_of(found, named[f"{base}, {order}"])[-1]
                points = [
                    (one["density"], geometric_interval(one["errors"])[0]) for one in points_of(found, named[base])
                ]
                richer = own["density"] + cost / price
                if len(line) == 2:
                    line += [f"{own['density']:.3f}", f"{richer:.3f}"]
                line.append(f"{geometric_interval(own['errors'])[0]:.3f} / {error_at(richer, points):.3f}")
            lines.append(line)
    return table(["policy", "ms a layer", "its density", "the curve's in that time", *lists], lines)
