"""Logs: console and train.log, records of metrics.jsonl, the progress display, trackers.

terminal       the one rich console, its columns, and whether a person may watch
console        `setup_logging`: records on the console and in train.log
streams        `make_streams_safe`: standard output and error that never raise
step_logger    `StepLogger`: everything that is written at a logged step
lines          the lines of a step, an evaluation and a sample
records        metrics.jsonl and warnings, read back
progress       `Progress`: a bar, the panel of a notebook, or status lines
notebook       `Panel`: table, curves and progress below the cell of a notebook
time_left      `TimeLeft`: an estimate of what a command still takes
trackers       TensorBoard, Weights & Biases and others
"""

from .console import setup_logging
from .progress import Progress
from .records import read_metrics
from .step_logger import StepLogger
from .streams import make_streams_safe

__all__ = ["Progress", "StepLogger", "make_streams_safe", "read_metrics", "setup_logging"]
