"""Cheap probes: M linear heads on one frozen backbone."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import send_to_device
from datasets import Dataset
from torch import Tensor, nn

from hf_effdl.samples.inputs import Inputs, check_dataset, label_names, label_tensor, run_model
from hf_effdl.samples.probes import LEAST_PROBES, Probes, ProbeSet, bootstrap_counts


class LinearProbes(Probes):
    """M linear heads on the features of one frozen backbone: one forward pass a row for all of them.

    Made by `LinearProbes.train`. For a linear head the theory behind the uncertainty is exact.

    Source: arXiv 2309.02476, where probes are whole networks; linear heads are our addition.
    """

    def __init__(
        self, backbone: nn.Module | None, heads: Tensor, mean: Tensor, scale: Tensor, inputs: Inputs,
        names: Sequence[str] | None, probe_set: ProbeSet, recipe: dict[str, Any],
    ) -> None:  # fmt: skip
        self.backbone = nn.Identity() if backbone is None else backbone.eval()
        super().__init__([self.backbone] * len(heads), names=names or [], probe_set=probe_set)
        self.names = list(names) if names else None
        self.inputs, self.recipe = inputs, recipe
        self.heads, self.mean, self.scale = heads, mean, scale  # (M, d + 1, C): the last row is the bias

    @classmethod
    def train(
        cls,
        backbone: nn.Module | None,
        rows: Dataset,
        label_column: str = "label",
        *,
        num_probes: int = 8,
        bootstrap: bool = True,
        processing_class: Any = None,
        input_column: str | Sequence[str] | None = None,
        data_collator: Callable[[list[dict[str, Any]]], Any] | None = None,
        names: Sequence[str] | None = None,
        steps: int = 200,
        learning_rate: float = 0.01,
        weight_decay: float = 0.01,
        batch_size: int = 64,
        seed: int = 0,
    ) -> "LinearProbes":
        """Fit M softmax heads on bootstrap samples of labelled rows.

        Features are the backbone's `pooler_output`, else the mean of its last hidden states (over the tokens or
        places that are there), else what it returns; standardised over the rows.

        Args:
            backbone: any encoder; None if the rows hold vectors or numbers already.
            rows: labelled rows S'.
            label_column: of `rows`.
            num_probes: M.
            bootstrap: False gives every head all rows; convex heads then agree, and scoring says so.
            processing_class, input_column, data_collator, names: see `Probes`.
            steps, learning_rate, weight_decay: of full-batch AdamW.
            batch_size: of the forward passes.
            seed: of the bootstrap and of the heads' starting points.

        Example:
            >>> data = Dataset.from_dict({"features": torch.randn(60, 4).tolist(), "label": [0, 1, 2] * 20})
            >>> len(LinearProbes.train(None, data, input_column="features", steps=5))
            8
        """
        check_dataset(rows, [label_column], "the probe set")
        names = names or label_names(rows, label_column)
        labels = label_tensor(rows, label_column, names)
        if (labels < 0).any():
            raise ValueError(f"{int((labels < 0).sum())} rows of the probe set have a negative label; leave them out")
        classes = max(len(names or []), int(labels.max()) + 1)
        counts = bootstrap_counts(len(rows), num_probes, seed, bootstrap)
        recipe = {"steps": steps, "learning_rate": learning_rate, "weight_decay": weight_decay, "classes": classes}
        inputs = Inputs(processing_class, input_column, data_collator)
        empty = torch.zeros(max(num_probes, LEAST_PROBES), 0, classes)
        probes = cls(backbone, empty, torch.zeros(0), torch.ones(0), inputs, names, ProbeSet(rows, labels, counts),
                     recipe)  # fmt: skip
        if num_probes < LEAST_PROBES:
            raise ValueError(f"num_probes={num_probes}: the spread of one probe is unknown; use 2 or more, better 8")
        x = probes.encode(rows, batch_size)
        probes.mean, probes.scale = x.mean(0), x.std(0).clamp(min=1e-6)
        probes.heads = fit_heads(probes.standardise(x), labels, counts, seed=seed, **recipe)
        return probes

    def standardise(self, x: Tensor) -> Tensor:
        """Features with mean 0 and deviation 1 over the probe set, and a constant 1 for the bias."""
        x = (x - self.mean.to(x)) / self.scale.to(x)
        return torch.cat([x, torch.ones_like(x[:, :1])], 1)

    def to(self, device: torch.device) -> "LinearProbes":
        self.backbone.to(device)
        self.heads = self.heads.to(device)
        return self

    @torch.no_grad()
    def features(self, inputs: Any) -> Tensor:
        """`(B, d)` features of one batch of inputs."""
        output = run_model(self.backbone, inputs)
        if isinstance(output, Tensor):
            return output.flatten(1).float()
        pooled = output.get("pooler_output")
        if pooled is not None:
            return pooled.flatten(1).float()
        hidden = output["last_hidden_state"].float()
        if hidden.ndim == 4:  # (B, d, height, width)
            return hidden.mean((2, 3))
        mask = inputs.get("attention_mask") if isinstance(inputs, dict) else None
        if mask is None:
            return hidden.mean(1)
        return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)

    def logits(self, inputs: Any) -> Tensor:
        x = self.standardise(self.features(inputs))
        return torch.einsum("bd,mdc->bmc", x, self.heads.to(x.device))

    def encode(self, data: Dataset, batch_size: int = 64) -> Tensor:
        """`(n, d)` features of a data set, on the CPU."""
        inputs, device = self.bind(data), Accelerator().device
        self.backbone.to(device)
        parts = []
        for start in range(0, len(data), batch_size):
            rows = [data[i] for i in range(start, min(start + batch_size, len(data)))]
            parts.append(self.features(send_to_device(inputs(rows), device)).cpu())
        return torch.cat(parts)

    def fit(self, rows: Dataset, labels: Tensor, weights: Tensor, seed: int) -> "LinearProbes":
        x = self.standardise(self.encode(rows))
        heads = fit_heads(x, labels, weights[None].float(), seed=seed, **self.recipe)
        return LinearProbes(self.backbone, heads.repeat(2, 1, 1), self.mean, self.scale, self.inputs, self.names,
                            self.probe_set, self.recipe)  # fmt: skip

    def _accuracy(self, model: Any, rows: Dataset, truth: Tensor, batch_size: int) -> float:
        predicted = torch.cat([z[:, 0].argmax(1) for z in model.batches(rows, batch_size)])
        return (predicted == truth).double().mean().item()

    @property
    def fingerprint(self) -> str:
        if self._fingerprint is None:
            digest = hashlib.sha256(self.heads.detach().cpu().contiguous().numpy().tobytes())
            for name, tensor in sorted(self.backbone.state_dict().items()):
                digest.update(name.encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
            self._fingerprint = digest.hexdigest()[:16]
        return self._fingerprint

    def describe(self) -> dict[str, Any]:
        kind = "linear heads" if isinstance(self.backbone, nn.Identity) else (
            f"linear heads on {type(self.backbone).__name__}"
        )  # fmt: skip
        return super().describe() | {"kind": kind}


def fit_heads(
    x: Tensor, labels: Tensor, counts: Tensor, *, classes: int, steps: int = 200, learning_rate: float = 0.01,
    weight_decay: float = 0.01, seed: int = 0,
) -> Tensor:  # fmt: skip
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
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(len(counts), x.shape[1], classes, generator=generator) * 0.01
    heads = nn.Parameter(start.to(x))
    optimizer = torch.optim.AdamW([heads], lr=learning_rate, weight_decay=weight_decay)
    with torch.enable_grad():
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / steps)
            logits = torch.einsum("nd,mdc->mnc", x, heads)
            losses = F.cross_entropy(
                logits.flatten(0, 1), labels.to(x.device).repeat(len(counts)), reduction="none"
            ).view(len(counts), -1)  # fmt: skip
            optimizer.zero_grad()
            (losses * shares).sum().backward()
            optimizer.step()
    return heads.detach()
