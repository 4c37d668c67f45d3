# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "hf_effdl[examples]",
#     "torch-pruning==1.6.1",
#     "torch>=2.10",
#     "transformers>=5.23,<6",
# ]
#
# [tool.uv.sources]
# hf_effdl = { path = "../.." }
# ///

"""Growing on MNIST: four conv-BN layers from 8, 12, 16 and 16 channels, beside the net of four times as many.

Arms and costs are those of `growth_arms.py`.

    python examples/benchmarks/growth_mnist.py --rows 10000
    python examples/benchmarks/growth_mnist.py --table --picture growth.png

Rows go to `--out` as one JSON line per finished (arm, seed); rows already there are skipped.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from growth_arms import ARMS, Setting, run, save_picture, table
from rows import parser_of, read_rows
from structure_mnist import mnist
from tickets_mnist import WIDTHS, conv_bn_net


SEED_WIDTHS = tuple(width // 4 for width in WIDTHS)


def tables(rows: list[dict]) -> None:
    """One table for each setting; the rows of the dense net hold for all settings of growth."""
    for size, epochs, settings in sorted({(row["rows"], row["epochs"], row["settings"]) for row in rows}):
        alike = [row for row in rows if (row["rows"], row["epochs"]) == (size, epochs)]
        mine = [row for row in alike if row["settings"] == settings or row["arm"] == "dense"]
        table(mine, f"MNIST, {size:,} rows, {epochs} epochs {settings}".rstrip())


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__, "growth_mnist")
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=ARMS, metavar="ARM")
    parser.add_argument("--rows", type=int, default=60000)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--evaluate", type=int, default=1, help="epochs from one evaluation to the next")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="of GrowingArguments, for tuning")
    parser.add_argument("--picture", type=Path, default=None, help="also draw the first seed's growth")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    config = {
        "rows": options.rows,
        "epochs": options.epochs,
        "settings": " ".join(sorted(options.set)),
        "device": "cpu",
    }
    rows = read_rows(options.out)
    if not options.table:
        images, labels = mnist("train")
        pairs = (text.split("=") for text in options.set)
        growth = {name: float(value) if "." in value else int(value) for name, value in pairs}
        setting = Setting(
            "conv-bn",
            conv_bn_net,
            WIDTHS,
            SEED_WIDTHS,
            (images[: options.rows], labels[: options.rows]),
            mnist("test"),
            options.epochs,
            growth=growth,
            evaluate=options.evaluate,
            config=config,
        )
        rows = run(setting, options.arms, options.seeds, options.out)
    tables(rows)
    if options.picture:
        mine = [row for row in rows if all(row.get(key) == value for key, value in config.items())]
        save_picture(mine, options.seeds[0], options.picture, options.epochs * (options.rows // Setting.batch))


if __name__ == "__main__":
    main()
