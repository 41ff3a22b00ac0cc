"""What is written: each task joins its data, its evaluation and its prompts (see ../task.py)."""
