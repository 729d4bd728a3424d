"""Text as batches: random access, resumable at any step, the same on any number of hosts."""
