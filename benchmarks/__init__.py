"""Speed, measured as ratios of interleaved runs; no test depends on it."""
