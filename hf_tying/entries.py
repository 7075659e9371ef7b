"""The groups and the stacks of layers of a `tying` entry, read and checked before any model exists."""

from collections.abc import Container
from itertools import chain, count, takewhile
from typing import Any

from .errors import TyingError, short

#: The ways in which a member of a group may differ from its root, and their settings with the defaults. `scale`: a
#: factor for each row. `lora`: a product of rank `rank`, from `init` `"zero"` or, of values that differ when they are
#: tied, `"svd"`. `basis`: `filters` further matrices that all members share, with coefficients for each. `bound`, for
#: every kind: largest norm of the difference as a share of the root's; none by default. `exact`, for every kind: names
#: of the group that are the root all the same, as those that a class ties by itself.
RELAXATIONS: dict[str, dict[str, Any]] = {
    "scale": {},
    "lora": {"rank": 8, "init": "zero"},
    "basis": {"filters": 2},
}

# A declaration may come from a file of unknown origin. Real ones have up to some thousand names of some hundred
# characters (every parameter of every layer tied). Larger ones are refused before any work.
_MOST_NAMES = 50_000
_LONGEST_NAME = 512
_LARGEST_RANK = 65_536
_MOST_STACKS = 16
_MOST_LAYERS = 10_000


def split_relaxed(groups: Any) -> tuple[Any, dict[str, dict[str, Any]]]:
    """Groups as lists of names, and the checked settings of those that are relaxed.

    Raises:
        TyingError: for other keys beside the names, and for settings that the kind of relaxation does not have.
    """
    if not isinstance(groups, dict) or not any(isinstance(value, dict) for value in groups.values()):
        return groups, {}
    names, relax = {}, {}
    for group, value in groups.items():
        names[group] = value
        if isinstance(value, dict):
            if value.keys() - {"names", "relax"} or "names" not in value:
                raise TyingError(
                    f"Group {short(group)} has the keys {sorted(map(str, value))[:5]}: expected a name and a list of "
                    'parameter names, or a dict {"names": [...], "relax": {"kind": ...}}.'
                )
            names[group] = value["names"]
            if value.get("relax") is not None:
                relax[group] = _checked_relaxation(group, value["relax"])
                members = value["names"][1:] if isinstance(value["names"], list | tuple) else ()
                if others := [name for name in relax[group].get("exact", ()) if name not in members]:
                    raise TyingError(
                        f"Group {short(group)} is relaxed with exact={short(others[0])}: expected some of its names, "
                        "without the first, the root."
                    )
    return names, relax


def _checked_relaxation(group: Any, value: Any) -> dict[str, Any]:
    kind = value.get("kind") if isinstance(value, dict) else None
    if not isinstance(kind, str) or kind not in RELAXATIONS:
        raise TyingError(
            f"Group {short(group)} is relaxed by {short(kind if isinstance(value, dict) else value)}: expected a "
            f"dict with `kind`, one of {', '.join(RELAXATIONS)}."
        )
    for key, setting in value.items():
        if key not in {*RELAXATIONS[kind], "kind", "bound", "exact"}:
            known = sorted([*RELAXATIONS[kind], "bound", "exact"])
            raise TyingError(f"Group {short(group)}: kind {kind!r} has no setting {short(key)}: expected {known}.")
        if key in ("rank", "filters"):
            fits = isinstance(setting, int) and not isinstance(setting, bool) and 0 < setting <= _LARGEST_RANK
            wanted = f"a whole number from 1 to {_LARGEST_RANK}"
        elif key == "bound":
            fits = (
                setting is None or isinstance(setting, int | float) and not isinstance(setting, bool) and setting > 0
            )
            fits, wanted = fits and setting != float("inf"), "a positive number, or none"
        elif key == "exact":
            fits = isinstance(setting, list | tuple) and all(isinstance(name, str) for name in setting)
            wanted = "a list of names"
        else:
            fits, wanted = key == "kind" or setting in ("zero", "svd"), "'zero' or 'svd'"
        if not fits:
            raise TyingError(f"Group {short(group)} is relaxed with {key}={short(setting)}: expected {wanted}.")
    return dict(value)


def checked_depth(depth: Any) -> list[dict[str, Any]]:
    """The stacks of layers of an entry, in the form that the file has.

    Raises:
        TyingError: for anything that is no list of such stacks.
    """
    if not isinstance(depth, list | tuple) or len(depth) > _MOST_STACKS:
        raise TyingError(f"`depth` is {short(depth)}: expected a list of up to {_MOST_STACKS} stacks of layers.")
    checked = []
    for stack in depth:
        known = {"path", "order", "private", "relax", "damped", "unrolled"}
        if not isinstance(stack, dict) or not {"path", "order"} <= stack.keys() <= known:
            raise TyingError(
                f"`depth` has the stack {short(sorted(map(str, stack)) if isinstance(stack, dict) else stack)}: "
                f"expected a dict with `path` and `order`, and some of {sorted(known - {'path', 'order'})}."
            )
        path, order = stack["path"], stack["order"]
        if not isinstance(path, str) or not path or len(path) > _LONGEST_NAME:
            raise TyingError(f"`depth` has the path {short(path)}: expected the name of a list of layers.")
        if any(path == other["path"] for other in checked):
            raise TyingError(f"`depth` has the path {short(path)} twice: expected each list of layers once.")
        if not isinstance(order, list | tuple) or not 1 < len(order) <= _MOST_LAYERS:
            raise TyingError(f"The order of {short(path)} is {short(order)}: expected the block of each layer.")
        for key, wanted, most in (("order", order, _MOST_LAYERS), ("damped", stack.get("damped", []), len(order))):
            fits = isinstance(wanted, list | tuple) and all(
                isinstance(number, int) and not isinstance(number, bool) and 0 <= number < most for number in wanted
            )
            if not fits:
                raise TyingError(
                    f"`{key}` of {short(path)} is {short(wanted)}: expected whole numbers from 0 to {most - 1}."
                )
        private = stack.get("private", [])
        named = isinstance(private, list | tuple) and len(private) <= _MOST_NAMES
        if not named or not all(isinstance(name, str) and 0 < len(name) <= _LONGEST_NAME for name in private):
            raise TyingError(f"`private` of {short(path)} is {short(private)}: expected names within a layer.")
        entry = {"path": path, "order": list(order)}
        if private:
            entry["private"] = list(private)
        if stack.get("relax") is not None:
            entry["relax"] = _checked_relaxation(path, stack["relax"])
        if stack.get("damped"):
            entry["damped"] = list(stack["damped"])
        if stack.get("unrolled"):
            entry["unrolled"] = True
        checked.append(entry)
    return checked


def checked_groups(groups: Any) -> dict[str, list[str]]:
    """The groups of an entry as lists of names: of at least two, and no name in two of them.

    Raises:
        TyingError: for anything else.
    """
    if groups is None:
        return {}
    if not isinstance(groups, dict):
        raise TyingError(
            f"`groups` is {short(groups)}: expected a dict from a group's name to a list of parameter names."
        )
    if sum(len(names) for names in groups.values() if isinstance(names, list | tuple)) > _MOST_NAMES:
        raise TyingError(f"`groups` has more than {_MOST_NAMES} names: no model ties that many; the entry is refused.")
    group_of: dict[str, str] = {}
    for group, names in groups.items():
        if not isinstance(group, str) or not isinstance(names, list | tuple):
            raise TyingError(f"Group {short(group)} is {short(names)}: expected a name and a list of parameter names.")
        for name in names:
            if not isinstance(name, str) or not name or len(name) > _LONGEST_NAME:
                raise TyingError(f"Group {short(group)} has the member {short(name)}: expected a parameter name.")
            if name in group_of:
                where = f"twice in {group!r}" if group_of[name] == group else f"in {group_of[name]!r} and {group!r}"
                raise TyingError(f"{name!r} stands {where}: a name belongs to one group, once. Merge the groups.")
            group_of[name] = group
        if len(names) < 2:
            raise TyingError(f"Group {short(group)} has {len(names)} name(s) {list(names)}: a tie needs at least two.")
    return {group: list(names) for group, names in groups.items()}


def groups_of_pairs(source_of: dict[str, str]) -> dict[str, list[str]]:
    """Groups from `{tied name: source}`. Each source is the root of its group."""
    groups: dict[str, list[str]] = {}
    for name in source_of:
        root, seen = name, {name}
        while (root := source_of.get(root, root)) in source_of and root not in seen:
            seen.add(root)
        group = groups.setdefault(root, [root])
        if name not in group:
            group.append(name)
    named: dict[str, list[str]] = {}
    for names in groups.values():
        base = group_name(names)
        named[free_name(base, named)] = names
    return named


def group_name(names: list) -> str:
    """A readable name for a group given as a list: the common end of its names."""
    if not names or not all(isinstance(name, str) for name in names):
        return "group"
    tails = zip(*(name.split(".")[::-1] for name in names), strict=False)
    common = [parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, tails)]
    return ".".join(common[::-1]) or names[0]


def free_name(base: str, taken: Container[str]) -> str:
    """`base`, or `base_2`, `base_3` and so on: the first that is not taken."""
    return next(name for name in chain([base], (f"{base}_{i}" for i in count(2))) if name not in taken)
