"""Questions and texts as training data: read or made, encoded, noised, packed, by position."""
