"""Set before anything is imported: no network, no progress bars; upstream deprecations fail."""

import gc
import logging
import os
import shutil
import sys
import tempfile
from pathlib import Path


os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "warning")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# two threads of two processes that wait for each other on two cores are slower than one
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent / "support"))
# thousands of small files: in memory they take a third of the time that they take on a disk
MEMORY = Path("/dev/shm")
if "TMPDIR" not in os.environ and MEMORY.is_dir() and not os.statvfs(MEMORY).f_flag & os.ST_NOEXEC:
    if shutil.disk_usage(MEMORY).free > 4 * 2**30:
        os.environ["TMPDIR"] = tempfile.tempdir = str(MEMORY)

import pytest  # noqa: E402
import torch  # noqa: E402


torch.set_num_threads(1)
collect_ignore = ["fixtures"]  # what earlier versions saved, also code
ROOT = Path(__file__).parents[1]
# they begin first, so that two workers end together
LONGEST = (
    "test_docs.py",
    "test_growing.py",
    "test_examples.py",
    "test_distributed.py",
    "test_grow.py",
    "test_tickets.py",
    "test_vicl_pipeline.py",
    "test_weighting.py",
    "test_nets.py",
    "test_hub_vicl.py",
    "test_cascade.py",
    "test_trainer.py",
    "test_hub_structure.py",
    "test_trials.py",
    "test_fused.py",
    "test_slim.py",
    "test_small.py",
    "test_groups.py",
    "test_hub_selection.py",
    "test_calibration.py",
    "test_vicl_files.py",
)
DATA = Path(os.environ.get("HF_EFFDL_DATA", ROOT.parent / "shared" / "data"))


@pytest.fixture
def data_folder() -> Path:
    """The folder of real data sets; tests that need it are skipped where it is absent."""
    if not DATA.is_dir():
        pytest.skip(f"no data folder at {DATA}; set HF_EFFDL_DATA")
    return DATA


@pytest.fixture(scope="module", autouse=True)
def imported_modules_are_not_collected():
    """Accelerate collects garbage at every turn, which takes long among all that the tests have imported so far."""
    gc.freeze()


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))


class _Deprecations(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "deprecat" in record.getMessage().lower():
            self.messages.append(record.getMessage())


@pytest.fixture(autouse=True)
def upstream_deprecations_fail():
    """transformers announces most of its deprecations in its log, not as warnings."""
    handler = _Deprecations()
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)
    assert not handler.messages, f"deprecated upstream: {handler.messages}"


@pytest.fixture(scope="session")
def compiler():
    """Tests of the compiled optimizer step need a C++ compiler."""
    from hf_effdl.structure.optim import fused_cpu as fused

    try:
        fused.library()
    except ValueError as error:
        pytest.skip(f"no working C++ compiler: {error}")


@pytest.fixture(params=[True, False], ids=["dense", "sparse"])
def stored(request, monkeypatch):
    """Tables of what was measured, dense as those of small pools are, and sparse."""
    from hf_effdl.vicl.remote_code import cascade_lists

    if not request.param:
        monkeypatch.setattr(cascade_lists, "DENSE", 0)
