"""Versions, devices and caches: what a bug report needs.

hf-effdl env
"""

from collections.abc import Sequence

from hf_effdl.cli.arguments import Options, parse_arguments


def main(argv: Sequence[str] | None = None) -> None:
    parse_arguments(argv, Options, description=__doc__, prog="hf-effdl env")
    from hf_effdl.cli.work.environment import described

    print(described())
