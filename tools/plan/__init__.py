"""Ahead-of-time compilation for other accelerators: what a run would need of them."""
