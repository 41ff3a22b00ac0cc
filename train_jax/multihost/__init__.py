"""Many processes: start-up, deaths, agreement and stopping."""
