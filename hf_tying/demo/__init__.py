"""`hf-tying demo`: train one small model untied and tied, compare and save the two, and check the result.

`settings` has the settings. `job` runs the demo with a language model, and `translation/job` with a translation model.
Both use `measuring`, `models`, `proof` and `report`. Nothing is imported here, so that the command line can read the
defaults quickly.
"""
