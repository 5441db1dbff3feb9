"""What teacher and student score on held-out text."""
