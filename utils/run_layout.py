"""The names of the files and folders that a run leaves in its folder."""

CONFIG = "config.yaml"
"""Every setting of the run; a recipe for the same run again."""

LOCK = ".lock"
"""Locked while a run writes here."""

LOG = "train.log"
METRICS = "metrics.jsonl"
"""One record for each logged step and evaluation."""

START = "baseline_evaluation.json"
"""Teacher and untrained student, measured before the first step."""

LAYERS = "student_layers.json"
"""Layers that a student was made from, where it has not all of its model's."""

POSITIONS = "positions.npz"
"""Positions that KD is learned at, where the student before training has chosen them."""

REPORT_JSON = "evaluation_report.json"
REPORT_MD = "evaluation_report.md"
REPORT_HTML = "report.html"
CURVES = "training_curves.png"
ROUTING = "routing.png"

CHECKPOINTS = "checkpoints"
ROUNDS = "rounds"
"""Texts that the student wrote itself to learn from them."""

BLOCKS = "blocks"
"""Windows of a stream of text; deleted as they are used up."""

STUDENT = "student"
"""The exported student, as transformers loads it."""

TRACKERS = "trackers"
"""Files of those experiment trackers that write some."""

WITHOUT_TEACHER = "without_teacher"
"""Run of the same student without the teacher, for comparison."""

FILES = (CONFIG, LOCK, LOG, METRICS, START, LAYERS, POSITIONS, REPORT_JSON, REPORT_MD, REPORT_HTML, CURVES, ROUTING)
FOLDERS = (CHECKPOINTS, ROUNDS, BLOCKS, STUDENT, TRACKERS, WITHOUT_TEACHER)
"""With FILES, everything that a run writes: hours later, it must not meet something of the other kind."""
