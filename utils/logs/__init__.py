"""Console, metrics, progress, trackers."""
