"""Images and latents as training data: opened, decoded, encoded, and dealt out by position."""
