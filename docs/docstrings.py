"""Docstrings are plain text with Markdown's backticks and fences; here they become what Sphinx reads."""

import re
from collections.abc import Iterator


SECTION = re.compile(r"(Args|Attributes|Returns|Yields|Raises|Examples?|Note|Warning):$")
ITEM = re.compile(r"([-*]|\d+\.) ")
BARE_BAR = re.compile(r"`[^`]*`|(\|)")


def rendered(lines: list[str]) -> list[str]:
    """Lines of a docstring with fences and indented formulas as literal blocks.

    Example:
        >>> rendered(["The step", "", "    a <- b", "", "Args:", "    b: a number."])
        ['The step', '', '', '::', '', '    a <- b', '', '', 'Args:', '    b: a number.']
    """
    return [*_formulas(_fences(lines))]


def _fences(lines: list[str]) -> Iterator[str]:
    """Fenced blocks as `code-block`."""
    inside = False
    for line in lines:
        indent = line[: len(line) - len(line.lstrip())]
        if line.strip().startswith("```"):
            if not inside:
                yield from ("", f"{indent}.. code-block:: {line.strip()[3:] or 'text'}", "")
            inside = not inside
        else:
            yield f"    {line}" if inside and line.strip() else line


def _formulas(lines: Iterator[str]) -> Iterator[str]:
    """Indented text between paragraphs as a literal block; sections and lists keep their indents, bars are escaped."""
    kept = literal = False
    for line in lines:
        if line and not line[0].isspace():
            if literal:
                yield ""
            kept, literal = bool(SECTION.match(line) or ITEM.match(line) or line.startswith("..")), False
        elif line and not kept and not literal:
            yield from ("", "::", "")
            literal = True
        yield line if literal or ">>>" in line else BARE_BAR.sub(_escaped, line)


def _escaped(found: re.Match[str]) -> str:
    return "\\|" if found[1] else found[0]
