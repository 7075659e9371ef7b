"""The life of one class, held in each scheme that it can have, beside an untouched model: `examine`."""

import copy
import functools
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from hf_tying import TyingError, tie, untie
from hf_tying.config import SCHEMES
from hf_tying.ties.anatomy import roles
from hf_tying.ties.record import flag_is_forced

from .. import zoo
from ..zoo_configs import configs_of
from ..zoo_use import separate
from . import lives
from .lives import Facts, difference, line, sharing
from .stock_worker import StockWorker

Act = Callable[[PreTrainedModel, Path], Facts]
#: The facts that are as stock's also where no stock class has the tie, and the lists of which no more may be in ours.
ALIKE = ("keys", "shapes", "sizes")
NO_MORE = ("missing", "unexpected", "mismatched")
#: Stands for a scheme where the groups are those that the class itself ties.
GROUPS = "groups"
#: Classes whose own file has not all that a class over it needs, and why a held one's has more.
FULLER_FILES = {
    "OpenAIGPTDoubleHeadsModel": "the matrix is there under the head's name alone, and a classifier begins at random"
}
#: What may be refused although an untouched model does something there: no other end is right.
RIGHT_REFUSALS = ("expected every name to have the root's shape and dtype", "there is no second one to give a matrix")


@dataclass
class Finding:
    """Something that a held model does otherwise than an untouched one.

    Args:
        name: of the class.
        scheme: that is held.
        step: of its life.
        what: the difference, or the error.
    """

    name: str
    scheme: str
    step: str
    what: str


@dataclass
class Examination:
    """What was found of one class.

    Args:
        name: of the class.
        steps: by scheme, the steps that were compared.
        findings: what is wrong.
        refusals: each `TyingError` that is right, before anything was changed.
        left_out: why the class was not examined.
        seconds: the time it took.
    """

    name: str
    steps: dict[str, list[str]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    refusals: list[Finding] = field(default_factory=list)
    left_out: str = ""
    seconds: float = 0.0


def examine(name: str, worker: StockWorker, most: int = 3_000_000) -> Examination:
    """Hold the class `name` in each scheme that it can have, and compare its life with an untouched model's.

    A class without two roles that ties something all the same is held in these groups.

    A scheme that the class has by its own flag must be like the untouched model in everything. Any other one has no
    such control: its values and outputs must stay what they are, and its file must be as good as that of a model in
    which nothing is tied.

    Args:
        name: one of `zoo.classes()`.
        worker: the process that loads files as others do.
        most: parameters of a model; larger ones are left out.
    """
    examination, started = Examination(name), time.monotonic()
    try:
        model = zoo.build(name)
    except zoo.CannotBuild as error:
        return Examination(name, left_out=str(error))
    found = roles(model)
    size = sum(parameter.numel() for parameter in model.parameters())
    schemes = [scheme for scheme, members in SCHEMES.items() if members and set(members) <= found.keys()]
    variants = _variants(model)
    if not schemes and any(map(sharing, variants)):
        schemes = [GROUPS]
    if size > most:
        examination.left_out = f"{size:,} parameters"
    elif not schemes:
        examination.left_out = "nothing is tied"
    else:
        for scheme in schemes:
            _Life(name, scheme, variants, worker, examination).live()
    examination.seconds = round(time.monotonic() - started, 2)
    return examination


def _variants(model: PreTrainedModel) -> list[PreTrainedModel]:
    """Untouched models of the class of `model`: that one, and with the flag on and off, where a file can say so."""
    models = [model]
    for flag in (True, False):
        try:
            other = zoo.build(type(model).__name__, tie_word_embeddings=flag)
        except zoo.CannotBuild:
            continue
        for part, as_made in zip(configs_of(other.config), configs_of(model.config), strict=True):
            if not hasattr(as_made, "tie_word_embeddings"):
                vars(part).pop("tie_word_embeddings", None)
        if _is_read_back(other.config) and sharing(other) not in map(sharing, models):
            models.append(other)
    return models


def _is_read_back(config: PreTrainedConfig) -> bool:
    """Whether the flags of a config can be in a file: T5 puts its own back, DBRX knows one alone."""
    try:
        again = type(config).from_dict(config.to_dict())
    except Exception:
        return False
    return _flags(again) == _flags(config)


def _flags(config: PreTrainedConfig) -> list:
    return [getattr(part, "tie_word_embeddings", None) for part in configs_of(config)]


class _Life:
    """One class in one scheme.

    Args:
        name: of the class.
        scheme: to hold.
        variants: untouched models of the class.
        worker: see `examine`.
        examination: what is found is written there.
    """

    def __init__(
        self,
        name: str,
        scheme: str,
        variants: list[PreTrainedModel],
        worker: StockWorker,
        examination: Examination,
    ):
        self.name, self.scheme, self.worker, self.examination = name, scheme, worker, examination
        self.steps = examination.steps.setdefault(scheme, [])
        self.members = SCHEMES.get(scheme, ())
        self.native = next((model for model in variants if self._is_in_force(model)), None)
        self.untied = min(variants, key=lambda model: sum(map(len, sharing(model))))
        self.spec: str | dict[str, list[str]] = scheme
        if scheme == GROUPS:
            kept = self.native.all_tied_weights_keys.values()  # in its files
            ordered = [sorted(names, key=lambda name: name not in kept) for names in sharing(self.native)]
            self.spec = {f"group_{i}": names for i, names in enumerate(ordered)}

    def live(self) -> None:
        if self.native is not None:
            self.start, self.init_from, self.start_name = self.native, None, ""
            if (held := self._first()) is not None:
                self.exact, self.control = True, self.native
                self._from_birth(held)
                self._through_life(held)
        if self.untied is not self.native and self.members:
            self.start, self.init_from, self.start_name = self.untied, self.members[0], "from untied: "
            if (held := self._first()) is not None:
                if not self._is_in_force(held):
                    self._found("tie", f"the roles are not tied as the scheme says: {sharing(held)}")
                self.exact = self._is_as_native(held)
                self.control = self._control(held)
                self._from_birth(held)
                if self.native is None:
                    self._through_life(held)
                self._end(held)

    def _from_birth(self, held: PreTrainedModel) -> None:
        born = copy.deepcopy(self.control) if self.exact else held
        self.truth = {"values": lives.values(born), "outputs": lives.outputs(born), "sharing": sharing(born)}
        self._compare("as it is", lives.now)
        self._compare("file", lives.file)
        self._compare("file in stock", self._in_stock([self.name]))
        if self.exact:
            self._compare("made by its config", self._declared)

    def _through_life(self, held: PreTrainedModel) -> None:
        tasks = [*lives.task_classes(held), self.name]
        if len(tasks) > 1:
            self._compare("task change", self._here(tasks), self._in_stock(tasks))
            self._compare("task change in stock", self._in_stock(tasks))
        self._compare("resized up", functools.partial(lives.resized, by=5))
        self._compare("resized down", functools.partial(lives.resized, by=-7))
        self._compare("state dict", self._into_plain(assign=False))
        self._compare("state dict, assigned", self._into_plain(assign=True))
        self._compare("accelerate", lives.resumed)

    def _end(self, held: PreTrainedModel) -> None:
        """Untied, a model that began untied is as at its beginning, but for its values."""
        self.exact, self.control, self.ends = False, self._with_values_of(held, self.untied), True
        self.truth["sharing"] = None  # what the architecture ties besides stays tied
        self._compare("untied", lives.now)
        self._compare("untied, file", lives.file)
        self._compare("untied, file in stock", self._in_stock([self.name]))

    # --- models ------------------------------------------------------------------------------------------------------

    ends = False

    def held(self) -> PreTrainedModel:
        """A new model, held, at its birth or at its end."""
        model = tie(copy.deepcopy(self.start), self.spec, init_from=self.init_from)
        return untie(model) if self.ends else model

    def _first(self) -> PreTrainedModel | None:
        """The first one, with all that its making could show."""
        model = copy.deepcopy(self.start)
        before = picture(model)
        try:
            return tie(model, self.spec, init_from=self.init_from)
        except TyingError as error:
            self._refused("tie", error, before, model)
        except Exception as error:
            self._found("tie", line(error))
        return None

    def _is_in_force(self, model: PreTrainedModel) -> bool:
        """Whether the roles of the scheme are one parameter, and the others are apart."""
        if not self.members:
            return bool(sharing(model))
        slots = dict(model.named_parameters(remove_duplicate=False))
        matrices = {role: id(slots[found.name]) for role, found in roles(model).items() if found.name in slots}
        others = [matrix for role, matrix in matrices.items() if role not in self.members]
        together = len({matrices.get(role) for role in self.members}) == 1
        return together and len(set(matrices.values())) == 1 + len(others)

    def _is_as_native(self, held: PreTrainedModel) -> bool:
        """Whether a model that began untied should now be like one that is tied by its flag.

        The flag tells of the softmax: where there is none, or the class reads the flag for something else, it stays.
        """
        if self.native is None or sharing(held) != sharing(self.native):
            return False
        told = "output" in self.members and not flag_is_forced(type(held.config))
        return told or _flags(held.config) == _flags(self.native.config)

    def _control(self, held: PreTrainedModel) -> PreTrainedModel:
        """An untouched model with the values of `held`."""
        if self.exact:
            return self._with_values_of(held, self.native)
        stock = copy.deepcopy(self.untied)
        separate(stock)
        return self._with_values_of(held, stock)

    @staticmethod
    def _with_values_of(held: PreTrainedModel, stock: PreTrainedModel) -> PreTrainedModel:
        control, given = copy.deepcopy(stock), held.state_dict()
        with torch.no_grad():
            for name, value in control.state_dict().items():
                value.copy_(given[name])
        return control

    # --- acts --------------------------------------------------------------------------------------------------------

    def _in_stock(self, classes: list[str]) -> Act:
        def act(model, folder):
            model.save_pretrained(folder)
            return self.worker.ask(folder, classes)

        return act

    def _here(self, classes: list[str]) -> Act:
        def act(model, folder):
            model.save_pretrained(folder / "first")
            return lives.changed(folder / "first", classes, folder)

        return act

    def _into_plain(self, assign: bool) -> Act:
        def act(model, folder):
            plain = copy.deepcopy(self.control)
            with torch.no_grad():
                for parameter in plain.parameters():
                    parameter.zero_()
            return lives.given_to(model, plain, assign)

        return act

    def _declared(self, model: PreTrainedModel, folder: Path) -> Facts:
        return {"sharing": sharing(getattr(transformers, self.name)(copy.deepcopy(model.config)))}

    # --- comparisons -------------------------------------------------------------------------------------------------

    def _compare(self, step: str, act: Act, stock_act: Act | None = None) -> None:
        """Whether `act` gives the same facts of the held model as `stock_act` of the untouched one."""
        folder = Path(tempfile.mkdtemp())
        try:
            expected = (stock_act or act)(copy.deepcopy(self.control), folder / "stock")
        except Exception:  # what an untouched model cannot do says nothing of a held one
            shutil.rmtree(folder)
            return
        self.steps.append(self.start_name + step)
        before = model = None
        try:
            model = self.held()
            before = picture(model)
            facts = act(model, folder / "held")
        except TyingError as error:
            self._refused(step, error, before, model)
        except Exception as error:
            self._found(step, line(error))
        else:
            # A product over memory that is aligned otherwise may round otherwise; the untouched model's does it alike.
            if found := difference(*self._comparable(step, facts, expected), tolerance=0.0 if self.exact else 1e-6):
                self._found(step, found.lstrip("."))
        finally:
            shutil.rmtree(folder)

    def _comparable(self, step: str, facts: Facts, stock: Facts) -> tuple[Facts, Facts]:
        """The facts that can be compared with those of an untouched model, and what they should be."""
        if self.exact:
            for new in stock.get("missing", ()):  # not always initialised at all
                del facts["values"][new], stock["values"][new]
            stock = self._without_losses(stock, facts)
            if self.start_name:  # of a model that began untied, `tie` keeps the flag of the words' own config true too
                return _without_inner_flags(facts), _without_inner_flags(stock)
            return facts, stock
        ours, theirs = {}, {}
        for fact, found in facts.items():
            kind = fact.removesuffix(" after a load")
            if kind in ALIKE:
                ours[fact], theirs[fact] = found, stock[fact]
            elif kind in NO_MORE and step != "task change":  # a softmax of its own is lost with the head
                ours[fact], theirs[fact] = sorted(set(found) - set(stock[fact])), []
            elif kind == "sharing" and self.truth["sharing"] and "stock" not in step and "dict" not in step:
                new = set(facts.get("missing", ()))  # which are tied as the class says
                ours[fact], theirs[fact] = (
                    [names for names in found if not new.issuperset(names)],
                    self.truth["sharing"],
                )
            elif kind == "values":
                # Nor what a class keeps out of its files, as the positions of Marian, which are computed.
                missing = {*facts.get("missing", ()), *stock.get("missing", ()), *self._not_saved()}
                ours[fact] = {name: value for name, value in found.items() if name not in missing}
                theirs[fact] = {name: value for name, value in self.truth["values"].items() if name not in missing}
            elif kind == "outputs" and not facts.get("missing") and not self._not_saved():
                ours[fact], theirs[fact] = found, self.truth["outputs"]
        return ours, theirs

    def _without_losses(self, stock: Facts, facts: Facts) -> Facts:
        """The facts of the untouched model, but for what it loses on its way and the held one keeps.

        A tie or values that its own file does not bring back, and a size that it leaves at the old number.
        """
        expected, loses = dict(stock), self.name in FULLER_FILES
        for fact, found in facts.items():
            kind = fact.removesuffix(" after a load")
            if kind in NO_MORE and set(found) < set(stock[fact]):
                expected[fact], loses = found, True
            elif kind in ("sharing", "values", "outputs"):
                truth = self.truth[kind]
                if kind == "values":
                    truth = {name: value for name, value in truth.items() if name in found}
                if difference(found, truth) is None and difference(stock[fact], truth):
                    expected[fact], loses = found, True
        if loses and isinstance(facts.get("file"), dict):
            files = facts["file"]
            expected["file"] = {name: files.get(name, {}) | held for name, held in stock["file"].items()}
        if "words" in facts:
            for fact in ("sizes", "config"):
                expected[fact] = _with_true_sizes(stock[fact], facts[fact], facts["words"])
        return expected

    def _not_saved(self) -> set[str]:
        patterns = self.control._keys_to_ignore_on_save or ()
        return {name for name in self.truth["values"] if any(re.search(pattern, name) for pattern in patterns)}

    def _found(self, step: str, what: str) -> None:
        self.examination.findings.append(Finding(self.name, self.scheme, self.start_name + step, what))

    def _refused(self, step: str, error: TyingError, before: dict | None, model: PreTrainedModel | None) -> None:
        told = line(error)
        if not any(reason in told for reason in RIGHT_REFUSALS):
            self._found(step, told)
        elif before is not None and (found := difference(picture(model), before)):
            self._found(step, f"refused, but changed {found.lstrip('.')}: {told}")
        else:
            self.examination.refusals.append(Finding(self.name, self.scheme, self.start_name + step, told))


def _with_true_sizes(theirs: dict, ours: dict, words: int) -> dict:
    """Sizes of the untouched model, but for those of which ours alone is the number of words."""
    expected = {}
    for key, found in theirs.items():
        held = ours.get(key)
        if isinstance(found, dict) and isinstance(held, dict):
            expected[key] = _with_true_sizes(found, held, words)
        else:
            expected[key] = held if key.endswith("vocab_size") and held == words else found
    return expected


def _without_inner_flags(facts: Facts) -> Facts:
    kept = {}
    for fact, found in facts.items():
        kept[fact] = found
        if fact.startswith("config"):
            parts = {key: part for key, part in found.items() if isinstance(part, dict)}
            inner = {key: {k: v for k, v in part.items() if k != "tie_word_embeddings"} for key, part in parts.items()}
            kept[fact] = found | inner
    return kept


def picture(model: PreTrainedModel) -> dict:
    """All that a refusal must leave as it was."""
    held = {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
    entry = getattr(model.config, "tying", None)
    record = str((entry, _flags(model.config)))
    return {"class": str(type(model)), "parameters": held, "values": lives.values(model), "record": record}
