"""What every report page is made of: the document, escaped text, and plots that open without network."""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from formwright.errors import require

# Okabe and Ito's colours, told apart by colour-blind readers and in grey, without the yellow; then three darker ones.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#7A5195", "#56B4E9", "#8C6D1F", "#4D4D4D", "#E69F00", "#1B4F5C")
INK, QUIET, RULE = "#1c1c1a", "#6b6a65", "#dedcd5"
STYLE = (Path(__file__).parent / "report.css").read_text(encoding="utf-8")


def document(title: str, body: Sequence[str]) -> str:
    """One self-contained HTML file; Plotly's library is embedded once.

    Raises:
        FormwrightError: Plotly is not installed.
    """
    require("plotly", extra="report")
    from plotly.offline import get_plotlyjs

    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{STYLE}</style>"
        f"<script>{get_plotlyjs()}</script></head><body><main>{''.join(body)}</main></body></html>\n"
    )


def text(value: Any) -> str:
    return html.escape(str(value), quote=True)


def layout(title_x: str, title_y: str, *, height: int = 320) -> dict[str, Any]:
    axis: dict[str, Any] = {
        "showline": True, "linecolor": INK, "linewidth": 1, "ticks": "outside", "tickcolor": INK, "ticklen": 4,
        "gridcolor": "#eceae4", "zeroline": False, "title": {"standoff": 8, "font": {"size": 13, "color": QUIET}},
    }  # fmt: skip
    return {
        "height": height,
        "margin": {"l": 58, "r": 12, "t": 8, "b": 46},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {
            "family": 'system-ui, "Segoe UI", "Helvetica Neue", Arial, "DejaVu Sans", sans-serif',
            "size": 12.5,
            "color": INK,
        },
        "showlegend": False,
        "hoverlabel": {"bgcolor": "#ffffff", "font": {"color": INK}},
        "xaxis": axis | {"title": axis["title"] | {"text": title_x}},
        "yaxis": axis | {"title": axis["title"] | {"text": title_y}},
    }


def figure(traces: Sequence[dict[str, Any]], layout: dict[str, Any], name: str) -> str:
    import plotly.graph_objects as go
    import plotly.io

    plotly.io.templates.default = "none"
    drawn = go.Figure(data=list(traces), layout=layout).to_html(
        full_html=False,
        include_plotlyjs=False,
        div_id=name,
        default_width="100%",
        default_height=f"{layout['height']}px",
        config={"displayModeBar": False, "responsive": True, "plotlyServerURL": ""},
    )
    shown = f"{layout['yaxis']['title']['text']} against {layout['xaxis']['title']['text']}"
    return f'<figure aria-label="{text(shown)}">{drawn}</figure>'
