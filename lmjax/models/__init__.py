"""Model families, one per file; a preset is a function that returns a module."""
