"""`hf-effdl VERB ...`: finds the verb, and turns errors into one line and an exit code.

Exit codes: 0 done; 1 what was given does not work, with the reason; 2 no such verb or option; 130 interrupted.
"""

import os
import sys
import traceback
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path

from hf_effdl.version import __version__


VERBS = {
    "sparsify": "train a model with its path of smaller ones, take one of them, fine-tune it",
    "slim": "make a trained model smaller without training: by its path, or on calibration rows",
    "ticket": "find early in a run which units to keep, and the small net to train instead",
    "choose": "choose the model of a family that is small or fast enough",
    "grow": "grow an image classifier from a narrow ResNet",
    "lora-ranks": "fine-tune a text classifier by LoRA and let the run choose the ranks",
    "select": "choose the rows worth training on",
    "score": "score rows by how unsure probes are of them, to Parquet",
    "pool": "build, change and describe a pool of labelled examples",
    "fit": "fit what chooses examples: a cascade or a ranker",
    "prompt": "predict for images by showing a frozen model the right examples",
    "card": "show or write the card of a folder",
    "env": "versions, devices and caches, for a bug report",
}
HELP = ("-h", "--help", "help")
TRACEBACK = "--traceback"
# the Hub's client and what it speaks HTTP by; readers of data and of weights, whose errors are of the files
READERS = ("huggingface_hub", "httpx", "httpx2", "datasets", "safetensors")
PACKAGE = Path(__file__).parents[1]


def overview() -> str:
    """All verbs in a line each."""
    width = max(map(len, VERBS))
    lines = [f"  {verb:{width}}  {what}" for verb, what in VERBS.items()]
    return "\n".join(
        [
            "usage: hf-effdl VERB [arguments]",
            "",
            "Smaller models, less data and better prompts on the Hugging Face stack.",
            "",
            *lines,
            "",
            "`hf-effdl VERB --help` says its arguments; every verb takes them from `--config file.yaml` too.",
            f"{TRACEBACK} (or HF_EFFDL_TRACEBACK=1) shows where an error came from; --version says {__version__}.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    shown = TRACEBACK in argv or os.environ.get("HF_EFFDL_TRACEBACK", "0") not in ("", "0")
    argv = [text for text in argv if text != TRACEBACK]
    if not argv or argv[0] in HELP:
        print(overview(), file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    if argv[0] == "--version":
        print(__version__)
        return 0
    verb = argv[0].replace("_", "-")
    if verb not in VERBS:
        near = get_close_matches(verb, VERBS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return _told(f"there is no verb {argv[0]!r}{hint} (hf-effdl --help)", 2)
    try:
        return _run(verb, argv[1:], shown)
    except KeyboardInterrupt:
        return _told("interrupted", 130)


def _run(verb: str, argv: list[str], shown: bool) -> int:
    from hf_effdl.cli.arguments import UsageError, leave

    try:
        import_module(f"hf_effdl.cli.{verb.replace('-', '_')}").main(argv)
        leave()
    except BrokenPipeError:  # what reads our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:  # noqa: BLE001 - sorted here
        if shown or not is_of_the_user(error):
            raise
        cause = f": {error.__cause__}" if type(error).__module__ == "datasets.exceptions" and error.__cause__ else ""
        said = "; ".join([str(error) or type(error).__name__, *getattr(error, "__notes__", ())])
        return _told(said + cause, 2 if isinstance(error, UsageError) else 1)
    return 0


def is_of_the_user(error: Exception) -> bool:
    """Whether an error says what was given wrong: a value, a file, an answer of the Hub, or what we raise by name."""
    if isinstance(error, (ValueError, OSError)) or type(error).__module__.partition(".")[0] in READERS:
        return True
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1] if frames else None
    ours = last is not None and PACKAGE in Path(last.filename).parents and (last.line or "").startswith("raise")
    return ours and isinstance(error, (TypeError, LookupError, ImportError, RuntimeError))


def _told(text: str, code: int) -> int:
    print(f"hf-effdl: error: {' '.join(text.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
