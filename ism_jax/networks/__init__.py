"""Networks of other people, with their published weights."""
