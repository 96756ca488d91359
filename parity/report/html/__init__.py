"""A report as one HTML page."""

from parity.report.html.page import page

__all__ = ["page"]
