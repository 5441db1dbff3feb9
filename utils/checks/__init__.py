"""Checks before a long run, as verify_fixes.py prints them.

checklist: rows of checks, allowed ranges, and how results are printed
machine: versions of packages, kernels, precision
setup: text, models, window length, memory, disk and output folder of the run to come
evaluation: perplexity of models whose perplexity is known
loop: accumulation, resume, schedule and early stopping of the real loop
bench: tiny models and the real loop, which the last two measure on
miniature: folders of a tiny teacher and a tiny student, and their text
"""

from .bench import Bench
from .checklist import Check, Measured, Row, run

__all__ = ["Bench", "Check", "Measured", "Row", "run"]
