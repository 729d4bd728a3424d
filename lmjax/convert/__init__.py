"""Weights in and out of Hugging Face's folders and GGUF files: `python -m lmjax.convert`.

`parts`: where each tensor of theirs lies in the arrays of ours, read in both directions. A family
(`gpt2`, `llama`, `gemma` and the others) is a table of parts, and a translation between config.json
and a recorded model.
"""
