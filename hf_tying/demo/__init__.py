"""`hf-tying demo`: one small model trained untied and tied, then compared, saved and proved.

`settings` says what to run. `job` runs it with a language model, `translation/job` with a translation model; what both
need is in `measuring`, `models`, `proof` and `report`. Nothing is imported here, so that the command line can read the
defaults.
"""
