"""Many processes: who is there, who died, what all agree on, and when all stop."""
