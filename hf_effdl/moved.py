"""Old import paths: where the modules of 0.1.0 have gone.

Scripts of then name them, and so does every `training_args.bin` that was written then. They work until 0.3, with a
warning that says the new path. A module that was cut has several homes, which are asked in turn.
"""

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


PACKAGE = "hf_effdl."
MOVED = {  # paths without the package; homes without the pillar too, as no name has left its own
    "samples.dynamics": "probes.dynamics_callback scores.dynamics",
    "samples.findings": "selection.findings",
    "samples.inputs": "probes.inputs",
    "samples.linear_probes": "probes.linear_probes",
    "samples.noise": "scores.noise",
    "samples.planning": "drawing.presets drawing.plan drawing.weights",
    "samples.plotting": "selection.pictures",
    "samples.probes": "probes.probes",
    "samples.report": "selection.report",
    "samples.sampling": "drawing.draws drawing.probabilities drawing.weights drawing.checks drawing.quotas "
    "drawing.hashing",
    "samples.scoring": "probes.scoring",
    "samples.selection": "selection.selection selection.pool selection.rows",
    "samples.selector": "selection.selector",
    "samples.shards": "drawing.shards",
    "samples.source": "selection.source",
    "samples.storage": "selection.files",
    "samples.trained_probes": "probes.trained_probes",
    "samples.uncertainty": "scores.uncertainty",
    "structure.arguments": "training.arguments",
    "structure.callbacks": "training.callbacks",
    "structure.early_ticket": "tickets.search training.start",
    "structure.evaluation": "training.evaluation",
    "structure.fused": "optim.fused_cpu",
    "structure.fused_gpu": "optim.fused_gpu",
    "structure.groups": "groups.group groups.surgery groups.param_groups groups.record",
    "structure.grow": "growing.widen growing.deepen growing.new_units",
    "structure.grow_checkpoint": "growing.checkpoint growing.optimizer_state growing.plan",
    "structure.growing": "growing.trainer",
    "structure.growing_arguments": "growing.arguments",
    "structure.growth_history": "growing.history growing.picture",
    "structure.new_units": "growing.new_units",
    "structure.param_group_checks": "optim.checks",
    "structure.path": "groups.ties path.path path.budget optim.split_lbi",
    "structure.plotting": "path.picture",
    "structure.prox": "optim.prox",
    "structure.quantizer": "groups.slim_config",
    "structure.schedule": "optim.schedule",
    "structure.settling": "path.settling",
    "structure.sharding": "optim.sharding",
    "structure.slim": "slim.report slim.slim slim.batch_norm slim.latency",
    "structure.split_lbi": "optim.split_lbi optim.plain optim.update",
    "structure.stock": "groups.ties",
    "structure.ticket_checks": "training.settled",
    "structure.ticket_files": "tickets.files",
    "structure.tickets": "tickets.rewind tickets.ticket slim.report optim.kernel",
    "structure.tracing": "groups.inputs groups.find groups.counting",
    "structure.trainer": "training.checkpoints training.trainer",
    "vicl.aggregation": "remote_code.ranker_aggregation",
    "vicl.canvas_models": "remote_code.frozen_canvas",
    "vicl.cascade": "remote_code.cascade_stages remote_code.cascade",
    "vicl.cascade_features": "remote_code.cascade_features",
    "vicl.cascade_fit": "remote_code.cascade_fit remote_code.cascade_stages",
    "vicl.cascade_head": "remote_code.cascade_head",
    "vicl.configuration_listwise_ranker": "remote_code.configuration_listwise_ranker",
    "vicl.configuration_visual_in_context": "remote_code.configuration_visual_in_context",
    "vicl.consensus": "remote_code.cascade_consensus",
    "vicl.covering_tables": "remote_code.ranker_covering_tables",
    "vicl.designs": "remote_code.ranker_designs",
    "vicl.example_panels": "remote_code.pipeline_picture",
    "vicl.example_selectors": "remote_code.strategies remote_code.examples",
    "vicl.feature_matching": "remote_code.frozen_matching",
    "vicl.in_context_cards": "remote_code.pipeline_card",
    "vicl.labels": "measure",
    "vicl.losses": "remote_code.ranker_losses",
    "vicl.measured_lists": "remote_code.cascade_lists",
    "vicl.modeling_listwise_ranker": "remote_code.modeling_listwise_ranker",
    "vicl.modeling_visual_in_context": "remote_code.modeling_visual_in_context",
    "vicl.pipeline_parts": "remote_code.pipeline_loading",
    "vicl.pipeline_visual_in_context": "remote_code.pipeline_visual_in_context remote_code.pipeline_options",
    "vicl.pool": "pool.pool",
    "vicl.pool_card": "pool.card",
    "vicl.pool_index": "pool.index",
    "vicl.pool_reader": "remote_code.pool_reader remote_code.pool_search remote_code.pool_checks",
    "vicl.pool_writer": "pool.writer pool.rows",
    "vicl.ranker_selector": "remote_code.ranker_selector",
    "vicl.ranker_trainer": "ranking.ranker_trainer",
    "vicl.ranking_lists": "ranking.ranking_lists",
    "vicl.reliable": "remote_code.ranker_reliable",
    "vicl.row_model": "remote_code.cascade_rows",
    "vicl.seggpt_in_context": "remote_code.frozen_seggpt remote_code.encoder_seggpt remote_code.images "
    "remote_code.frozen_model",
    "vicl.shortlist": "remote_code.cascade_shortlist",
    "vicl.vision_encoders": "remote_code.vision_encoder remote_code.backbones",
    "vicl.visual_tasks": "remote_code.visual_tasks remote_code.images",
}


class _Found(Loader):
    """Gives a module, or the package that has its name today, the names that have moved."""

    def __init__(self, name: str, today: ModuleSpec | None) -> None:
        self.name, self.today = name, today

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        if self.today is not None and self.today.loader is not None:
            self.today.loader.exec_module(module)
        module.__getattr__ = self.find

    def find(self, attribute: str) -> Any:
        """An attribute from the first of the homes that has it."""
        for home in () if self.is_not_old(attribute) else MOVED[self.name].split():
            place = import_module(f"{PACKAGE}{self.name.partition('.')[0]}.{home}")
            if hasattr(place, attribute):
                old, new = PACKAGE + self.name, f"{place.__name__}.{attribute}"
                warnings.warn(f"{old}.{attribute} is {new} now; 0.3 forgets the old path", FutureWarning, stacklevel=2)
                return getattr(place, attribute)
        raise AttributeError(f"module {PACKAGE + self.name!r} has no attribute {attribute!r}")

    def is_not_old(self, attribute: str) -> bool:
        """What Python asks of every module, and modules of the package of today."""
        rooms = None if self.today is None else self.today.submodule_search_locations
        is_room = rooms is not None and PathFinder.find_spec(f"{PACKAGE}{self.name}.{attribute}", rooms) is not None
        return is_room or attribute.startswith("__")


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        name = fullname.removeprefix(PACKAGE)
        if name == fullname or name not in MOVED:
            return None
        today = PathFinder.find_spec(fullname, path, target)
        if today is None:
            return ModuleSpec(fullname, _Found(name, None))
        found = ModuleSpec(fullname, _Found(name, today), origin=today.origin, is_package=True)
        found.submodule_search_locations, found.has_location = today.submodule_search_locations, True
        found.cached = today.cached
        return found


def keep_old_paths() -> None:
    """Let Python find modules by the names that they had."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]
    sys.meta_path.insert(0, _Finder())
