"""The names of what a run leaves in its folder."""

CONFIG = "config.yaml"
LOCK = ".lock"
LOG = "train.log"
METRICS = "metrics.jsonl"
START = "baseline_evaluation.json"
"""Teacher and untrained student, measured before the first step."""
REPORT_JSON = "evaluation_report.json"
REPORT_MD = "evaluation_report.md"
REPORT_HTML = "report.html"
CURVES = "training_curves.png"
ROUTING = "routing.png"

CHECKPOINTS = "checkpoints"
STUDENT = "student"
TRACKERS = "trackers"
WITHOUT_TEACHER = "without_teacher"
"""Of the same student trained without the teacher."""

FILES = (CONFIG, LOCK, LOG, METRICS, START, REPORT_JSON, REPORT_MD, REPORT_HTML, CURVES, ROUTING)
FOLDERS = (CHECKPOINTS, STUDENT, TRACKERS, WITHOUT_TEACHER)
"""With FILES, everything that a run writes: hours later, it must not meet something of the other kind."""
