"""Steps on disk: written in the background, checksummed, and the newest good one found again."""
