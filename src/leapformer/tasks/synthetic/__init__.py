"""Synthetic tasks: recalling, copying, counting, generated on the fly and evaluated beyond the trained length.

What each asks is in docs/synthetic.md. This file imports none of the modules, so that it costs nothing.
"""
