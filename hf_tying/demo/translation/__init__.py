"""`hf-tying demo --task translation`: one small model trained untied, two_way and three_way, then compared and proved.

`job` runs it.
"""
