"""Upstream's own tests, transformers' on `TiedModelMixin`, PEFT's on Tied-LoRA: `python -m tests.upstream`."""
