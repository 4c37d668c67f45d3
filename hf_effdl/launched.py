"""What a launcher was asked for, known before torch is imported."""

import os
from pathlib import Path


NAMES = ("--num_processes", "--num-processes")


def count_started() -> int:
    """Processes that a launcher such as `torchrun` started, this one among them; 1 without one."""
    # a scheduler may set the first without launching anything
    return int(os.environ.get("WORLD_SIZE") or 1) if "RANK" in os.environ else 1


def count_asked() -> int:
    """Processes that `accelerate launch` was told to start; 1 where nobody says, and where there is no /proc.

    Without a GPU it starts one whatever it is told, and hands the number to nobody; only its own command line has it.
    """
    if "ACCELERATE_USE_CPU" not in os.environ:  # which it always sets
        return 1
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_text(encoding="utf-8").split("\0")
    except (OSError, UnicodeDecodeError):
        return 1
    words = words[words.index("launch") :] if "launch" in words else []
    pairs = [(first, second) for word, after in zip(words, words[1:]) for first, second in [_option(word, after)]]
    counts = [int(value) for name, value in pairs if name in NAMES and value.isdigit()]
    return counts[0] if counts else 1  # a later one is the script's


def _option(word: str, after: str) -> tuple[str, str]:
    name, equals, value = word.partition("=")
    return (name, value) if equals else (word, after)


def refuse_unstarted() -> None:
    """Refuse to run alone where several processes were asked for and `accelerate launch` started one.

    Raises:
        ValueError: as under `accelerate launch --cpu --num_processes 2`.
    """
    asked = count_asked()
    if count_started() < asked:
        raise ValueError(
            f"accelerate launch was asked for --num_processes {asked} and started one: on a CPU it starts no more. "
            f"Start them by `torchrun --nproc_per_node {asked} SCRIPT ... --use_cpu` (or ACCELERATE_USE_CPU=true for "
            "what has no such option), or leave --num_processes out"
        )
