"""Inputs that are wrong in every way that the schema allows.

The property is everywhere the same: what is asked for either works or ends with one sentence for
the person at the keyboard; never with another exception, never with a hang, and never with a
result that damage has changed.
"""
