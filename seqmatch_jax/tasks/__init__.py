"""Questions and texts: each task joins its data, its evaluation and its prompts."""
