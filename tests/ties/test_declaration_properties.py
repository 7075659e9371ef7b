"""The functions that read names and declarations keep their laws for any names and any JSON."""

import copy
import json

from hypothesis import event, given, settings
from hypothesis import strategies as st

from hf_tying import TyingConfig, TyingError
from hf_tying.config import SCHEMES, nearest
from hf_tying.ties.anatomy import Anatomy
from hf_tying.ties.declared import join_chains
from hf_tying.ties.groups import locate
from hf_tying.ties.slots import named_slots

from ..tiny import ALL
from .properties import join, partition, untied_of

letters = st.sampled_from("abcdefgh")
chains = st.lists(st.lists(letters, min_size=1, max_size=4), max_size=8)


@settings(max_examples=200)
@given(chains, st.randoms(use_true_random=False))
def test_chains_join_to_the_same_groups_in_any_order_and_direction(given_chains, random):
    expected = partition(part for part in join(given_chains) if len(part) > 1)
    shuffled = [random.sample(chain, len(chain)) for chain in random.sample(given_chains, len(given_chains))]
    for each in (given_chains, shuffled, [pair for c in given_chains for pair in zip(c, c[1:], strict=False)]):
        groups = join_chains(each)
        assert partition(groups) == expected
        assert all(len(group) == len(set(group)) for group in groups)
    cycles = [[*chain, chain[0]] for chain in given_chains]
    assert partition(join_chains(cycles)) == expected


name = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=12)


@st.composite
def declarations(draw) -> TyingConfig:
    names = draw(st.lists(name, unique=True, max_size=10))
    groups = {}
    while len(names) > 1 and draw(st.booleans()):
        size = draw(st.integers(2, len(names)))
        groups[draw(name) + str(len(groups))] = [names.pop() for _ in range(size)]
    return TyingConfig(
        scheme=draw(st.none() | st.sampled_from(list(SCHEMES))),
        groups=groups,
        on_conflict=draw(st.sampled_from(["error", "keep_untied"]) | name.map("use:{}".format)),
        save_format=draw(st.sampled_from([None, "dedup", "portable"])),
    )


@settings(max_examples=200)
@given(declarations())
def test_a_declaration_is_the_same_after_its_dict_and_after_json(config):
    entry = config.to_dict()
    assert TyingConfig.from_dict(entry) == config
    assert TyingConfig.from_dict(json.loads(json.dumps(entry))) == config
    assert TyingConfig.from_dict(json.loads(json.dumps(entry, sort_keys=True))).to_dict() == entry
    assert TyingConfig.of(entry) == config and TyingConfig.of(config) is config


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)

near_entries = st.fixed_dictionaries(
    {},
    optional={
        "version": st.just(1) | json_values,
        "scheme": st.sampled_from([*SCHEMES, None]) | json_values,
        "groups": st.dictionaries(letters, st.lists(letters | json_values, max_size=3) | json_values) | json_values,
        "on_conflict": st.sampled_from(["error", "use:a"]) | json_values,
        "save_format": st.sampled_from(["dedup", None]) | json_values,
        "other": json_values,
    },
)


@settings(max_examples=600)
@given(near_entries | json_values)
def test_any_json_is_a_declaration_or_a_tying_error(entry):
    before = copy.deepcopy(entry)
    try:
        config = TyingConfig.from_dict(entry)
    except TyingError as error:
        event("refused")
        assert 10 < len(str(error)) < 1000
    else:
        event("read")
        assert TyingConfig.from_dict(config.to_dict()) == config
    assert repr(entry) == repr(before)  # NaN is not equal to itself


@settings(max_examples=200)
@given(st.text(max_size=30), st.lists(st.text(max_size=30), max_size=20))
def test_nearest_names_are_candidates_and_few(wrong, candidates):
    answer = nearest(wrong, candidates)
    if answer:
        assert answer.startswith("; the nearest names are ")
        assert any(repr(candidate) in answer for candidate in candidates)
    for candidate in candidates:
        assert nearest(candidate, [candidate]) in ("", f"; the nearest names are {candidate!r}")


@settings(max_examples=200)
@given(st.data())
def test_a_name_is_found_in_a_head_model_and_in_its_base_model(data):
    model = untied_of(data.draw(st.sampled_from(ALL)), "float32")
    base, prefix = model.base_model, f"{model.base_model_prefix}."

    def found(model, name):
        return locate(Anatomy(model), name)

    known = data.draw(st.sampled_from(list(named_slots(model))))
    for end in range(1, known.count(".") + 2):  # each module on the way, and the parameter
        path = ".".join(known.split(".")[:end])
        assert found(model, path) == path
    if base is not model and known.startswith(prefix):
        assert found(base, known) == known.removeprefix(prefix)
        assert found(model, known.removeprefix(prefix)) == known
    elif base is not model:
        assert found(base, known) is None
    wrong = data.draw(
        st.sampled_from([known + "x", known + ".", known + ".weight", known[:-1] + "*", "." + known, ""])
    )
    assert found(model, wrong) is None
