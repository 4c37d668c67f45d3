"""What pyproject.toml cannot say: the README of an index page, where relative links would lead nowhere."""

import re
import tomllib
from pathlib import Path

from setuptools import setup


ROOT = Path(__file__).parent
LINK = re.compile(r"(!?)(\[(?:[^\[\]]|\[[^\]]*\])*\])\((?!https?://|#)([^)\s]+)\)")


def index_readme() -> str:
    """The README with absolute links: pictures to the raw files, everything else to the repository's pages."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    repository = project["urls"]["Repository"]

    def absolute(link: re.Match[str]) -> str:
        kind = "raw" if link[1] else "blob"
        return f"{link[1]}{link[2]}({repository}/{kind}/main/{link[3]})"

    return LINK.sub(absolute, (ROOT / "README.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    setup(long_description=index_readme(), long_description_content_type="text/markdown")
