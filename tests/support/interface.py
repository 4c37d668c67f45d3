"""The public interface as plain values: names, arguments, methods.

    python tests/support/interface.py    # adds what is new to tests/fixtures/interface.json; takes nothing away

An argument is written `name`, or `name=` where it has a default; those after "*" are taken by name alone.
"""

import inspect
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


RECORD = Path(__file__).parents[1] / "fixtures" / "interface.json"
BY_PLACE = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
VARIADIC = {inspect.Parameter.VAR_POSITIONAL: "*args", inspect.Parameter.VAR_KEYWORD: "**kwargs"}


def arguments(function: Callable[..., Any], without: Sequence[str] = ()) -> list[str]:
    """The arguments of a function or class, but those named in `without`."""
    found, by_place = [], True
    for name, parameter in inspect.signature(function).parameters.items():
        if by_place and parameter.kind not in BY_PLACE:
            found += [] if parameter.kind in VARIADIC else ["*"]
            by_place = False
        if parameter.kind in VARIADIC:
            found.append(VARIADIC[parameter.kind])
        elif name not in without:
            found.append(name + "=" * (parameter.default is not parameter.empty))
    return found


def interface(package: Any) -> dict[str, list[str]]:
    """`{"name": arguments, "Class.method": arguments, "Class.attribute": []}` of all public names of a package."""
    found = {}
    for name in package.__all__:
        value = getattr(package, name)
        found[name] = _own_arguments(value, "__init__", package) if callable(value) else []
        if inspect.isclass(value):
            found |= {f"{name}.{member}": said for member, said in _members(value, package).items()}
    return dict(sorted(found.items()))


def _ours(kind: type, package: Any) -> list[type]:
    return [base for base in kind.__mro__ if base.__module__.partition(".")[0] == package.__name__]


def _own_arguments(value: Any, method: str, package: Any) -> list[str]:
    """Arguments of a function, or of a class, but those of a class of someone else: they are theirs to change."""
    if not inspect.isclass(value):
        return arguments(value)
    others = [base for base in value.__mro__[1:-1] if base not in _ours(value, package) and method in vars(base)]
    theirs = {name for base in others for name in inspect.signature(getattr(base, method)).parameters}
    called = value if method == "__init__" else getattr(value, method)
    return [one for one in arguments(called, theirs) if one != "self"]


def _members(kind: type, package: Any) -> dict[str, list[str]]:
    """Methods and properties that are ours and say what they are."""
    found: dict[str, list[str]] = {}
    for base in reversed(_ours(kind, package)):
        for name, value in vars(base).items():
            public = not name.startswith("_") or name == "__call__"
            if not public or not inspect.getdoc(value) or not (_is_method(value) or isinstance(value, property)):
                continue
            found[name] = _own_arguments(kind, name, package) if _is_method(value) else []
    return found


def _is_method(value: Any) -> bool:
    return inspect.isroutine(value) or isinstance(value, classmethod | staticmethod)


def breaks(old: dict[str, list[str]], new: dict[str, list[str]]) -> list[str]:
    """What calls that worked with the old interface meet in the new one, in words."""
    found = [f"{name} is gone" for name in old if name not in new]
    for name in old.keys() & new.keys():
        found += [f"{name}: {what}" for what in _broken(old[name], new[name])]
    return sorted(found)


def _broken(old: list[str], new: list[str]) -> list[str]:
    known, there = ({one.rstrip("="): one for one in side if not one.startswith("*")} for side in (old, new))
    found = [f"{name}= is gone" for name in known if name not in there and "**kwargs" not in new]
    found += [f"{name}= has no default any more" for name in known if "=" in known[name] and there.get(name) == name]
    found += [f"{name}= is new and has no default" for name in there if name not in known and "=" not in there[name]]
    places = [one.rstrip("=") for one in _by_place(old)]
    moved = places != [one.rstrip("=") for one in _by_place(new)][: len(places)]
    return found + ["arguments by place are others"] * (moved and "*args" not in new)


def _by_place(said: list[str]) -> list[str]:
    first = next((i for i, one in enumerate(said) if one.startswith("*")), len(said))
    return said[:first]


def read() -> dict[str, list[str]]:
    """The interface as it was recorded."""
    return {name: said.split(", ") if said else [] for name, said in json.loads(RECORD.read_text()).items()}


def main() -> None:
    import hf_effdl

    record = read() if RECORD.is_file() else {}
    found = interface(hf_effdl)
    if broken := breaks(record, found):
        sys.exit("\n".join([*broken, "see the policy in docs/migration.md"]))
    lines = {name: ", ".join(said) for name, said in found.items()}
    RECORD.write_text(json.dumps(lines, indent=0) + "\n")


if __name__ == "__main__":
    main()
