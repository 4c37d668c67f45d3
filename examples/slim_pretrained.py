# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "hf_effdl[examples]",
# ]
#
# [tool.uv.sources]
# hf_effdl = { path = ".." }
# ///

"""Make a pretrained transformer of the Hub smaller without training: some hundred rows, a minute, a stock checkpoint.

    python examples/slim_pretrained.py --model_name_or_path sentence-transformers/all-MiniLM-L6-v2 \\
        --calibration questions.txt --output_dir runs/half
    python examples/slim_pretrained.py --model_name_or_path facebook/dinov2-small --calibration beans \\
        --output_dir runs/half --rows 128
    python examples/slim_pretrained.py --model_name_or_path HuggingFaceTB/SmolLM2-135M --calibration questions.txt \\
        --output_dir runs/lean --keep 0.75

Every layer keeps that share of its FFN neurons, and the layer behind is refitted on the rows so that it does without
the others; so are the layers behind the heads, to make up for what is lost before them. The data set is a text file
with a row per line, a folder of images, a folder from `save_to_disk`, or an id on the Hub. A fifth of the rows is held
out; what is printed and stands in the checkpoint's config as `effdl_report` are parameters, multiply-accumulates and
latency of one row, and the relative squared error of the outputs on those.
"""

from functools import partial

from hf_effdl.cli import slim
from hf_effdl.cli.arguments import leave


main = partial(slim.main, description=__doc__, prog=None)


if __name__ == "__main__":
    main()
    leave()
