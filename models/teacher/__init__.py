"""The teacher's side: frozen or from a cache, and its projection on the student's vocabulary."""
