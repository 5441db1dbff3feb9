"""What is learned: alignment, projection, losses, curriculum, and the framework that joins them."""
