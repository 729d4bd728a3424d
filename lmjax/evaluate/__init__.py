"""What is measured on a model, during a run and after it."""
