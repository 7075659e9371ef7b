"""Upstream's own tests: transformers' on classes with `TiedModelMixin`, PEFT's on Tied-LoRA: `python -m tests.upstream`."""
