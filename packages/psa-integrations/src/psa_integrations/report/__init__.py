"""A comparison of dense and sparse runs as files: numbers, videos and one page that opens from disk."""

from psa_integrations.report.metrics import video_metrics
from psa_integrations.report.page import render_page
from psa_integrations.report.writer import ReportRun, ReportWriter

__all__ = ["ReportRun", "ReportWriter", "render_page", "video_metrics"]
