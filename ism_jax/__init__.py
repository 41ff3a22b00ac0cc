"""iSM: shortcut models that sample in one, a few or many steps (arXiv 2510.21250)."""
