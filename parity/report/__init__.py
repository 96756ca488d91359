"""What a comparison found, and how it is told."""

from parity.report.findings import NETWORK, Diagnosis, Divergence, LayerRow, both_names, number
from parity.report.report import Report

__all__ = ["NETWORK", "Diagnosis", "Divergence", "LayerRow", "Report", "both_names", "number"]
