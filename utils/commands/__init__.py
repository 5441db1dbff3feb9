"""The commands behind `train.py` and `verify_fixes.py`: the one folder where both towers, models/ and utils/, meet.

- settings: everything that a run depends on, and the command line for it; loads no torch
- automatic_curriculum: the weights of loss terms that nobody gave
- run: one run, top to bottom
- checks: one row for each check of `verify_fixes.py`

Both towers are imported by their full names here: relative ones would not reach from one to the other.
"""

import warnings

# In a notebook without widgets tqdm gives advice about bars that no run draws.
warnings.filterwarnings("ignore", message="IProgress not found")
