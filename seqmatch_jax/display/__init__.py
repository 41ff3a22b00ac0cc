"""Generations with their erasures for a person: in a terminal or on a page."""
