"""Smaller models, less data and better prompts on the Hugging Face stack.

structure/    smaller models: which units a model needs, from one training run
samples/      less data: which rows are worth labelling and training on
vicl/         better prompts: which labelled example a frozen vision model should be shown
metrics/      metrics for `evaluate.load`
hub/          what cards and repositories of all three share
cli/          the command line `hf-effdl`
weighting     `WeightedTrainer`, which trains on a column of weights; `row_losses`: the loss of every row
weighted_sft  `WeightedSFTTrainer`, the same for TRL's fine-tuning of language models
registration  how transformers comes to know slim models; `moved`: import paths of 0.1.0
files, processes, pictures, checks, random_state, version    one place each for what all of them need
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hf_effdl.moved import keep_old_paths as _keep_old_paths
from hf_effdl.registration import register as _register
from hf_effdl.version import __version__ as __version__


_keep_old_paths()  # before anything is imported from a package that has the name of an old module
_register()  # how a slim model is loaded: from_pretrained needs this import and nothing else


_PUBLIC = {
    "samples.probes.dynamics_callback": ["DynamicsCallback", "dynamics_scores", "load_dynamics"],
    "samples.probes.linear_probes": ["LinearProbes"],
    "samples.scores.noise": ["fit_label_noise", "noise_rate"],
    "samples.drawing.plan": ["Plan", "make_plan"],
    "samples.drawing.presets": ["active_plan", "default_plan", "paper_plan"],
    "samples.drawing.probabilities": ["inclusion_probabilities"],
    "samples.probes.probes": ["Probes"],
    "samples.drawing.draws": ["PrioritySampler", "draw", "priority_sample"],
    "samples.rounds.answers": ["ColumnAnswers", "CsvAnswers"],
    "samples.rounds.learner": ["ActiveLearner"],
    "samples.scale.join_shards": ["join_shards"],
    "samples.scale.on_ray": ["score_shards_on_ray"],
    "samples.scale.score_shards": ["score_shards"],
    "samples.scale.scorers": ["ProbeScorer"],
    "samples.scale.streams": ["select_stream"],
    "samples.selection.selection": ["Selection", "load_selection"],
    "samples.selection.selector": ["UncertaintySelector"],
    "samples.drawing.shards": ["plan_shards"],
    "samples.language.probes": ["LanguageProbes", "train_language_probes"],
    "samples.language.scorer": ["SFTScorer"],
    "samples.probes.trained_probes": ["train_probes"],
    "samples.scores.uncertainty": ["uncertainty"],
    "structure.training.arguments": ["SplitLBIArguments", "scheduled_rates"],
    "structure.training.callbacks": ["SplitLBICallback"],
    "structure.training.distill": ["Distillation", "DistillationTrainer"],
    "structure.tickets.search": ["EarlyTicketCallback", "find_ticket"],
    "structure.groups.group": ["Group"],
    "structure.lora.picture": ["plot_lora_ranks"],
    "structure.lora.select": ["select_lora_ranks"],
    "structure.groups.param_groups": ["param_groups"],
    "structure.growing.arguments": ["GrowingArguments"],
    "structure.growing.deepen": ["deepen"],
    "structure.growing.trainer": ["GrowingTrainer", "GrowthCallback"],
    "structure.growing.widen": ["widen"],
    "structure.path.path": ["SparsePath"],
    "structure.slim.batch_norm": ["recalibrate_batch_norm"],
    "structure.slim.family": ["choose"],
    "structure.slim.slim": ["slim"],
    "structure.optim.schedule": ["derive_path", "walk_path"],
    "structure.optim.split_lbi": ["SplitLBI"],
    "structure.optim.update": ["split_lbi_update"],
    "structure.tickets.rewind": ["rewind", "transfer"],
    "structure.tickets.ticket": ["Ticket"],
    "structure.groups.find": ["find_groups"],
    "structure.training.trainer": ["SplitLBITrainer"],
    "vicl.remote_code.ranker_aggregation": ["aggregate_rankings"],
    "vicl.auto": [
        "ListwiseRanker",
        "ListwiseRankerConfig",
        "MaeVqganConfig",
        "MaeVqganForImageInpainting",
        "VisualInContextConfig",
        "VisualInContextModel",
        "VisualInContextPipeline",
    ],
    "vicl.remote_code.cascade": ["CascadeSelector"],
    "vicl.remote_code.ranker_designs": ["covering_design", "knock_out"],
    "vicl.remote_code.frozen_mae_vqgan": ["MaeVqganInContext"],
    "vicl.remote_code.frozen_matching": ["FeatureMatching"],
    "vicl.held_out": ["near_duplicates", "read_splits", "split_pool", "write_splits"],
    "vicl.measure": ["measure_examples"],
    "vicl.remote_code.ranker_losses": ["neural_ndcg_loss", "pairwise_margin_loss"],
    "vicl.pool.pool": ["ExamplePool"],
    "vicl.remote_code.ranker_selector": ["RankerSelector"],
    "vicl.ranking.ranker_trainer": ["RankerTrainer"],
    "vicl.ranking.ranking_lists": ["RankingLists"],
    "vicl.remote_code.ranker_reliable": ["reliable_rows"],
    "vicl.remote_code.frozen_painter": ["PainterInContext"],
    "vicl.remote_code.frozen_sam2": ["Sam2InContext"],
    "vicl.remote_code.frozen_sam3": ["Sam3InContext"],
    "vicl.remote_code.frozen_seggpt": ["SegGptInContext"],
    "vicl.remote_code.vision_encoder": ["VisionEncoder"],
    "weighted_sft": ["WeightedSFTTrainer"],
    "weighting": ["WeightedTrainer"],
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = [*sorted(_HOME), "__version__"]

if TYPE_CHECKING:
    from hf_effdl.samples.drawing.draws import PrioritySampler, draw, priority_sample
    from hf_effdl.samples.drawing.plan import Plan, make_plan
    from hf_effdl.samples.drawing.presets import active_plan, default_plan, paper_plan
    from hf_effdl.samples.drawing.probabilities import inclusion_probabilities
    from hf_effdl.samples.drawing.shards import plan_shards
    from hf_effdl.samples.language.probes import LanguageProbes, train_language_probes
    from hf_effdl.samples.language.scorer import SFTScorer
    from hf_effdl.samples.probes.dynamics_callback import DynamicsCallback, dynamics_scores, load_dynamics
    from hf_effdl.samples.probes.linear_probes import LinearProbes
    from hf_effdl.samples.probes.probes import Probes
    from hf_effdl.samples.probes.trained_probes import train_probes
    from hf_effdl.samples.rounds.answers import ColumnAnswers, CsvAnswers
    from hf_effdl.samples.rounds.learner import ActiveLearner
    from hf_effdl.samples.scale.join_shards import join_shards
    from hf_effdl.samples.scale.on_ray import score_shards_on_ray
    from hf_effdl.samples.scale.score_shards import score_shards
    from hf_effdl.samples.scale.scorers import ProbeScorer
    from hf_effdl.samples.scale.streams import select_stream
    from hf_effdl.samples.scores.noise import fit_label_noise, noise_rate
    from hf_effdl.samples.scores.uncertainty import uncertainty
    from hf_effdl.samples.selection.selection import Selection, load_selection
    from hf_effdl.samples.selection.selector import UncertaintySelector
    from hf_effdl.structure.groups.find import find_groups
    from hf_effdl.structure.groups.group import Group
    from hf_effdl.structure.groups.param_groups import param_groups
    from hf_effdl.structure.growing.arguments import GrowingArguments
    from hf_effdl.structure.growing.deepen import deepen
    from hf_effdl.structure.growing.trainer import GrowingTrainer, GrowthCallback
    from hf_effdl.structure.growing.widen import widen
    from hf_effdl.structure.lora.picture import plot_lora_ranks
    from hf_effdl.structure.lora.select import select_lora_ranks
    from hf_effdl.structure.optim.schedule import derive_path, walk_path
    from hf_effdl.structure.optim.split_lbi import SplitLBI
    from hf_effdl.structure.optim.update import split_lbi_update
    from hf_effdl.structure.path.path import SparsePath
    from hf_effdl.structure.slim.batch_norm import recalibrate_batch_norm
    from hf_effdl.structure.slim.family import choose
    from hf_effdl.structure.slim.slim import slim
    from hf_effdl.structure.tickets.rewind import rewind, transfer
    from hf_effdl.structure.tickets.search import EarlyTicketCallback, find_ticket
    from hf_effdl.structure.tickets.ticket import Ticket
    from hf_effdl.structure.training.arguments import SplitLBIArguments, scheduled_rates
    from hf_effdl.structure.training.callbacks import SplitLBICallback
    from hf_effdl.structure.training.distill import Distillation, DistillationTrainer
    from hf_effdl.structure.training.trainer import SplitLBITrainer
    from hf_effdl.vicl.auto import (
        ListwiseRanker,
        ListwiseRankerConfig,
        MaeVqganConfig,
        MaeVqganForImageInpainting,
        VisualInContextConfig,
        VisualInContextModel,
        VisualInContextPipeline,
    )
    from hf_effdl.vicl.held_out import near_duplicates, read_splits, split_pool, write_splits
    from hf_effdl.vicl.measure import measure_examples
    from hf_effdl.vicl.pool.pool import ExamplePool
    from hf_effdl.vicl.ranking.ranker_trainer import RankerTrainer
    from hf_effdl.vicl.ranking.ranking_lists import RankingLists
    from hf_effdl.vicl.remote_code.cascade import CascadeSelector
    from hf_effdl.vicl.remote_code.frozen_mae_vqgan import MaeVqganInContext
    from hf_effdl.vicl.remote_code.frozen_matching import FeatureMatching
    from hf_effdl.vicl.remote_code.frozen_painter import PainterInContext
    from hf_effdl.vicl.remote_code.frozen_sam2 import Sam2InContext
    from hf_effdl.vicl.remote_code.frozen_sam3 import Sam3InContext
    from hf_effdl.vicl.remote_code.frozen_seggpt import SegGptInContext
    from hf_effdl.vicl.remote_code.ranker_aggregation import aggregate_rankings
    from hf_effdl.vicl.remote_code.ranker_designs import covering_design, knock_out
    from hf_effdl.vicl.remote_code.ranker_losses import neural_ndcg_loss, pairwise_margin_loss
    from hf_effdl.vicl.remote_code.ranker_reliable import reliable_rows
    from hf_effdl.vicl.remote_code.ranker_selector import RankerSelector
    from hf_effdl.vicl.remote_code.vision_encoder import VisionEncoder
    from hf_effdl.weighted_sft import WeightedSFTTrainer
    from hf_effdl.weighting import WeightedTrainer


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"hf_effdl.{_HOME[name]}"), name)
    raise AttributeError(f"module 'hf_effdl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
