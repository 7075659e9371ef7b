"""Tied factors for updates that are given: those of a LoRA adapter (`fit`), or a sum of adapters (`weighted`)."""
