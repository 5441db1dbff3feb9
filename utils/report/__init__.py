"""Everything that a run leaves to be read.

report: writes all files of the report, and prints the summary
results: the results, and their words, figures and tables in every form of the report
written_text: the table of figures of written text
markdown, html: the report in these forms; the page is report.html.jinja
token_views: a sentence as both models read it, positions that KD is learned at, places where the models differ most
charts: curves of the training and the routing, as PNG and SVG
model_card: README.md of the exported student
usage_example: code that loads the student, and the command that repeats the run
"""

from .report import print_summary, write_report

__all__ = ["print_summary", "write_report"]
