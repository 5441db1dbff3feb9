"""What a teacher said, on disk."""
