"""Everything that a GPU has to say about this project, in ten minutes and by one command: python -m benchmarks.gpu."""
