"""Steps on disk: written in the background, checksummed, and restored from the newest good one."""
