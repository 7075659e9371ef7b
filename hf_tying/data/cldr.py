"""A parallel corpus of any two languages in CLDR, generated with Babel: it needs no network and no file.

The Unicode Common Locale Data Repository (CLDR) has the forms of dates, numbers, units, currencies and lists in each
language, and the names of territories, languages and currencies. One date in two languages is a sentence pair.
"""

import re
from difflib import get_close_matches
from typing import TYPE_CHECKING

from .._extras import require
from ..config import TyingError
from .parallel import ParallelCorpus
from .split import Pair, split_pairs

if TYPE_CHECKING:
    from babel import Locale


# There are about 600 codes. With fewer names, most combinations are missing, and the rest are mostly figures.
_FEWEST_NAMES = 300


def cldr_corpus(
    source_language: str = "en", target_language: str = "de", validation_fraction: float = 0.05, seed: int = 0
) -> tuple[ParallelCorpus, ParallelCorpus]:
    """Generate about 17,000 pairs of short lines, and split them into training and validation pairs.

    The lines are dates, times, spans, relative times, amounts, sums of money, numbers, languages of territories, lists
    of territories and of languages, and the bare names of all territories, languages and currencies.

    The validation pairs are combinations: a day in all its forms and at all its hours, a number with a unit or a
    currency, a language with a territory, a list in every order. A bare name is always in the training pairs, because
    nothing else in the text says what Switzerland is in German. So is every phrase with the number one or two, whose
    words have forms of their own. A model that has learnt the names, the numbers and the months can write every
    validation line. No line of either language is in both parts; case and the spelling of numbers are ignored in this
    comparison (see `comparable`). Spaces of every kind are written as plain spaces.

    Args:
        source_language (`str`, default `"en"`): locale of CLDR, such as `"fr"`, `"pt-BR"` or `"sr_Latn"`.
        target_language (`str`, default `"de"`): locale of a different language.
        validation_fraction (`float`, default 0.05): approximate share of the validation pairs.
        seed (`int`, default 0): seed of the combinations and of the split. Equal arguments give equal pairs in every
            process, with the same version of Babel.

    Returns:
        `tuple[ParallelCorpus, ParallelCorpus]`: training pairs and validation pairs.

    Raises:
        TyingError: if Babel is not installed, a code is unknown, both codes are of one language, CLDR has too few
            names in a language, or `validation_fraction` leaves one of the two parts empty.
    """
    require("babel", "The corpus of CLDR (give pairs of your own with --train_file to do without)", "demo")
    from .cldr_phrases import phrases

    source, target = _locale(source_language), _locale(target_language)
    _refuse_unfit(source, target)
    pairs = []
    for phrase in phrases(seed):
        try:
            pair = Pair(phrase.group, *(_one_line(phrase.render(locale=locale)) for locale in (source, target)))
        except (LookupError, ValueError):
            continue  # CLDR has this phrase in one of the two languages only
        if pair.source != pair.target or re.search(r"[^\W\d_]", pair.source):  # figures alone are not translated
            pairs.append(pair)
    sides = split_pairs(pairs, validation_fraction, seed)
    if not all(sides):
        raise TyingError(
            f"validation_fraction={validation_fraction} of {len(pairs)} pairs leaves {len(sides[0])} to train on and "
            f"{len(sides[1])} held out: expected a number between 0 and 1, such as 0.05."
        )
    languages = {"source_language": str(source), "target_language": str(target)}
    train, validation = (
        ParallelCorpus([pair.source for pair in side], [pair.target for pair in side], **languages) for side in sides
    )
    return train, validation


def _locale(code: str) -> "Locale":
    from babel import Locale, UnknownLocaleError

    try:
        return Locale.parse(code.replace("-", "_"))
    except (UnknownLocaleError, ValueError):
        hint = ", ".join(map(repr, _nearest_codes(code)))
        raise TyingError(
            f"Unknown language {code!r}: expected the code of a locale in CLDR, such as 'en' or 'pt-BR'"
            f"{'; the nearest are ' + hint if hint else ''}."
        ) from None


def _nearest_codes(code: str) -> list[str]:
    """Up to three codes: of the language with this name, of the language of this territory, and similar codes."""
    from babel import Locale
    from babel.core import get_global
    from babel.localedata import locale_identifiers

    word = code.casefold()
    named = [language for language, name in Locale("en").languages.items() if name.casefold() == word]
    spoken = get_global("likely_subtags").get(f"und_{code.upper()}", "").split("_")[0]
    known = sorted(locale for locale in locale_identifiers() if ("_" in locale) == ("_" in code.replace("-", "_")))
    alike = get_close_matches(code.replace("-", "_"), known, n=3, cutoff=0.5)
    return [c for c in dict.fromkeys((*named, spoken, *alike)) if c in known][:3]


def _refuse_unfit(source: "Locale", target: "Locale") -> None:
    from .cldr_phrases import named_codes

    if source.language == target.language:
        raise TyingError(
            f"The source language {str(source)!r} and the target language {str(target)!r} are the same language: "
            "there is nothing to translate. Give two."
        )
    for locale in (source, target):
        named, known = len(named_codes(locale)), len(named_codes(type(locale)("en")))
        if named < _FEWEST_NAMES:
            raise TyingError(
                f"CLDR has too few names in {str(locale)!r}: it names {named} of {known} territories, languages and "
                f"currencies in it, expected at least {_FEWEST_NAMES}. Choose another language."
            )


def _one_line(text: str) -> str:
    return " ".join(text.split())
