"""transformers' own common model tests, run on classes built with `TiedModelMixin`: `python -m tests.upstream`."""
