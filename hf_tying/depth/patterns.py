"""Orders of shared blocks over a stack of layers, by the names of the papers that compared them."""

from ..config import TyingError, nearest

#: By the name of the pattern: where it is from.
PATTERNS = {
    "sequence": "Takase & Kiyono 2021, section 2: each block several times in a row",
    "cycle": "Takase & Kiyono 2021, section 2: all blocks, again and again",
    "cycle_rev": "Takase & Kiyono 2021, section 2: as cycle, and the last time in reverse",
    "sandwich": "Reid et al. 2021 (Subformer), section 3.1: the first and the last layer apart, one block between",
    "middle_cycle": "Bae et al. 2025 (Mixture-of-Recursions), section 2.2: as sandwich, with a cycle between",
    "immediate": "Liu et al. 2024 (MobileLLM), section 2.2.4: each block again at once",
    "all": "Dehghani et al. 2019 (Universal Transformer), Lan et al. 2020 (ALBERT): one block",
}


def order_of(pattern: str, layers: int, unique: int | None = None) -> list[int]:
    """The block of each layer.

    Args:
        pattern: one of `PATTERNS`.
        layers: number of layers.
        unique: number of blocks. Default `None`: 1 for `"all"`, 3 for `"sandwich"`; the others need it.

    Raises:
        TyingError: an unknown pattern, or a number of blocks that it cannot have.

    Example:
        >>> order_of("cycle_rev", 6, 3)
        [0, 1, 2, 2, 1, 0]
    """
    if not isinstance(pattern, str) or pattern not in PATTERNS:
        hint = nearest(str(pattern), PATTERNS)
        raise TyingError(f"Unknown pattern {pattern!r}: expected one of {', '.join(PATTERNS)}{hint}.")
    fixed = {"all": 1, "sandwich": 3}.get(pattern)
    least = 3 if pattern in ("sandwich", "middle_cycle") else 1
    given = fixed if unique is None else unique
    if given is None or type(given) is not int or not least <= given <= layers or fixed not in (None, given):
        wanted = f"unique={fixed}" if fixed else f"a number of blocks from {least} to {layers}, the number of layers"
        raise TyingError(f"The pattern {pattern!r} with unique={given!r}: expected {wanted}.")
    unique = given
    if pattern in ("sequence", "immediate"):
        return [i * unique // layers for i in range(layers)]
    if pattern == "cycle_rev":
        turn = max(unique, layers - unique)  # as in the authors' code: first every block once, then back
        return [i % unique if i < turn else unique - 1 - (i - turn) for i in range(layers)]
    if pattern in ("sandwich", "middle_cycle"):
        return [0, *(1 + i % (unique - 2) for i in range(layers - 2)), unique - 1]
    return [i % unique for i in range(layers)]
