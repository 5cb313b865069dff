"""The report of one compression: as values, as report.json and as one self-contained page."""

from slimc.report.html import render_html, write_html
from slimc.report.model import (
    Accuracy,
    Calibration,
    Change,
    Environment,
    FrozenOperator,
    GroupRow,
    Latency,
    Method,
    OnnxFile,
    OutputFile,
    RecoveryStep,
    Report,
    Selection,
    TargetResult,
    Training,
    TrainingPoint,
    Verification,
)

__all__ = [
    "Accuracy",
    "Calibration",
    "Change",
    "Environment",
    "FrozenOperator",
    "GroupRow",
    "Latency",
    "Method",
    "OnnxFile",
    "OutputFile",
    "RecoveryStep",
    "Report",
    "Selection",
    "TargetResult",
    "Training",
    "TrainingPoint",
    "Verification",
    "render_html",
    "write_html",
]
