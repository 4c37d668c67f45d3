"""`python threads_left.py SCRIPT ARGUMENT...` runs the script and fails if it leaves a thread of gloo's behind.

Such a thread can abort the interpreter's exit, on a loaded machine much more often than on a quiet one (see `leave`).
"""

import runpy
import sys
from pathlib import Path


def threads() -> list[str]:
    """Names of this process's threads of gloo's; none where there is no /proc."""
    found = []
    for file in Path("/proc/self/task").glob("*/comm"):
        try:
            found.append(file.read_text().strip())
        except OSError:  # it has just ended
            continue
    return [name for name in found if "gloo" in name]


if __name__ == "__main__":
    script = Path(sys.argv[1]).resolve()
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(script.parent))
    runpy.run_path(str(script), run_name="__main__")
    if left := threads():
        sys.exit(f"{script.name} left these threads behind: {left}")
