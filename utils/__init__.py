"""How it is run: data, loop, checkpoints, evaluation, report."""
