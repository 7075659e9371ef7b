"""`examples/papers/act3d_stages.py` as a user runs it, with a tiny network."""

import json

from hf_tying import assert_tied, load_tied


def test_tied_stages_have_a_third_of_the_parameters_and_are_loaded_again(as_script, tmp_path):
    flags = ["--steps", 2, "--seeds", 2, "--batch", 2, "--width", 4, "--output_dir", tmp_path]
    done = as_script("papers/act3d_stages.py", *flags)
    assert "distance from the target" in done.stdout
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert len(results["tied"]) == len(results["untied"]) == 2
    assert results["untied"][0]["parameters"] == 3 * results["tied"][0]["parameters"]
    network = load_tied(done.names["Stages"](4), tmp_path)
    assert_tied(network)
    assert network.stages[0].query.weight is network.stages[2].query.weight
