"""What a person looks at: generations with their erasures, in a terminal or on a page."""
