"""How good a policy is: exact answers, likelihood, erasures, and texts beside real ones."""
