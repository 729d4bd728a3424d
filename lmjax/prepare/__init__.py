"""From raw files to tokens: read, clean, deduplicate, split, tokenise; every row accounted for."""
