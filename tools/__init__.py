"""Programs beside training, each run by hand from the root of the checkout."""
