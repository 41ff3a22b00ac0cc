"""Metrics of a policy: exact answers, likelihood, erasures, and texts beside real ones."""
