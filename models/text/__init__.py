"""From text to batches: tokens, vocabularies, alignment, windows, conversations."""
