"""`diagnose` and `inspect`: every disease looked for in one source, none of its code run, no weight loaded."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from ..config import TyingError
from ..report.checkpoint import Checkpoint, read_checkpoint
from ..report.dispatch import is_adapter
from ..report.on_adapters import SETTINGS, report_on_adapter
from ..report.on_files import report_on_files
from ..report.opening import open_source
from ..report.records import Finding, TyingReport
from ..report.sources import ReadError, Source
from . import adapters, flags, published_code, weights
from .facts import Facts, ModelFacts

#: What is looked for in a model, beside what its report finds (T001, T003, T008 and T009).
IN_MODELS: tuple[Callable[[Facts, ModelFacts], Iterator[Finding]], ...] = (
    flags.head_is_random,
    flags.entry_and_flag,
    flags.rows_and_vocabulary,
    weights.written_twice,
    weights.written_twice_for_llama_cpp,
    weights.equal_and_untied,
    weights.order_decides,
    weights.otherwise_without_the_entry,
    flags.flag_of_a_wrapper,
    flags.flag_of_a_part,
    weights.merged_into_one_side,
    flags.projection_in_a_stock_class,
    published_code.published_code,
    weights.pickles,
    weights.counts,
)
IN_ADAPTERS: tuple[Callable[[Facts], Iterator[Finding]], ...] = (
    adapters.one_side,
    adapters.tied_form_alone,
    adapters.forms_differ,
)
#: The diseases by code, for the documentation and for `--only`.
CODES = {
    "T001": "names of a tie have different values",
    "T002": "the flag is false and a name is missing: random when loaded",
    "T003": "no name of a tie is in the file",
    "T004": "the `tying` entry and the flag, or the file, disagree",
    "T005": "vocab_size is not the rows of the matrix",
    "T006": "one matrix is written several times",
    "T007": "two matrices are equal and untied",
    "T008": "dtypes differ inside a tie",
    "T009": "which values count depends on the order of loading",
    "T010": "an encoder-decoder ignores its flag",
    "T011": "the flag is in a config that the class does not read",
    "T012": "an adapter changes one side of a tied matrix",
    "T013": "an adapter was merged into one side, and the flag lies",
    "T014": "a projection in a stock class",
    "T015": "a Tied-LoRA without its LoRA form",
    "T016": "both forms of an adapter differ",
    "T017": "the base model is a path",
    "T018": "published code does not import without hf_tying",
    "T019": "_tied_weights_keys is a list",
    "T020": "the weights are a pickle",
    "T021": "a tensor that the class has no place for",
    "T022": "counts in the config and in the files contradict each other",
    "T023": "each matrix is written once, and plain transformers fills in others",
}


def diagnose(
    source: str | Path,
    *,
    base: str | Path | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
) -> list[Finding]:
    """Find what is wrong with the ties of a model or an adapter, with the evidence and the command that mends it.

    Values are read for tied names only. A class of transformers that the config names is built without weights, and
    code that comes with the checkpoint is parsed, never run.

    Args:
        source: a folder, a file of weights, or `owner/name[@revision][/subfolder]` on the Hub.
        base: base model of an adapter, in the same forms. Default: the one that the adapter names, where it is on this
            machine.
        revision: branch, tag or commit on the Hub.
        subfolder: folder inside of it.
        token: token of the Hub.

    Returns:
        A `Finding` for each disease, errors first; `[]` of a healthy one. `CODES` lists the codes.

    Raises:
        TyingError: the files are missing, truncated or malformed.
    """
    opened = open_source(source, revision, subfolder, token)
    return _diagnosis(opened, base, token, thorough=True)[1]


def inspect(
    source: str | Path,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
) -> TyingReport:
    """`tying_report` of a source, with the diseases that show without building its class.

    Args:
        source: see `diagnose`.
        revision: see `diagnose`.
        subfolder: see `diagnose`.
        token: see `diagnose`.

    Raises:
        TyingError: the files are missing, truncated or malformed, or the `tying` entry is.
    """
    return inspect_source(open_source(source, revision, subfolder, token))


def inspect_source(source: Source) -> TyingReport:
    """`inspect` of a place that was opened.

    Raises:
        TyingError: see `inspect`.
    """
    report, findings = _diagnosis(source, None, None, thorough=False)
    if report is None:
        raise TyingError(findings[0].message)
    return dataclasses.replace(report, findings=findings)


def diagnose_source(source: Source, base: str | Path | None = None, token: str | bool | None = None) -> list[Finding]:
    """`diagnose` of a place that was opened.

    Raises:
        TyingError: see `diagnose`.
    """
    return _diagnosis(source, base, token, thorough=True)[1]


def _diagnosis(
    source: Source, base: str | Path | None, token: str | bool | None, thorough: bool
) -> tuple[TyingReport | None, list[Finding]]:
    facts = Facts(source, thorough=thorough)
    found: list[Finding]
    if is_adapter(source):
        facts.report = report_on_adapter(source)
        facts.base = _base_of(source, base, token)
        found = [*facts.report.findings, *_all(look(facts) for look in IN_ADAPTERS)]
    else:
        facts.checkpoint = read_checkpoint(source)
        found = _in_model(facts, facts.checkpoint)
    found += adapters.base_is_a_path(facts)
    order = {"error": 0, "warning": 1, "info": 2}
    return facts.report, sorted(_named(found, facts.name), key=lambda finding: order[finding.severity])


def _in_model(facts: Facts, checkpoint: Checkpoint) -> list[Finding]:
    try:
        facts.report = report_on_files(checkpoint)
    except ReadError:
        raise
    except TyingError as error:
        if not checkpoint.config:
            raise
        code = "T022" if weights.has_wild_counts(checkpoint) else "T004"
        return [Finding(code, "error", str(error), "Correct config.json, or save the model again.")]
    model = ModelFacts(checkpoint)
    return [*facts.report.findings, *_all(look(facts, model) for look in IN_MODELS)]


def _all(parts: Iterable[Iterable[Finding]]) -> list[Finding]:
    return [finding for part in parts for finding in part]


def _named(findings: Iterable[Finding], name: str) -> Iterator[Finding]:
    """Findings whose commands name the source."""
    for finding in findings:
        mend = finding.mend and finding.mend.replace(" SOURCE ", f" {name} ")
        yield dataclasses.replace(finding, mend=mend)


def _base_of(source: Source, base: str | Path | None, token: str | bool | None) -> Checkpoint | None:
    """The files of an adapter's base model; `None` where it is not given and not on this machine."""
    if base is not None:
        return read_checkpoint(open_source(base, token=token))
    named = source.json(SETTINGS).get("base_model_name_or_path")
    if not isinstance(named, str) or not Path(named).is_absolute() or not Path(named).is_dir():
        return None
    try:
        return read_checkpoint(open_source(named))
    except TyingError:
        return None
