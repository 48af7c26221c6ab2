"""Pages to look at: what a run has learned, and how runs differ. One HTML file each.

A page asks no other host for anything: pictures, numbers, style and script are in it. Charts are
SVG that `templates/page.js` draws, of the 300 lines that are needed here; the libraries that would
do it weigh 1 MB (Vega-Lite) to 4 MB (Plotly) a report, and a training writes one after every
evaluation. SVG prints sharply and follows the colours of the page, dark or light.
"""

from memseg_jax.reporting.comparison import write_comparison
from memseg_jax.reporting.report import REPORT, about, refresh, write_report

__all__ = ["REPORT", "about", "refresh", "write_comparison", "write_report"]
