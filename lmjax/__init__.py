"""lmjax trains language models with JAX."""
