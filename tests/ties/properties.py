"""Random groups, schemes and models for property tests, and the plain reference of a union of groups."""

import functools

import torch
from hypothesis import strategies as st

from hf_tying import TyingConfig
from hf_tying.config import SCHEMES
from hf_tying.ties.anatomy import roles

from ..tiny import ALL, untied_model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@functools.cache
def untied_of(arch: str, dtype: str):
    return untied_model(arch, dtype=DTYPES[dtype])


@functools.cache
def names_by_shape(arch: str) -> list[list[str]]:
    """The names of `arch` that could be one parameter with another: those of each shape, where there are two.

    Without what no optimizer trains and no file holds (Marian's sinusoidal positions).
    """
    shapes: dict[tuple, list[str]] = {}
    for name, parameter in untied_of(arch, "float32").named_parameters():
        if parameter.requires_grad:
            shapes.setdefault(tuple(parameter.shape), []).append(name)
    return [names for names in shapes.values() if len(names) > 1]


@functools.cache
def schemes_of(arch: str) -> list[str]:
    """The schemes that `arch` has the roles for."""
    held = roles(untied_of(arch, "float32"))
    return [scheme for scheme, members in SCHEMES.items() if held.keys() >= set(members)]


@st.composite
def groups_of_names(draw, arch: str) -> dict[str, list[str]]:
    """Disjoint groups of equal-shaped names, each in any order: the first is the root."""
    groups: dict[str, list[str]] = {}
    left = [list(names) for names in names_by_shape(arch)]
    for i in range(draw(st.integers(1, 3))):
        usable = [names for names in left if len(names) > 1]
        if not usable:
            break
        names = draw(st.sampled_from(usable))
        group = draw(st.lists(st.sampled_from(names), min_size=2, max_size=4, unique=True))
        for name in group:
            names.remove(name)
        groups[draw(st.sampled_from("zyx")) + str(i)] = group
    return groups


@st.composite
def declared_ties(draw) -> tuple[str, str, TyingConfig]:
    """An architecture, a dtype, and what to tie in it: groups or a scheme or both."""
    arch = draw(st.sampled_from(ALL))
    dtype = draw(st.sampled_from(list(DTYPES)))
    scheme = draw(st.none() | st.sampled_from(schemes_of(arch)))
    groups = draw(groups_of_names(arch)) if scheme in (None, "none") or draw(st.booleans()) else {}
    save_format = draw(st.sampled_from([None, "dedup", "portable"]))
    return arch, dtype, TyingConfig(scheme=scheme, groups=groups, save_format=save_format)


def partition(groups) -> set[frozenset[str]]:
    return {frozenset(names) for names in groups}


def join(chains) -> list[set[str]]:
    """The plain reference of a union: what can be reached from each name over all chains."""
    parts: list[set[str]] = []
    for chain in chains:
        met = [part for part in parts if part & set(chain)]
        parts = [part for part in parts if part not in met] + [set(chain).union(*met)]
    return parts
