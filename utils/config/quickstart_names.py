"""Names that stand, in place of a hub id or path, for the models and the text of the first run."""

STUDENT = "quickstart"
"""The student that is built here; also the text that it learns from, and as a teacher the trained one."""

TEACHER = "quickstart-teacher"
"""The teacher; as a student, the one yet to be trained."""

NAMES = frozenset({STUDENT, TEACHER})
