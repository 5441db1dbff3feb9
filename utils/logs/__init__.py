"""Logs: console and train.log, records of metrics.jsonl, the progress display, trackers.

console        `setup_logging`, and the one rich console
streams        `make_streams_safe`: standard output and error that never raise
step_logger    `StepLogger`: everything that is written at a logged step
lines          the tagged lines of a step
records        metrics.jsonl and warnings, read back
progress       `Progress`: a bar or status lines
trackers       TensorBoard, Weights & Biases and others
"""

from .console import setup_logging
from .progress import Progress
from .records import read_metrics
from .step_logger import StepLogger
from .streams import make_streams_safe

__all__ = ["Progress", "StepLogger", "make_streams_safe", "read_metrics", "setup_logging"]
