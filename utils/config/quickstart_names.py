"""Names that stand for the models and texts of the first run."""

STUDENT, TEACHER = "quickstart", "quickstart-teacher"
"""Names, in place of a hub id or path, of what is built here. `quickstart` is also the text, and as a teacher the
trained one; `quickstart-teacher` is the teacher, as a student yet to be trained."""


NAMES = frozenset({STUDENT, TEACHER})
