"""Cascades over made-up frozen models, and one fitted in a process of its own.

python cascade_run.py POOLS OUT    # also under torchrun; OUT.RANK gets what was fitted, and what it chooses
"""

import sys
from pathlib import Path
from typing import Any

import torch
from leave import leave
from safetensors.torch import save_file
from scenes import SIZE, make_model, make_pool, scene, tiny_encoder
from torch import Tensor, nn
from torch.nn import functional as F

from hf_effdl import CascadeSelector, VisionEncoder, VisualInContextModel, measure_examples
from hf_effdl.vicl.remote_code.examples import Examples, Queries
from hf_effdl.vicl.remote_code.images import pixels
from hf_effdl.vicl.remote_code.visual_tasks import find_task


COUNT, K, PASSES = 30, 10, 4
ASKED = range(100, 106)


class Painter(nn.Module):
    """Knows the object, and spoils it: an example has an amount of its own, and every pair its own places.

    Args:
        biased: instead, two thirds of the examples make it paint the background, all in the same way.
    """

    arrangements = 1
    image_size = (SIZE, SIZE)

    def __init__(self, encoder: VisionEncoder, biased: bool = False) -> None:
        super().__init__()
        self.encoder, self.biased = encoder, biased
        self.shown: list[int] = []  # examples in each call

    def encode(self, images: Tensor) -> Tensor:
        return images.flatten(1)

    def predict(self, queries: Tensor, images: Tensor, labels: Tensor, arrangement: int = 0) -> Tensor:
        self.shown.append(images.shape[0] * images.shape[1])
        truth = self.truth(queries)
        amount = (images[:, 0].double().mean(1) * 1e4) % 1
        painted = []
        for one, share, query, example in zip(truth, amount, queries, images[:, 0]):
            number = int(query.double().sum() * 1e4) * 31 + int(example.double().sum() * 1e4)
            blocks = torch.rand(8, 8, generator=torch.Generator().manual_seed(number))
            flip = blocks < (0.05 if self.biased else 0.35 * float(share))
            if self.biased and share > 1 / 3:
                one = 1 - one
            flip = flip.float().repeat_interleave(4, 0).repeat_interleave(4, 1)
            painted.append((one * (1 - flip) + (1 - one) * flip).expand(3, -1, -1))
        return torch.stack(painted)

    @staticmethod
    def truth(queries: Tensor) -> Tensor:
        """The object is brighter than all else."""
        grey = F.avg_pool2d(queries.view(-1, 3, SIZE, SIZE).mean(1, keepdim=True), 5, 1, 2, count_include_pad=False)
        low, high = grey.amin((1, 2, 3), keepdim=True), grey.amax((1, 2, 3), keepdim=True)
        return (grey > (low + high) / 2).float()


def painter(pool: Any, encoder: VisionEncoder, biased: bool = False) -> VisualInContextModel:
    """A model whose frozen part is a `Painter`, measured on the pool."""
    model = VisualInContextModel.from_parts(Painter(encoder, biased))
    measure_examples(model, pool, candidates=K, progress=False)
    return model


def asked(model: Any, numbers: Any = ASKED, **options: Any) -> Queries:
    images = [find_task(model.config.task).query(scene(number)[0]) for number in numbers]
    cells, encoder = pixels(images, model.image_size, model.resample), model.encoder
    return Queries(cells, encoder(pixels(images, encoder.image_size, encoder.resample)), **options)


def fit_and_choose(folder: Path) -> dict[str, Tensor]:
    """Everything that a fit leaves, what it then chooses, and how many runs of the frozen model it took here."""
    encoder = tiny_encoder()
    pool, model = make_pool(folder, count=COUNT, encoder=encoder), make_model(encoder=encoder)
    measure_examples(model, pool, candidates=K, queries=22, progress=False)
    runs = []
    predict = model.frozen.predict
    model.frozen.predict = lambda *given: (runs.append(given[1].shape[0] * given[1].shape[1]), predict(*given))[1]
    cascade = CascadeSelector(model, passes=PASSES).fit(pool, progress=False)
    taken = torch.tensor(sum(runs))
    scores, rows, painted = cascade(asked(model), Examples(pool, model, find_task("segmentation")), 3, K)
    values = {name: value.clone() for name, value in cascade.state_dict().items()}
    report = torch.tensor(list(cascade.report.values()), dtype=torch.float64)
    return values | {"scores": scores, "rows": rows, "painted": painted.contiguous(), "report": report, "runs": taken}


def main() -> None:
    torch.set_num_threads(1)
    values = fit_and_choose(Path(sys.argv[1]))
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    save_file(values, f"{sys.argv[2]}.{rank}")


if __name__ == "__main__":
    main()
    leave()
