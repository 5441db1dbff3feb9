"""Models and tokenizers as others made them: found, loaded, adapted."""
