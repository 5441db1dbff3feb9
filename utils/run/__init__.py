"""A run as a whole: its folder, its ends, its uploads."""
