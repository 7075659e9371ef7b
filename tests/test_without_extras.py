"""The core needs torch, transformers and wrapt: `pip install --no-deps hf-tying` beside them is enough for it."""

from .processes import SCRIPTS, run_python


def test_ties_are_made_checked_shown_saved_and_loaded_beside_torch_and_transformers_alone():
    assert "hidden" in run_python(SCRIPTS / "without_extras.py").stdout
