"""Comparison of runs, from the files in their folders alone: `train.py --compare`.

compare: reads the runs, prints and draws
runs, forms: a run as its folder tells of it, and what its files may hold
figures: by what runs are compared
seeds: means over seeds, and differences seed by seed
settings: in which runs differ
notes: what keeps figures from being compared
tables, files, picture: the comparison on the screen, as Markdown or CSV, as curves
"""
