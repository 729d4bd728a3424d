"""Pure functions from arrays to arrays, with their own gradients where XLA's are slow."""
