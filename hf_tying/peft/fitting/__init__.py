"""Tied factors fitted to given updates: to a LoRA adapter (`fit`), or to a weighted sum of adapters (`weighted`)."""
