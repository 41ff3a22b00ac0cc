"""Programs beside training. Run each by hand from the root of the checkout."""
