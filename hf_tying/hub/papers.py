"""The papers behind what a model has, as a card cites them."""

from typing import NamedTuple


class Paper(NamedTuple):
    """A paper, by its number on arXiv, its title for a link, and its entry for BibTeX."""

    arxiv: str
    title: str
    bibtex: str


_PRESS_WOLF = Paper(
    "1608.05859",
    "Using the Output Embedding to Improve Language Models",
    """@inproceedings{press-wolf-2017-using,
  title     = {Using the Output Embedding to Improve Language Models},
  author    = {Press, Ofir and Wolf, Lior},
  booktitle = {Proceedings of EACL},
  year      = {2017},
  note      = {arXiv:1608.05859}
}""",
)
_VASWANI = Paper(
    "1706.03762",
    "Attention Is All You Need",
    """@inproceedings{vaswani-etal-2017-attention,
  title     = {Attention Is All You Need},
  author    = {Vaswani, Ashish and Shazeer, Noam and Parmar, Niki and Uszkoreit, Jakob and Jones, Llion and
               Gomez, Aidan N. and Kaiser, Lukasz and Polosukhin, Illia},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2017},
  note      = {arXiv:1706.03762}
}""",
)
_INAN = Paper(
    "1611.01462",
    "Tying Word Vectors and Word Classifiers",
    """@inproceedings{inan-etal-2017-tying,
  title     = {Tying Word Vectors and Word Classifiers: A Loss Framework for Language Modeling},
  author    = {Inan, Hakan and Khosravi, Khashayar and Socher, Richard},
  booktitle = {International Conference on Learning Representations},
  year      = {2017},
  note      = {arXiv:1611.01462}
}""",
)
_HEADLESS = Paper(
    "2309.08351",
    "Headless Language Models",
    """@inproceedings{godey-etal-2024-headless,
  title     = {Headless Language Models: Learning without Predicting with Contrastive Weight Tying},
  author    = {Godey, Nathan and de la Clergerie, {\\'E}ric and Sagot, Beno{\\^i}t},
  booktitle = {International Conference on Learning Representations},
  year      = {2024},
  note      = {arXiv:2309.08351}
}""",
)
TIED_LORA = Paper(
    "2311.09578",
    "Tied-LoRA",
    """@inproceedings{renduchintala-etal-2024-tied,
  title     = {Tied-LoRA: Enhancing Parameter Efficiency of LoRA with Weight Tying},
  author    = {Renduchintala, Adithya and Konuk, Tugrul and Kuchaiev, Oleksii},
  booktitle = {Proceedings of NAACL},
  year      = {2024},
  note      = {arXiv:2311.09578}
}""",
)
#: By what a model has: a scheme, the projection, an objective by its name in a card's facts.
PAPERS = {
    "two_way": _PRESS_WOLF,
    "projection": _PRESS_WOLF,
    "source_target": _PRESS_WOLF,
    "three_way": _VASWANI,
    "augmented": _INAN,
    "contrastive": _HEADLESS,
}


def papers_for(*features: str | None) -> list[Paper]:
    """The papers of some features, each once, in their order.

    Args:
        *features: names in `PAPERS`; others have none.
    """
    found = [PAPERS[feature] for feature in features if feature in PAPERS]
    if "three_way" in features:
        found.insert(0, _PRESS_WOLF)  # its TWWT is the first three-way tie
    return list(dict.fromkeys(found))
