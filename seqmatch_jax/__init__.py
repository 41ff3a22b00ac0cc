"""SequenceMatch: autoregressive models that take back a wrong token (arXiv 2306.05426)."""
