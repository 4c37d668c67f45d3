"""`SFTScorer`: what a few small language models say of the answers of instruction data, and the rows to train on."""

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from hf_effdl.checks import flag, instance, one_of, path, whole_number
from hf_effdl.files import digest, locked, read_sealed, sealed, sweep, write_whole
from hf_effdl.processes import is_first, refuse_lone_processes, same_fate
from hf_effdl.samples.drawing.checks import check_rows, check_seed
from hf_effdl.samples.drawing.clusters import clusters
from hf_effdl.samples.drawing.plan import Plan
from hf_effdl.samples.language.card import write_language_card
from hf_effdl.samples.language.choosing import METHODS, UNITS, choose, damaged_rows
from hf_effdl.samples.language.probes import LanguageProbes, ask
from hf_effdl.samples.language.rows import Encoded, batch_of, batches_of, encode, other_prompts
from hf_effdl.samples.probes.inputs import check_dataset
from hf_effdl.samples.probes.row_marks import content_ids, row_marks
from hf_effdl.samples.probes.scoring import SCORE_KEY
from hf_effdl.samples.scores.token_scores import (
    answer_scores,
    coarse_log_probs,
    kept_tokens,
    mean_by_row,
    means_by_place,
)


COLUMNS = ("messages", "prompt", "completion", "text", "chat_template_kwargs")
CHUNK = 256  # tokens whose logits are turned into probabilities at once


class SFTScorer:
    """Scores rows of instruction data by their answers, and chooses among them.

    Rows are conversations (`messages`, the last one is the answer), pairs (`prompt` and `completion`) or texts
    (`text`). Each row gets, from one pass of M probes and two of the first:

        tokens, answer_tokens   of the row and of its answer
        loss, perplexity, p_answer, hits, entropy, el2n, loss_end, and of two probes or more u_y, u_x, spread:
                                see `answer_scores`; all are means over the answer's tokens
        loss_alone, ifd         loss without the prompt, and exp(loss - loss_alone), both of the first probe
        match                   by how much the loss grows under the prompt of another row, the one nearest to it among
                                the rows it is scored with; 0 where there is none. About zero where an answer is not
                                this prompt's
        embedding               last hidden states of the first probe, averaged with weights that grow with the place

    Args:
        probes: `LanguageProbes`, such as `train_language_probes` makes; a list of models (checkpoints of a run), or a
            PEFT model with several adapters, together with `processing_class`. They may be much smaller than the model
            that the rows are for.
        processing_class: the tokenizer, if `probes` has none.
        max_length: rows are cut off after so many tokens, as in training.
        top: tokens of the vocabulary that uncertainties tell apart; all others count as one.
        batch_tokens: of a batch, padding counted.
        part_rows: rows that are scored, kept and handed to a process together.
        contrast: False leaves out `loss_alone`, `ifd` and `match`, and their two passes.
        embed: False leaves out `embedding`, and with it clusters and near duplicates.
        clusters: number of clusters, see `clusters`.
        seed: of the clusters and of the draw.
        cache_dir: keeps finished parts, so that a pass that was cut off goes on. Parts are known by what they hold:
            those of other probes, rows or settings are not mistaken for them, damaged ones are made again.

    Raises:
        ValueError: for a `processing_class` that is missing, settings out of range, and as `LanguageProbes`. Scoring
            refuses rows by their number: see `encode`, and rows longer than the probes have places for.

    Example:
        >>> scorer = SFTScorer(probes, max_length=512)  # doctest: +SKIP
        >>> subset = scorer.select(rows, 100_000, unit="tokens")  # doctest: +SKIP

    Source: uncertainty by COPS, arXiv 2309.02476; `ifd` by arXiv 2308.12032; weighted embeddings as RDS+, arXiv
    2503.01807. `match` and its threshold are this package's.
    """

    def __init__(
        self,
        probes: LanguageProbes | nn.Module | Sequence[nn.Module],
        processing_class: Any = None,
        *,
        max_length: int = 1024,
        top: int = 64,
        batch_tokens: int = 1024,
        part_rows: int = 256,
        contrast: bool = True,
        embed: bool = True,
        clusters: int | None = None,
        seed: int = 0,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        if not isinstance(probes, LanguageProbes):
            if processing_class is None:
                raise ValueError("processing_class=None: pass the tokenizer of the probes")
            probes = LanguageProbes(probes, processing_class)
        self.probes, self.tokenizer = probes, processing_class or probes.processing_class
        self.max_length = whole_number("max_length", max_length, 2)
        self.top = whole_number("top", top, 2)
        self.batch_tokens = whole_number("batch_tokens", batch_tokens, 1)
        self.part_rows = whole_number("part_rows", part_rows, 2)
        self.contrast, self.embed = flag("contrast", contrast), flag("embed", embed)
        self.clusters = None if clusters is None else whole_number("clusters", clusters, 1)
        self.seed, self.cache_dir = check_seed(seed), None if cache_dir is None else path("cache_dir", cache_dir)
        self.plan: Plan | None = None
        self._chosen_from = ""

    @property
    def columns(self) -> list[str]:
        """Names of the score columns."""
        names = ["tokens", "answer_tokens", "loss", "perplexity", "p_answer", "hits", "entropy", "el2n", "loss_end"]
        names += ["u_y", "u_x", "spread"] if len(self.probes) > 1 else []
        names += ["loss_alone", "ifd", "match"] if self.contrast else []
        return names + (["embedding"] if self.embed else [])

    @property
    def key(self) -> str:
        """What scores follow from, beside the rows."""
        settings = {"max_length": self.max_length, "top": self.top, "batch_tokens": self.batch_tokens}
        settings |= {"columns": self.columns, "probes": self.probes.fingerprint, "ends": "seen"}
        return digest(json.dumps(settings))

    def score(self, data: Dataset, progress: bool = True) -> Dataset:
        """The data set with the score columns added, and `score_key`, by which `select` knows scores of other probes,
        settings or rows. Several processes share the parts and all get the whole.

        Says first what the pass costs, and then what it took.

        Raises:
            ValueError, TypeError: for an empty or streamed data set, columns that are taken, rows that `encode`
                refuses, and probes that give NaN; parts that are finished stay in `cache_dir`.
        """
        state = PartialState()
        refuse_lone_processes()
        with same_fate():
            self._check(data)
            self.probes.to(state.device)
            rows = self._encoded(data)
            loud = progress and is_first()
            if loud:
                print(self.cost(rows)["text"])
                if cut := sum(map(self._is_cut, rows)):
                    print(
                        f"{cut} of {len(rows)} rows are cut off at max_length={self.max_length} and scored up to there"
                    )
            start, key = time.perf_counter(), self.key if self.cache_dir else ""
            parts = [range(i, min(i + self.part_rows, len(rows))) for i in range(0, len(rows), self.part_rows)]
            mine = parts[state.process_index :: state.num_processes]
            hide = not loud
            bar = tqdm(mine, desc="scoring", unit=" parts", disable=hide)
            done = [(part.start, self._kept_part([rows[i] for i in part], key)) for part in bar]
        tables = dict(gather_object(done)) if state.num_processes > 1 else dict(done)
        table = {name: torch.cat([tables[part.start][name] for part in parts]) for name in self.columns}
        if loud:
            print(f"scored {len(rows)} rows in {time.perf_counter() - start:.0f} s on {state.num_processes} processes")
        keys = self._keys(data)
        for name, values in table.items():
            data = data.add_column(name, values.tolist() if values.ndim == 1 else list(values.numpy()))
        return data.add_column(SCORE_KEY, keys.tolist())

    def select(
        self, data: Dataset, budget: int, unit: str = "rows", method: str = "default", query: Dataset | None = None
    ) -> Dataset:
        """Score, unless it is done, and choose; `self.plan` then holds positions, probabilities and settings.

        Args:
            data: rows, scored or not.
            budget: rows, or tokens that the chosen rows stay within.
            unit: `"rows"` or `"tokens"`.
            method: `"default"` (uniform among rows that do not look damaged), `"random"`,
                `"balanced"`, `"length"`, `"mid-perplexity"`, `"top-perplexity"`, `"ifd"`, `"el2n"`, `"uncertainty"` or
                `"nearest"` to the rows of `query`.
            query: rows of what the model is to be good at, for `method="nearest"`.

        Returns:
            The chosen rows in the data set's order, with `weight` (1) and `inclusion_probability`; without the scores.
        """
        self._check_choice(data, budget, unit, method, query)  # before the long work
        scored = data if set(self.columns) <= set(data.column_names) else self.score(data)
        self._check_scores(scored)
        table = self.table(scored)
        ids = self._ids(scored)
        groups = clusters(table["embedding"], self.clusters, self.seed, row_ids=ids) if self.embed else None
        asked = None if query is None or not self.embed else self.table(self.score(query, progress=False))["embedding"]
        options = {"unit": unit, "method": method, "seed": self.seed, "row_ids": ids}
        self.plan = choose(table, budget, groups=groups, query=asked, **options)
        self._chosen_from = self._name(scored)
        subset = scored.select(self.plan.positions.tolist()).remove_columns([*self.columns, SCORE_KEY])
        subset = subset.add_column("weight", self.plan.weights.tolist())
        return subset.add_column("inclusion_probability", self.plan.probabilities.tolist())

    def write_card(
        self,
        folder: str | os.PathLike[str],
        scored: Dataset,
        *,
        repo_id: str | None = None,
        source: str | None = None,
        license: str | None = None,
        tags: Iterable[str] = (),
    ) -> Path:
        """A card beside scored rows, or beside those that the last `select` chose among them.

        Args:
            folder: gets `README.md`.
            scored: what `score` returned. Where it is what the last `select` chose from, the card is of the choice.
            repo_id: of the data set it goes with; default: the folder's name.
            source: id of the data set that the rows are from.
            license, tags: of the metadata.

        Returns:
            the card's file.

        Raises:
            ValueError: for rows without scores, or with those of other probes or settings.

        Example:
            >>> subset = scorer.select(scored, 600, unit="tokens")             # doctest: +SKIP
            >>> scorer.write_card("out", scored, repo_id="me/chosen-rows")     # doctest: +SKIP
        """
        check_dataset(path("folder", folder) and scored, self.columns, "the scored data set")
        self._check_scores(scored)
        table, plan = self.table(scored), self.plan
        plan = plan if plan is not None and self._chosen_from == self._name(scored) else None
        left_out = None
        if plan is not None and plan.settings["method"] == "default":
            groups = clusters(table["embedding"], self.clusters, self.seed, row_ids=self._ids(scored))
            left_out = {what: int(rows.sum()) for what, rows in damaged_rows(table, groups).items()}
        options = {"repo_id": repo_id, "source": source, "license": license, "tags": tags}
        return write_language_card(folder, table, plan, self._facts(), left_out, **options)

    def _facts(self) -> dict[str, Any]:
        """What scores follow from, for a card."""
        names = sorted({_name_of(model) for model in self.probes.models})
        return {
            "probes": f"{len(self.probes)}, of {', '.join(names)}; fingerprint {self.probes.fingerprint[:16]}",
            "rows are cut off at": f"{self.max_length} tokens",
            "tokens told apart": self.top,
            "scores are those of": self.key[:16],
        }

    def _name(self, scored: Dataset) -> str:
        return digest(self._keys(scored).numpy().tobytes())

    def table(self, scored: Dataset) -> dict[str, Tensor]:
        """The score columns of a data set as tensors."""
        arrow = scored.select_columns(self.columns).with_format("arrow")[:]  # the other formats round to float32
        table = {name: arrow.column(name).combine_chunks() for name in self.columns}
        if "embedding" in table:
            table["embedding"] = table["embedding"].flatten()
        table = {name: torch.tensor(values.to_numpy(zero_copy_only=False)) for name, values in table.items()}
        return {name: x.view(len(scored), -1) if name == "embedding" else x for name, x in table.items()}

    def cost(
        self, rows: Dataset | Sequence[Encoded], epochs: float = 1.0, parameters: int | None = None
    ) -> dict[str, Any]:
        """What the pass costs beside training on all rows, by the usual 2 and 6 operations a parameter and token.

        Args:
            rows: the data.
            epochs: of the training that it serves.
            parameters: of the model that is trained; default: as many as a probe has.

        Returns:
            `tokens`, `scoring` and `training` (floating-point operations), `share` and `text`.
        """
        rows = self._encoded(rows) if isinstance(rows, Dataset) else rows
        tokens = sum(map(len, rows))
        answers = sum(len(row.answer) for row in rows)
        passes = tokens * len(self.probes) + (tokens + answers if self.contrast else 0)
        scoring = 2 * self.probes.parameters * passes
        training = 6 * (parameters or self.probes.parameters) * tokens * epochs
        text = (
            f"scoring {len(rows)} rows of {tokens} tokens with {len(self.probes)} probes: {scoring:.2e} operations, "
            f"{scoring / training:.0%} of {epochs:g} epochs of full training on them"
        )
        return {"tokens": tokens, "scoring": scoring, "training": training, "share": scoring / training, "text": text}

    def score_rows(
        self, rows: Sequence[Mapping[str, Any]], where: str = "the data", first: int = 0
    ) -> dict[str, Tensor]:
        """The scores of some rows, on this process alone, `{name: (rows,) or (rows, d)}`."""
        encoded = [
            self._encoded_row(row, f"row {first + i} of {where}")
            for i, row in enumerate(instance("rows", rows, Iterable, "rows as dicts"))
        ]
        if not encoded:
            raise ValueError("rows is empty: there is nothing to score")
        self.probes.to(PartialState().device)
        parts = [encoded[i : i + self.part_rows] for i in range(0, len(encoded), self.part_rows)]
        tables = [self._part(part) for part in parts]
        return {name: torch.cat([table[name] for table in tables]) for name in self.columns}

    # ---- a part

    def _check(self, data: Any) -> None:
        if not isinstance(data, Dataset) or not len(data):
            what = "an empty data set" if isinstance(data, Dataset) else f"a {type(data).__name__}"
            raise ValueError(f"data is {what}; pass a datasets.Dataset with rows, or shards to score_shards")
        if taken := [name for name in (*self.columns, SCORE_KEY) if name in data.column_names]:
            raise ValueError(f"the data set has the columns {taken} already; remove_columns({taken}) to score it anew")

    def _check_choice(self, data: Any, budget: int, unit: str, method: str, query: Any) -> None:
        """Refuse what cannot be chosen, whatever the scores are."""
        instance("data", data, Dataset, "a datasets.Dataset with rows")
        one_of("unit", unit, UNITS), one_of("method", method, METHODS)
        if unit == "rows":
            check_rows(budget, len(data))
        else:
            whole_number("budget", budget, 1)
        if query is not None:
            instance("query", query, Dataset, "a datasets.Dataset of rows to be near to")
        if self.clusters is not None and self.clusters > len(data):
            raise ValueError(f"clusters={self.clusters} of {len(data)} rows; set fewer")
        if clash := [name for name in ("weight", "inclusion_probability") if name in data.column_names]:
            raise ValueError(f"the data set has the columns {clash} already; remove_columns({clash}) or rename them")

    def _ids(self, data: Dataset) -> Tensor:
        """An id for every row, whatever place it stands at, `(rows,)` int64."""
        return content_ids(data, [name for name in COLUMNS if name in data.column_names])

    def _keys(self, data: Dataset) -> Tensor:
        """Another number for other rows, probes or settings, `(rows,)` int64."""
        return row_marks(data, [name for name in COLUMNS if name in data.column_names]) ^ int(self.key[:15], 16)

    def _check_scores(self, scored: Dataset) -> None:
        """Refuse scores that are not these probes' of these rows."""
        if SCORE_KEY not in scored.column_names:
            raise ValueError(
                f"the data set has score columns, but no {SCORE_KEY!r}; remove_columns({self.columns}) first"
            )
        other = int((torch.tensor(scored[SCORE_KEY][:]) != self._keys(scored)).sum())
        if other:
            raise ValueError(
                f"{other} of {len(scored)} rows have the scores of other probes or settings, or were changed since; "
                f"remove_columns({[*self.columns, SCORE_KEY]}) to score them anew"
            )

    def _encoded(self, data: Dataset) -> list[Encoded]:
        names = [name for name in COLUMNS if name in data.column_names]
        plain = data.select_columns(names).with_format(None) if names else data
        return [self._encoded_row(row, f"row {i}") for i, row in enumerate(plain)]

    def _encoded_row(self, row: Mapping[str, Any], where: str) -> Encoded:
        return self.probes.check(encode(row, self.tokenizer, self.max_length, where), where)

    def _is_cut(self, row: Encoded) -> bool:
        """Whether `max_length` has cut a row off, whose end was not seen then."""
        return len(row) == self.max_length and self.tokenizer.eos_token_id not in row.answer

    @property
    def _padding(self) -> int:
        """A token for places that are masked."""
        return self.tokenizer.pad_token_id or self.tokenizer.eos_token_id or 0

    def _kept_part(self, rows: Sequence[Encoded], key: str) -> dict[str, Tensor]:
        """The scores of a part, from the folder if they are there, else into it."""
        if self.cache_dir is None:
            return self._part(rows)
        name = digest(json.dumps([key, [[*vars(row).values()] for row in rows]]))[:24]
        file = Path(self.cache_dir) / f"part-{name}.safetensors"
        with locked(file.parent, f".lock-{name}"):  # another run may be at it
            sweep(file.parent, file.name)
            with suppress(FileNotFoundError, ValueError):
                table = read_sealed(file)[0]
                if table.keys() == set(self.columns) and all(x.shape[:1] == (len(rows),) for x in table.values()):
                    return table
            table = self._part(rows)
            write_whole(file, sealed(table))
            return table

    def _part(self, rows: Sequence[Encoded]) -> dict[str, Tensor]:
        """The scores of rows that are scored together."""
        with self.probes.alone():
            return self._scores(rows)

    def _scores(self, rows: Sequence[Encoded]) -> dict[str, Tensor]:
        tables: dict[str, Tensor] = {}
        for numbers, found in self._asked(rows):
            for name, values in found.items():
                if name not in tables:
                    tables[name] = torch.zeros(len(rows), *values.shape[1:], dtype=values.dtype)
                tables[name][numbers] = values.cpu()
        prompts = tables.pop("prompts", None)
        tables["tokens"] = torch.tensor([len(row) for row in rows])
        tables["answer_tokens"] = torch.tensor([len(row.answer) for row in rows])
        tables["loss_end"][torch.tensor([self._is_cut(row) for row in rows])] = torch.nan
        first = tables.pop("first")
        if self.contrast:
            start = self.tokenizer.bos_token_id
            start = self.tokenizer.eos_token_id if start is None else start
            alone = [Encoded([start], row.answer) if start is not None and row.asked else row for row in rows]
            tables["loss_alone"] = self._losses(alone)
            tables["ifd"] = (first - tables["loss_alone"]).exp()
            tables["match"] = self._losses(other_prompts(rows, prompts, self.max_length)) - first
        return {name: tables[name] for name in self.columns}

    def _asked(self, rows: Sequence[Encoded]) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """Batch by batch, numbers of rows and what all probes say of them."""
        for numbers in batches_of(rows, self.batch_tokens):
            batch = batch_of([rows[i] for i in numbers], self._padding, self.tokenizer.eos_token_id)
            given, z, found = batch.given.to(self.probes.device), [], {}
            for m, model in enumerate(self.probes.each()):
                logits, hidden = ask(model, batch, embed=m == 0 and (self.embed or self.contrast))
                if not logits.isfinite().all():
                    raise ValueError(f"probe {m} gives NaN or infinite logits; train it again (a lower learning rate)")
                if m == 0:
                    kept, place = kept_tokens(logits, given, self.top)
                    lengths = [len(rows[i].prompt) for i in numbers]
                    found |= {} if hidden is None else means_by_place(hidden, batch.inputs["attention_mask"], lengths)
                pieces = zip(logits.split(CHUNK), kept.split(CHUNK), strict=True)
                z.append(torch.cat([coarse_log_probs(one, tokens) for one, tokens in pieces]))
            scores = answer_scores(torch.stack(z, 1), place, batch.row.to(given.device), batch.end.to(given.device))
            first = z[0].gather(1, place[:, None])[:, 0].double()
            found["first"] = mean_by_row(-first, batch.row.to(given.device), len(numbers))
            yield numbers, found | scores

    def _losses(self, rows: Sequence[Encoded]) -> Tensor:
        """The first probe's loss of each row's answer, `(rows,)` float64."""
        losses = torch.zeros(len(rows), dtype=torch.float64)
        with self.probes.first() as model:
            for numbers in batches_of(rows, self.batch_tokens):
                batch = batch_of([rows[i] for i in numbers], self._padding)
                logits, _ = ask(model, batch)
                pieces = zip(logits.split(CHUNK), batch.given.to(logits.device).split(CHUNK), strict=True)
                terms = torch.cat([cross_entropy(one.float(), given, reduction="none") for one, given in pieces])
                losses[numbers] = mean_by_row(terms.double().cpu(), batch.row, len(numbers))
        return losses


def _name_of(model: nn.Module) -> str:
    """Its id on the Hub; a folder of this machine is nobody's business."""
    name = getattr(model.config, "name_or_path", "")
    return name if name and not os.path.exists(name) else type(model).__name__
