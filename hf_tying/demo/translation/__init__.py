"""`hf-tying demo --task translation`: train one small model untied, two_way and three_way, compare and check.

`job` runs it.
"""
