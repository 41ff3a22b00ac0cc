"""Questions and texts as training data: read or generated, encoded, noised, packed."""
