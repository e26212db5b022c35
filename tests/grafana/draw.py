"""Draws the dashboards from a real Prometheus's answers, so that people can look at them without a Grafana.

``python -m tests.grafana.draw OUT [SECONDS]`` runs a node under traffic of every kind for so long, asks Prometheus every
panel's question over that time, and writes one page for each dashboard into OUT, and with ``chromium`` a picture of it.
"""

from __future__ import annotations

import asyncio
import html
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.grafana.load import town
from tests.grafana.panels import BOARDS, Query, document
from tests.grafana.server import Prometheus, hurried, running
from tests.grafana.test_live import RULES_SHIPPED

WIDTH, ROW = 60, 34
"""Pixels of a column and of a row of the grid, as Grafana has them on a wide screen."""
COLOURS = ("#73bf69", "#f2cc0c", "#5794f2", "#ff9830", "#f2495c", "#b877d9", "#37872d", "#fade2a", "#8ab8ff", "#ffa6b0")
STYLE = """body{background:#111217;color:#ccccdc;font:12px sans-serif;margin:8px}.grid{position:relative}
.panel{position:absolute;background:#181b1f;border:1px solid #2c3235;overflow:hidden;box-sizing:border-box;padding:4px}
.title{font-weight:600;white-space:nowrap}.stat{font-size:30px;text-align:center;color:#73bf69;padding-top:14px}
.legend{font-size:10px;color:#9fa7b3;line-height:12px}.heading{position:absolute;font-weight:600;font-size:14px}"""


def shown(value: float, unit: str) -> str:
    """A value as a person reads it."""
    match unit:
        case "s":
            return f"{value * 1000:.3g} ms" if abs(value) < 1 else f"{value:.3g} s" if abs(value) < 120 else f"{value / 3600:.3g} h"
        case "percentunit":
            return f"{value * 100:.4g} %"
        case "currencyUSD":
            return f"${value:.4g}"
        case "bytes":
            return f"{value / 2**20:.4g} MiB"
        case _:
            return f"{value:.4g} {'/s' if unit == 'reqps' else ''}".strip()


def plot(series: list[tuple[str, list[tuple[float, float]]]], width: int, height: int) -> str:
    """Lines over time, from zero up."""
    points = [point for _, line in series for point in line]
    if not points:
        return "<div style='color:#f2495c'>no data</div>"
    first, last = min(at for at, _ in points), max(at for at, _ in points)
    low, high = min(0.0, *(value for _, value in points)), max(value for _, value in points)
    across, up = width / max(last - first, 1), (height - 4) / ((high - low) or 1)
    lines = []
    for number, (_, line) in enumerate(series):
        path = " ".join(f"{(at - first) * across:.1f},{height - 2 - (value - low) * up:.1f}" for at, value in line)
        lines.append(f"<polyline fill='none' stroke='{COLOURS[number % len(COLOURS)]}' stroke-width='1.5' points='{path}'/>")
    return f"<svg width='{width}' height='{height}' style='background:#141619'>{''.join(lines)}</svg>"


async def answers(prometheus: Prometheus, panel: dict[str, Any], board: str, start: float, end: float) -> list[tuple[str, list[tuple[float, float]]]]:
    """Every series of a panel, named as its legend says."""
    found = []
    for target in panel["targets"]:
        query = Query(board, panel["title"], target["expr"])
        data = await prometheus._get("query_range", query=query.filled, start=str(start), end=str(end), step="1")
        for series in data["result"]:
            name = target["legendFormat"] or ",".join(series["metric"].values())
            for label, value in series["metric"].items():
                name = name.replace("{{" + label + "}}", value)
            line = [(float(at), float(value)) for at, value in series["values"] if value not in ("NaN", "+Inf", "-Inf")]
            if line:
                found.append((name, line))
    return found


def drawn(panel: dict[str, Any], series: list[tuple[str, list[tuple[float, float]]]]) -> str:
    """One panel as HTML."""
    place, unit = panel["gridPos"], panel["fieldConfig"]["defaults"].get("unit", "")
    width, height = place["w"] * WIDTH - 10, place["h"] * ROW - 6
    style = f"left:{place['x'] * WIDTH}px;top:{place['y'] * ROW}px;width:{width + 4}px;height:{height}px"
    if panel["type"] in ("stat", "table", "bargauge"):
        last = "<br>".join(f"{html.escape(name)}: {shown(line[-1][1], unit)}" if panel["type"] != "stat" else shown(line[-1][1], unit) for name, line in series)
        body = f"<div class='{'stat' if panel['type'] == 'stat' else 'legend'}'>{last or panel['fieldConfig']['defaults'].get('noValue', 'no data')}</div>"
    else:
        rows = min(len(series), 6)
        legend = "".join(
            f"<div><span style='color:{COLOURS[n % len(COLOURS)]}'>&#9632;</span> {html.escape(name)} {shown(line[-1][1], unit)} (max {shown(max(v for _, v in line), unit)})</div>"
            for n, (name, line) in enumerate(series[:6])
        )
        body = plot(series, width - 4, height - 30 - rows * 12) + f"<div class='legend'>{legend}</div>"
    return f"<div class='panel' style='{style}' title='{html.escape(panel['description'])}'><div class='title'>{html.escape(panel['title'])}</div>{body}</div>"


async def main(out: Path, seconds: int) -> None:
    """Run the node, draw the boards."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        async with town(Path(folder)) as place, running([place.ops], hurried(RULES_SHIPPED)) as prometheus:
            while not await prometheus.healthy():
                await asyncio.sleep(0.1)
            start = place.shop.net.clock.now()
            while place.shop.net.clock.now() < start + seconds:
                await place.round()
            for path in BOARDS:
                board, parts = document(path), []
                for panel in board["panels"]:
                    if panel["type"] == "row":
                        parts.append(f"<div class='heading' style='top:{panel['gridPos']['y'] * ROW + 10}px'>{html.escape(panel['title'])}</div>")
                    else:
                        parts.append(drawn(panel, await answers(prometheus, panel, path.stem, start, place.shop.net.clock.now())))
                page = out / f"{path.stem}.html"
                page.write_text(f"<meta charset=utf-8><style>{STYLE}</style><h2>{board['title']}</h2><div class=grid>{''.join(parts)}</div>")
    # Not before: the node runs in this process, and would be seen to stand still while a picture is taken.
    for path in BOARDS:
        page, tall = out / f"{path.stem}.html", max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in document(path)["panels"]) * ROW + 80
        if shutil.which("chromium"):
            picture = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={24 * WIDTH + 30},{tall}", f"--screenshot={page.with_suffix('.png')}"]
            subprocess.run([*picture, page.as_uri()], capture_output=True, check=True, timeout=60)
        print(page)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 60))
