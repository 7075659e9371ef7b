"""A tie is declared in `hf_tying.config`.

It is made in `tying`. It is checked in `verify`.
"""
