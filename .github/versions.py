"""pip's options for a set of versions: python .github/versions.py tested|newest|lowest [torch]

tested   the versions of constraints.txt
newest   whatever pip resolves
lowest   the lower bounds of pyproject.toml, dependencies and the extras of the tests, as equalities
torch    only torch's, for a first command that takes it from an index of its own
"""

import re
import sys
import tomllib
from pathlib import Path


ROOT = Path(__file__).parents[1]
PIN = re.compile(r"^([A-Za-z0-9_.-]+)(?:\[[^\]]*\])?\s*(?:>=|==)\s*([\w.]+)")


def lower_bounds() -> dict[str, str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["examples"], *extras["faiss"], *extras["test"]]
    return {pin[1]: pin[2] for requirement in wanted if (pin := PIN.match(requirement))}


def main() -> None:
    versions, *only = sys.argv[1:]
    if versions not in ("tested", "newest", "lowest"):
        raise SystemExit(__doc__)
    if versions == "tested":
        print("-c constraints.txt", *only)
    elif versions == "newest":
        print(*only)
    else:
        bounds = lower_bounds()
        print(*(f"{name}=={bounds[name]}" for name in only or bounds))


if __name__ == "__main__":
    main()
