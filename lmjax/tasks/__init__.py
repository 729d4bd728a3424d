"""Objectives, one per file. A task takes any module that honours a protocol of `lmjax.core`."""
