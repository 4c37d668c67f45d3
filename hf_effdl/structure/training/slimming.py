"""What a trainer that has a path takes smaller models with."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from hf_effdl.checks import whole_number
from hf_effdl.processes import decided, forget_accelerate
from hf_effdl.random_state import random_state_kept
from hf_effdl.structure.calibration.compensate import Wish
from hf_effdl.structure.groups.finders.lora import has_adapter
from hf_effdl.structure.groups.ties import config_ties, stock_builds
from hf_effdl.structure.slim.batch_norm import recalibrate_batch_norm
from hf_effdl.structure.slim.latency import measure_latency
from hf_effdl.structure.slim.report import effdl_report, set_report
from hf_effdl.structure.slim.slim import cut_copy, take_out
from hf_effdl.structure.training.evaluation import rows_per_batch, training_inputs


CALIBRATION_ROWS = 512


class SlimMixin:
    """`slim` for a `Trainer` with `path`, `groups`, `plain_model`, `example` and `rows`."""

    def slim(
        self,
        macs: float | None = None,
        params: float | None = None,
        latency: float | None = None,
        keep: float | None = None,
        *,
        order: str | None = None,
        widths: str = "stock",
        round_to: int | None = None,
        calibration: bool | Iterable[Any] = True,
        score: str = "path",
        ridge: float | None = None,
        intercept: bool = False,
        bn_batches: int = 0,
        latency_batch: int = 32,
    ) -> nn.Module:
        """A physically smaller model that holds one budget, chosen along the path.

        The layers that read the removed units are refitted on calibration rows, see `slim`. Under DDP every process
        must call it, each with its share of the rows.

        Args:
            macs, params, latency, keep: the budget, a share in (0, 1]; exactly one. See `SparsePath.select`.
            order: see `SparsePath.scores`; default `"dual"`, or `"entry"` with the paper preset.
            widths: `"stock"`: sizes that the stock config can say, so that anyone's `from_pretrained` loads it; groups
                that it says nothing of (the heads of a BERT) stay whole. `"free"`: every group on its own, which
                `from_pretrained` loads after `import hf_effdl`. Either way the path sizes the groups, with or without
                calibration; `slim`, which has no path, sizes free ones by what the model's outputs miss.
            round_to: sizes are multiples of this; default: 16 where a config number says at least 1024 units,
                else 1, and with `latency` multiples of 16 where they fit. See `SparsePath.select`.
            calibration: batches as the model takes them; True: up to 512 training rows; False: no refit, the model is
                the dense one with the removed units silent.
            score: which units stay, of as many as the path keeps: `"path"`, or `"magnitude"`, `"activation"`, `"obs"`,
                `"fisher"`, see `slim`.
            ridge, intercept: see `slim`.
            bn_batches: re-estimate the batch norms on so many training batches (0: keep the dense model's statistics).
            latency_batch: rows per forward pass when latency is measured; 0 measures none, and the report has none.

        Returns:
            The smaller model; the report (MACs, parameters and latency before and after, units, calibration) stands in
            `small.config.effdl_report` (`small.effdl_report` for a module without a config).
        """
        if latency_batch < 0 or (latency_batch == 0 and latency is not None):
            raise ValueError(
                f"latency_batch={latency_batch}: it must be at least 1 to measure latency, or 0 where latency is not "
                "the budget, to leave it out of the report"
            )
        bn_batches = whole_number("bn_batches", bn_batches, 0)
        path, model = self.path, self.plain_model()
        if has_adapter(model):
            raise ValueError(
                "the path is of the ranks of a LoRA adapter, and slim() makes whole models smaller; call "
                "select_lora_ranks(trainer.model, trainer.path, budget), and merge the adapter to slim the model"
            )
        inputs = self._latency_inputs(max(latency_batch, 1))
        order = order or ("entry" if self.args.preset == "paper" else "dual")
        budget = {"macs": macs, "params": params, "latency": latency, "keep": keep}
        options: dict[str, Any] = {"order": order, "widths": widths, "round_to": round_to}
        if latency is not None:
            options["measure"] = self._latency_ratio(model, inputs)
        if widths == "stock" and path.ties:
            units = {group.name: group.units for group in self.groups}
            options["allowed"] = lambda sizes: stock_builds(model, self.groups, path.ties, units | sizes)
        kept = decided(lambda: path.select(**budget, **options))
        refit = {"calibration": self._calibration(calibration, model, score), "ridge": ridge, "intercept": intercept}
        by_path = score == "path"
        wishes = {name: Wish(len(index), index if by_path else None) for name, index in kept.items()}
        ties = config_ties(model, self.groups)
        small, found = take_out(model, self.groups, wishes, ties, score=None if by_path else score, **refit)
        if bn_batches:
            with random_state_kept():
                recalibrate_batch_norm(small, training_inputs(self.get_train_dataloader(), bn_batches, small))
        given = {name: value for name, value in budget.items() if value is not None}
        report = decided(lambda: effdl_report(model, small, inputs, self.groups, given, latency_batch > 0))
        if found:
            found["calibration"]["score"] = score
        set_report(small, report | found | {"order": order})
        forget_accelerate(small)
        return small

    def _calibration(self, wanted: Any, model: nn.Module, score: str) -> Iterable[Any] | None:
        """The batches to refit on, this process's share of them."""
        if wanted is False:
            return None
        if wanted is not True:
            return wanted
        loader = self.rows()
        batches = -(-CALIBRATION_ROWS // rows_per_batch(loader))
        share = self.args.process_index, self.args.world_size
        with random_state_kept():  # rows may be augmented at random
            return list(training_inputs(loader, batches, model, labels=score == "fisher", share=share))

    def _latency_ratio(self, model: nn.Module, inputs: Any) -> Callable[[Mapping[str, Tensor]], float]:
        """A function that measures the share of the model's latency that kept units have."""
        # about 0.3 s of the whole model a time
        rounds = max(5, min(15, int(300 / measure_latency([model], inputs, repeats=3, seconds=0.0)[0])))

        def measure(kept: Mapping[str, Tensor]) -> float:
            pair = [model, cut_copy(model, self.groups, kept)]
            whole, part = measure_latency(pair, inputs, repeats=rounds, seconds=0.002)
            return part / whole

        return measure

    def _latency_inputs(self, rows: int) -> dict[str, Any]:
        example = self.example()
        device = next(self.model.parameters()).device
        return {
            name: value.repeat(rows, *[1] * (value.ndim - 1)).to(device) if isinstance(value, Tensor) else value
            for name, value in example.items()
        }
