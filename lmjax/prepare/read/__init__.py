"""Readers: files of many formats as records, with what cannot be read set aside."""
