"""The stages: pure functions from a table of records to what becomes of each of them."""
