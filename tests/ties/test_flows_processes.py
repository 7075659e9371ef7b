"""f16, f16b, f20, f23: in two processes, DDP and FSDP2 keep a tie, or the user is told."""

import pytest

from ..processes import run_script


@pytest.fixture(scope="module")
def results() -> dict:
    return run_script("two_processes.py", processes=2)


@pytest.fixture(scope="module")
def adapters() -> dict:
    return run_script("two_processes_adapters.py", processes=2)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("case", ["ddp, head", "ddp, layers", "ddp, bart untied", "fsdp2, head", "fsdp2, layers"])
def test_two_processes_reach_what_one_reaches(results, case):
    assert results[case]["drift"] < 1e-5


@pytest.mark.timeout(300)
def test_a_pair_sharded_in_two_groups_is_told(results):
    assert (
        results["fsdp2, pair torn apart"]["error"] and "lm_head.weight" in results["fsdp2, pair torn apart"]["error"]
    )


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "case",
    [
        "ddp, TL6",
        "ddp, TL5, all",
        "fsdp1, TL6",
        "fsdp1, TL6, original parameters",
        "fsdp1, TL5, all",
        "fsdp2, TL6",
        "fsdp2, TL6, each leaf",
        "fsdp2, TL5, all",
    ],
)
def test_two_processes_train_a_tied_lora_as_one_does(adapters, case):
    assert adapters[case].get("error") is None and adapters[case]["drift"] < 1e-5
    if "fsdp1" in case:
        assert not adapters[case]["missing"] and adapters[case]["units"] > 3  # more than the layers and the root
