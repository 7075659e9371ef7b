"""This package beside what is untouched.

Upstream's own tests, transformers' on `TiedModelMixin`, PEFT's on Tied-LoRA: `python -m tests.upstream`. Every class
through its life: `python -m tests.upstream.sweep`. What importing it changes: `python -m tests.upstream.import_alone`.
"""
