"""`hf-tying demo`: one small language model trained twice, untied and tied, then compared, saved and proved.

`settings` says what to run, `job` runs it. Nothing is imported here, so that the command line can read the defaults.
"""
