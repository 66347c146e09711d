"""Promise against measurement: joined, put into words, and drawn as one page."""

from __future__ import annotations

from edgeflex.reports.build import build_report, latency_statistic
from edgeflex.reports.charts import save_curve
from edgeflex.reports.html import to_html
from edgeflex.reports.summary import outcome, summary_rows

__all__ = ["build_report", "latency_statistic", "outcome", "save_curve", "summary_rows", "to_html"]
