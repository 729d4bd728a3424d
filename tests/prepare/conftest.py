"""Preparation needs its extra: without it there is nothing here to test."""

import importlib.util

NEEDED = ("pyarrow", "orjson")
collect_ignore_glob = [] if all(map(importlib.util.find_spec, NEEDED)) else ["*"]
