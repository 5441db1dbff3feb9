"""Evaluation of teacher and student on text that nobody trains on.

held_out         the evaluation text, and everything that is measured on it
scores           loss, perplexity and bits per byte of a model; agreement of two
samples          continuations that a model writes
written_text     figures of texts sampled from a model
comparability    the condition under which bits per byte of two models compare
lm_eval_tasks    tasks of the Language Model Evaluation Harness
exported         the check that an exported student is the one that was measured
"""

from .comparability import unspelt_text
from .exported import load_anew
from .held_out import HeldOut, TextStart
from .samples import generate_samples
from .scores import evaluate, float32_evaluation, token_nll

__all__ = [
    "HeldOut",
    "TextStart",
    "evaluate",
    "float32_evaluation",
    "generate_samples",
    "load_anew",
    "token_nll",
    "unspelt_text",
]
