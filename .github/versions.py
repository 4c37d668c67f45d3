"""pip's options for a set of versions: python .github/versions.py tested|newest|lowest

tested   the versions of constraints.txt
newest   whatever pip resolves
lowest   the lower bounds of pyproject.toml, dependencies and the extras of the tests, as equalities
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
    if sys.argv[1:] == ["tested"]:
        print("-c constraints.txt")
    elif sys.argv[1:] == ["lowest"]:
        print(*(f"{name}=={version}" for name, version in lower_bounds().items()))
    elif sys.argv[1:] != ["newest"]:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main()
