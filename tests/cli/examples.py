"""The examples that the helps of commands end with."""

import shlex


def example_of(hf_tying, command: str) -> list[str]:
    """The arguments of the example in `hf-tying COMMAND --help`, without the name of the program."""
    status, text, _ = hf_tying(command, "--help")
    assert status == 0
    words = " ".join(text.replace("│", " ").split())
    return shlex.split(words.split("Example: hf-tying ")[1].split(" ╭")[0])
