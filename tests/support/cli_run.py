"""A verb of the command line, as a script that may stand still: `python cli_run.py HELD WHERE VERB ...`.

Where a file whose path ends in WHERE is opened to write or takes its name, HELD is made and nothing more happens, so
that the process can be killed at that moment; an empty WHERE: nowhere.
"""

import os
import sys
import time
from pathlib import Path


def hold(event: str, given: tuple) -> None:
    if event == "os.rename":
        path = given[1]
    elif event == "open" and given[1] not in (None, "r", "rb") and given[2] & (os.O_WRONLY | os.O_RDWR):
        path = given[0]
    else:
        return
    if str(path).endswith(where) and not os.path.exists(held):
        os.close(os.open(held, os.O_CREAT))
        time.sleep(600)


if __name__ == "__main__":
    from hf_effdl.cli.__main__ import main

    held, where, *argv = sys.argv[1:]
    if where:
        sys.addaudithook(hold)
    code = main(argv)
    assert not where or Path(held).exists(), f"nothing was written to {where}"
    sys.exit(code)
