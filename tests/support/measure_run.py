"""Performance of a small pool's examples on each other, for tests that start it in processes of its own.

python measure_run.py POOLS CACHE OUT [SLEEP]    # SLEEP seconds pass with every part; OUT gets what came of it
"""

import sys
import time

import torch
from accelerate import PartialState
from leave import leave
from safetensors.torch import save_file
from scenes import make_model, make_pool

from hf_effdl import measure_examples
from hf_effdl.vicl import measure


COUNT, K = 22, 4
TIMED = 2  # runs that the first process makes for its estimate, where there are so few


def main() -> None:
    pools, cache, out, seconds = [*sys.argv[1:], *["0"][len(sys.argv) - 4 :]]
    torch.set_num_threads(1)
    measure.PART, measure_pairs, measured = 4, measure.Examples.measure, []

    def slowly(self, queries, rows):
        time.sleep(float(seconds))
        measured.append(rows.numel())
        return measure_pairs(self, queries, rows)

    measure.Examples.measure = slowly
    pool, model = make_pool(pools, count=COUNT), make_model()
    found = measure_examples(model, pool, candidates=K, cache_dir=None if cache == "none" else cache, progress=True)
    table = model.measured_candidates.clone(), model.measured_performance.clone()
    values = dict(zip(("candidates", "performance", "set candidates", "set performance"), (*found, *table)))
    save_file(values | {"runs": torch.tensor(measured).sum()}, f"{out}.{PartialState().process_index}")


if __name__ == "__main__":
    main()
    leave()
