"""Smaller models, less data and better prompts on the Hugging Face stack."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# registers how a slim model is loaded, so that from_pretrained needs this import and nothing else
from hf_effdl.structure import quantizer as _quantizer  # noqa: F401


__version__ = "0.1.0"

_PUBLIC = {
    "samples.dynamics": ["DynamicsCallback", "dynamics_scores", "load_dynamics"],
    "samples.linear_probes": ["LinearProbes"],
    "samples.noise": ["fit_label_noise", "noise_rate"],
    "samples.planning": ["Plan", "active_plan", "default_plan", "make_plan", "paper_plan"],
    "samples.probes": ["Probes"],
    "samples.sampling": ["PrioritySampler", "draw", "inclusion_probabilities", "priority_sample"],
    "samples.selection": ["Selection", "load_selection"],
    "samples.selector": ["UncertaintySelector"],
    "samples.shards": ["plan_shards"],
    "samples.trained_probes": ["train_probes"],
    "samples.uncertainty": ["uncertainty"],
    "structure.arguments": ["SplitLBIArguments", "scheduled_rates"],
    "structure.callbacks": ["SplitLBICallback"],
    "structure.early_ticket": ["EarlyTicketCallback", "find_ticket"],
    "structure.groups": ["Group", "param_groups"],
    "structure.grow": ["deepen", "widen"],
    "structure.growing": ["GrowingArguments", "GrowingTrainer", "GrowthCallback"],
    "structure.path": ["SparsePath"],
    "structure.slim": ["recalibrate_batch_norm", "slim"],
    "structure.schedule": ["derive_path"],
    "structure.split_lbi": ["SplitLBI", "split_lbi_update"],
    "structure.tickets": ["Ticket", "rewind", "transfer"],
    "structure.tracing": ["find_groups"],
    "structure.trainer": ["SplitLBITrainer"],
    "vicl.aggregation": ["aggregate_rankings"],
    "vicl.auto": [
        "ListwiseRanker",
        "ListwiseRankerConfig",
        "VisualInContextConfig",
        "VisualInContextModel",
        "VisualInContextPipeline",
    ],
    "vicl.cascade": ["CascadeSelector"],
    "vicl.designs": ["covering_design", "knock_out"],
    "vicl.feature_matching": ["FeatureMatching"],
    "vicl.held_out": ["near_duplicates", "read_splits", "split_pool", "write_splits"],
    "vicl.labels": ["measure_examples"],
    "vicl.losses": ["neural_ndcg_loss", "pairwise_margin_loss"],
    "vicl.pool": ["ExamplePool"],
    "vicl.ranker_selector": ["RankerSelector"],
    "vicl.ranker_trainer": ["RankerTrainer"],
    "vicl.ranking_lists": ["RankingLists"],
    "vicl.reliable": ["reliable_rows"],
    "vicl.seggpt_in_context": ["SegGptInContext"],
    "vicl.vision_encoders": ["VisionEncoder"],
    "weighting": ["WeightedTrainer"],
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = [*sorted(_HOME), "__version__"]

if TYPE_CHECKING:
    from hf_effdl.samples.dynamics import DynamicsCallback, dynamics_scores, load_dynamics
    from hf_effdl.samples.linear_probes import LinearProbes
    from hf_effdl.samples.noise import fit_label_noise, noise_rate
    from hf_effdl.samples.planning import Plan, active_plan, default_plan, make_plan, paper_plan
    from hf_effdl.samples.probes import Probes
    from hf_effdl.samples.sampling import PrioritySampler, draw, inclusion_probabilities, priority_sample
    from hf_effdl.samples.selection import Selection, load_selection
    from hf_effdl.samples.selector import UncertaintySelector
    from hf_effdl.samples.shards import plan_shards
    from hf_effdl.samples.trained_probes import train_probes
    from hf_effdl.samples.uncertainty import uncertainty
    from hf_effdl.structure.arguments import SplitLBIArguments, scheduled_rates
    from hf_effdl.structure.callbacks import SplitLBICallback
    from hf_effdl.structure.early_ticket import EarlyTicketCallback, find_ticket
    from hf_effdl.structure.groups import Group, param_groups
    from hf_effdl.structure.grow import deepen, widen
    from hf_effdl.structure.growing import GrowingArguments, GrowingTrainer, GrowthCallback
    from hf_effdl.structure.path import SparsePath
    from hf_effdl.structure.schedule import derive_path
    from hf_effdl.structure.slim import recalibrate_batch_norm, slim
    from hf_effdl.structure.split_lbi import SplitLBI, split_lbi_update
    from hf_effdl.structure.tickets import Ticket, rewind, transfer
    from hf_effdl.structure.tracing import find_groups
    from hf_effdl.structure.trainer import SplitLBITrainer
    from hf_effdl.vicl.aggregation import aggregate_rankings
    from hf_effdl.vicl.auto import (
        ListwiseRanker,
        ListwiseRankerConfig,
        VisualInContextConfig,
        VisualInContextModel,
        VisualInContextPipeline,
    )
    from hf_effdl.vicl.cascade import CascadeSelector
    from hf_effdl.vicl.designs import covering_design, knock_out
    from hf_effdl.vicl.feature_matching import FeatureMatching
    from hf_effdl.vicl.held_out import near_duplicates, read_splits, split_pool, write_splits
    from hf_effdl.vicl.labels import measure_examples
    from hf_effdl.vicl.losses import neural_ndcg_loss, pairwise_margin_loss
    from hf_effdl.vicl.pool import ExamplePool
    from hf_effdl.vicl.ranker_selector import RankerSelector
    from hf_effdl.vicl.ranker_trainer import RankerTrainer
    from hf_effdl.vicl.ranking_lists import RankingLists
    from hf_effdl.vicl.reliable import reliable_rows
    from hf_effdl.vicl.seggpt_in_context import SegGptInContext
    from hf_effdl.vicl.vision_encoders import VisionEncoder
    from hf_effdl.weighting import WeightedTrainer


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"hf_effdl.{_HOME[name]}"), name)
    raise AttributeError(f"module 'hf_effdl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
