"""A small text of known words, in the three files that the papers' scripts read."""

import random
from pathlib import Path


def word_folder(folder: Path, sentences: int = 120, words: int = 30, seed: int = 0) -> Path:
    """`train.txt`, `valid.txt`, `test.txt`; each word is followed by one of three others, so that there is something
    to learn."""
    generator = random.Random(seed)
    followers = {word: generator.sample(range(words), 3) for word in range(words)}
    for name, count in (("train", sentences), ("valid", sentences // 6), ("test", sentences // 6)):
        lines = []
        for _ in range(count):
            word, line = generator.randrange(words), []
            for _ in range(generator.randrange(4, 12)):
                line.append(f"w{word}")
                word = generator.choice(followers[word])
            lines.append(" " + " ".join(line) + " ")
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return folder
