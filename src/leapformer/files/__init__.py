"""Reading and writing files that may be damaged, hostile or shared: the one place of each guard.

`reading` has text, JSON and YAML, `writing` what replaces a file or a folder whole, `checksums` what tells that a file
still holds what was written. This package needs the standard library alone, and PyYAML where YAML is read.
"""
