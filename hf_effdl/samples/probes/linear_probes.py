"""Cheap probes: M linear heads on one frozen backbone."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import send_to_device
from datasets import Dataset
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_effdl.checks import instance, tensor
from hf_effdl.processes import decided, is_first, of_all, place_and_count, refuse_lone_processes, same_fate
from hf_effdl.samples.drawing.checks import check_seed
from hf_effdl.samples.probes.inputs import Inputs, check_classes, check_dataset, label_names, label_tensor, run_model
from hf_effdl.samples.probes.probes import LEAST_PROBES, Probes, ProbeSet, bootstrap_counts, weights_hash
from hf_effdl.samples.probes.row_marks import row_marks


# the lengths of training to choose from
STEPS = (50, 100, 200)
PATIENCE = 2  # seconds of encoding without a bar


class LinearProbes(Probes):
    """M linear heads on the features of one frozen backbone: one forward pass a row for all of them.

    Made by `LinearProbes.train`. For a linear head the theory behind the uncertainty is exact.

    Source: arXiv 2309.02476, where probes are whole networks; linear heads are our addition.
    """

    def __init__(
        self,
        backbone: nn.Module | None,
        heads: Tensor,
        mean: Tensor,
        scale: Tensor,
        inputs: Inputs,
        names: Sequence[str] | None,
        probe_set: ProbeSet,
        recipe: dict[str, Any],
    ) -> None:
        if backbone is not None:
            instance("backbone", backbone, nn.Module, "a model, or None where the rows hold features")
        tensor("heads", heads)
        self.backbone = nn.Identity() if backbone is None else backbone
        super().__init__([self.backbone] * len(heads), names=names or [], probe_set=probe_set)
        self.names = list(names) if names else None
        self.inputs, self.recipe = inputs, recipe
        self._known: dict[str, tuple[str, Tensor, Tensor]] = {}  # the backbone that made them, sorted marks, features
        self.heads, self.mean, self.scale = heads, mean, scale  # (M, d + 1, C): the last row is the bias

    @classmethod
    def train(
        cls,
        backbone: nn.Module | None,
        rows: Dataset,
        label_column: str = "label",
        *,
        num_probes: int = 8,
        processing_class: Any = None,
        input_column: str | Sequence[str] | None = None,
        data_collator: Callable[[list[dict[str, Any]]], Any] | None = None,
        names: Sequence[str] | None = None,
        steps: int | None = None,
        learning_rate: float = 0.01,
        weight_decay: float = 0.01,
        batch_size: int = 64,
        seed: int = 0,
    ) -> Self:
        """Fit M softmax heads on bootstrap samples of labelled rows; on the same rows convex heads would all agree.

        Features are the mean of the backbone's last hidden states over the tokens that are there (texts), else its
        `pooler_output`, else the mean over places, else what it returns; standardised over the rows.

        Every process of `accelerate launch` or `torchrun` must call it: each encodes its share of the batches, and the
        first one fits the heads, so that all have the same.

        Args:
            backbone: any encoder; None if the rows hold vectors or numbers already.
            rows: labelled rows S'.
            label_column: of `rows`.
            num_probes: M.
            processing_class, input_column, data_collator, names: see `Probes`.
            steps: of full-batch AdamW; default: whichever of 50, 100 and 200 gives the rows' labels the largest
                likelihood by the heads that did not see them. With wrong labels that is the early one.
            learning_rate, weight_decay: of AdamW.
            batch_size: of the forward passes.
            seed: of the bootstrap and of the heads' starting points.

        Example:
            >>> data = Dataset.from_dict({"features": torch.randn(60, 4).tolist(), "label": [0, 1, 2] * 20})
            >>> len(LinearProbes.train(None, data, input_column="features", steps=5))
            8
        """
        check_dataset(rows, [label_column], "the probe set", "label_column=")
        names = names or label_names(rows, label_column)
        labels = label_tensor(rows, label_column, names)
        classes = check_classes(labels, label_column, names)
        counts = bootstrap_counts(len(rows), num_probes, seed)
        recipe = {"steps": steps, "learning_rate": learning_rate, "weight_decay": weight_decay, "classes": classes}
        inputs = Inputs(processing_class, input_column, data_collator, [label_column])
        empty = torch.zeros(max(num_probes, LEAST_PROBES), 0, classes)
        probes = cls(
            backbone, empty, torch.zeros(0), torch.ones(0), inputs, names, ProbeSet(rows, labels, counts), recipe
        )
        if num_probes < LEAST_PROBES:
            raise ValueError(f"num_probes={num_probes}: the spread of one probe is unknown; use 2 or more, better 8")
        x = probes._encoded_by_all(rows, batch_size)
        _check_features(x, input_column)
        if columns := probes.bind(rows).fed_columns(rows):
            probes._keep("probe set", row_marks(rows, columns), x)
        spread = x.std(0)
        # a feature that hardly moves in the probe set must not blow up where it does in the pool
        floor = 0.1 * spread.square().mean().sqrt().clamp(min=1e-6)
        probes.mean, probes.scale = x.mean(0), spread.clamp(min=floor)
        x = probes.standardise(x)

        def fit() -> tuple[int, Tensor]:
            fits = [
                (number, fit_heads(x, labels, counts, seed=seed, **(recipe | {"steps": number})))
                for number in (STEPS if steps is None else [steps])
            ]
            return max(fits, key=lambda fit: _unseen_likelihood(x, fit[1], labels, counts))

        recipe["steps"], probes.heads = decided(fit)
        return probes

    def standardise(self, x: Tensor) -> Tensor:
        """Features with mean 0 and deviation 1 over the probe set, and a constant 1 for the bias."""
        if x.shape[1] != len(self.mean):
            raise ValueError(
                f"the rows have {x.shape[1]} features and the probes were trained on {len(self.mean)}; pass rows made "
                "as the probe set's were, or train the probes again"
            )
        x = (x - self.mean.to(x)) / self.scale.to(x)
        return torch.cat([x, torch.ones_like(x[:, :1])], 1)

    def to(self, device: torch.device) -> Self:
        self.backbone.to(device)
        self.heads = self.heads.to(device)
        return self

    @torch.no_grad()
    def features(self, inputs: Any) -> Tensor:
        """`(B, d)` features of one batch of inputs."""
        output = run_model(self.backbone, inputs)
        output = output[0] if isinstance(output, (tuple, list)) and isinstance(output[0], Tensor) else output
        if isinstance(output, Tensor):
            return output.flatten(1).float()
        if output.get("last_hidden_state") is None and output.get("pooler_output") is None:
            raise ValueError(
                f"the backbone {type(self.backbone).__name__} returns {sorted(output)} and no last_hidden_state; pass "
                "the encoder without its head, as AutoModel loads it, or model.base_model"
            )
        # of texts the pooler is often untrained, so their tokens are averaged
        mask = inputs.get("attention_mask") if isinstance(inputs, dict) else None
        hidden = output.get("last_hidden_state")
        if mask is not None and hidden is not None and hidden.shape[:2] == mask.shape:
            return (hidden.float() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        pooled = output.get("pooler_output")
        if pooled is not None:
            return pooled.flatten(1).float()
        return hidden.float().mean((2, 3) if hidden.ndim == 4 else 1)  # (B, d, height, width) or (B, places, d)

    def logits(self, inputs: Any) -> Tensor:
        return self.judged(self.features(inputs))

    def judged(self, features: Tensor) -> Tensor:
        """`(B, M, C)` logits of features."""
        x = self.standardise(features)
        return torch.einsum("bd,mdc->bmc", x, self.heads.to(x.device))

    def answer(self, inputs: Any) -> dict[str, Tensor]:
        features = self.features(inputs)
        return {"logits": self.judged(features), "features": features}

    def remember(self, marks: Tensor, answers: dict[str, Tensor]) -> None:
        self._keep("pool", marks, answers["features"])

    def _keep(self, what: str, marks: Tensor, x: Tensor) -> None:
        ordered = marks.sort()
        self._known[what] = weights_hash([self.backbone]), ordered.values, x[ordered.indices]

    def batches(self, data: Dataset, batch_size: int) -> Iterator[Tensor]:
        """Logits of a data set on this process alone, batch by batch, on the CPU."""
        for x in self.encode(data, batch_size).split(batch_size):
            yield self.judged(x)

    def encode(self, data: Dataset, batch_size: int = 64) -> Tensor:
        """`(n, d)` features of a data set, on the CPU; those of rows that were scored or trained on are kept."""
        columns = self.bind(data).fed_columns(data)
        if not columns or not self._known:
            return self._encoded(data, batch_size)
        marks, x, now = row_marks(data, columns), None, weights_hash([self.backbone])
        missing = torch.ones(len(marks), dtype=torch.bool)
        for made_by, ordered, features in self._known.values():
            if made_by != now:  # weights were changed in place
                continue
            place = torch.searchsorted(ordered, marks).clamp(max=len(ordered) - 1)
            hit = (ordered[place] == marks) & missing
            x = torch.zeros(len(marks), features.shape[1]) if x is None else x
            x[hit], missing[hit] = features[place[hit]], False
        if x is None:
            return self._encoded(data, batch_size)
        if missing.any():
            x[missing] = self._encoded(data.select(missing.nonzero().flatten().tolist()), batch_size)
        return x

    def _encoded(self, data: Dataset, batch_size: int) -> Tensor:
        return torch.cat(self._parts(data, batch_size, range(0, len(data), batch_size)))

    def _encoded_by_all(self, data: Dataset, batch_size: int) -> Tensor:
        """The same on every process, each of which has encoded its share of the batches."""
        device = Accelerator().device  # joins the other processes, if there are any
        refuse_lone_processes()
        place, count = place_and_count()
        starts = range(0, len(data), batch_size)
        with same_fate():
            mine = self.to(device)._parts(data, batch_size, starts[place::count])
        theirs = of_all(mine)
        return torch.cat([theirs[number % count][number // count] for number in range(len(starts))])

    def _parts(self, data: Dataset, batch_size: int, starts: Sequence[int]) -> list[Tensor]:
        """Features of the batches that begin at some rows, on the CPU; a bar is shown where they take long."""
        inputs, device = self.bind(data), Accelerator().device
        self.backbone.to(device)
        parts = []
        for start in tqdm(starts, desc="encoding", unit=" batches", delay=PATIENCE, disable=not is_first()):
            rows = inputs.read(data, range(start, min(start + batch_size, len(data))))
            parts.append(self.features(send_to_device(inputs(rows), device)).cpu())
        return parts

    def fit(self, rows: Dataset, labels: Tensor, weights: Tensor, seed: int) -> Self:
        x = self.standardise(self.encode(rows))
        heads = fit_heads(x, labels, weights[None].float(), seed=seed, **self.recipe)
        model = type(self)(
            self.backbone,
            heads.repeat(2, 1, 1),
            self.mean,
            self.scale,
            self.inputs,
            self.names,
            self.probe_set,
            self.recipe,
        )
        model._known = self._known
        return model

    def _accuracy(self, model: Any, rows: Dataset, truth: Tensor, batch_size: int) -> float:
        predicted = torch.cat([z[:, 0].argmax(1) for z in model.batches(rows, batch_size)])
        return (predicted == truth).double().mean().item()

    @property
    def fingerprint(self) -> str:
        return weights_hash([self.backbone], self.heads, self.mean, self.scale)

    @property
    def kind(self) -> str:
        bare = isinstance(self.backbone, nn.Identity)
        return "linear heads" if bare else f"linear heads on {type(self.backbone).__name__}"


def _check_features(x: Tensor, column: Any) -> None:
    """Raise a `ValueError` for features of a probe set that are no numbers; warn of those that tell nothing."""
    where = "" if column is None else f", from input_column={column!r}"
    if len(bad := (~x.isfinite().all(1)).nonzero().flatten()):
        raise ValueError(
            f"the features of {len(bad)} rows of the probe set are NaN or infinite, the first at row {bad[0]}{where}; "
            "fill missing values in, or leave these rows out"
        )
    if (x == x[0]).all():
        warnings.warn(
            f"the features of all {len(x)} rows of the probe set are equal{where}, so probes can only guess; feed "
            "columns, or a backbone, that tell rows apart",
            stacklevel=3,
        )


def fit_heads(
    x: Tensor,
    labels: Tensor,
    counts: Tensor,
    *,
    classes: int,
    steps: int = 200,
    learning_rate: float = 0.01,
    weight_decay: float = 0.01,
    seed: int = 0,
) -> Tensor:
    """M softmax heads at once, head m minimising `sum_i counts_mi CE_i / sum_i counts_mi` with full-batch AdamW.

    Args:
        x: `(n, d)` features.
        labels: `(n,)`.
        counts: `(M, n)` weights of the rows; bootstrap counts equal training on the resampled rows.

    Returns:
        `(M, d, C)`.
    """
    counts = counts.to(x)
    shares = counts / counts.sum(1, keepdim=True)
    generator = torch.Generator().manual_seed(check_seed(seed) % 2**63)
    start = torch.randn(len(counts), x.shape[1], classes, generator=generator) * 0.01
    heads = nn.Parameter(start.to(x))
    optimizer = torch.optim.AdamW([heads], lr=learning_rate, weight_decay=weight_decay)
    with torch.enable_grad():
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / steps)
            logits = torch.einsum("nd,mdc->mnc", x, heads)
            losses = F.cross_entropy(
                logits.flatten(0, 1), labels.to(x.device).repeat(len(counts)), reduction="none"
            ).view(len(counts), -1)
            optimizer.zero_grad()
            (losses * shares).sum().backward()
            optimizer.step()
    return heads.detach()


def _unseen_likelihood(x: Tensor, heads: Tensor, labels: Tensor, counts: Tensor) -> float:
    """Mean log probability of each row's label under the mean of the heads that were not trained on the row."""
    unseen = counts == 0
    p = torch.einsum("nd,mdc->mnc", x, heads).softmax(2)
    given = p.gather(2, labels[None, :, None].expand(len(heads), -1, 1))[..., 0]
    judged = unseen.any(0)
    mean = (given * unseen).sum(0)[judged] / unseen.sum(0)[judged]
    return mean.clamp(min=1e-6).log().mean().item()
