"""Registers the models and the pipeline with transformers' Auto classes, so that they load without remote code."""

from transformers import AutoConfig, AutoModel
from transformers.pipelines import PIPELINE_REGISTRY

from hf_effdl.vicl.remote_code.configuration_listwise_ranker import ListwiseRankerConfig
from hf_effdl.vicl.remote_code.configuration_mae_vqgan import MaeVqganConfig
from hf_effdl.vicl.remote_code.configuration_visual_in_context import VisualInContextConfig
from hf_effdl.vicl.remote_code.modeling_listwise_ranker import ListwiseRanker
from hf_effdl.vicl.remote_code.modeling_mae_vqgan import MaeVqganForImageInpainting
from hf_effdl.vicl.remote_code.modeling_visual_in_context import VisualInContextModel
from hf_effdl.vicl.remote_code.pipeline_visual_in_context import TASK, VisualInContextPipeline


AutoConfig.register(VisualInContextConfig.model_type, VisualInContextConfig)
AutoModel.register(VisualInContextConfig, VisualInContextModel)
AutoConfig.register(ListwiseRankerConfig.model_type, ListwiseRankerConfig)
AutoModel.register(ListwiseRankerConfig, ListwiseRanker)
AutoConfig.register(MaeVqganConfig.model_type, MaeVqganConfig)
AutoModel.register(MaeVqganConfig, MaeVqganForImageInpainting)
# an Auto class by name, since a file on the Hub can only name one of those
PIPELINE_REGISTRY.register_pipeline(TASK, pipeline_class=VisualInContextPipeline, pt_model=AutoModel, type="image")

__all__ = [
    "ListwiseRanker",
    "ListwiseRankerConfig",
    "MaeVqganConfig",
    "MaeVqganForImageInpainting",
    "VisualInContextConfig",
    "VisualInContextModel",
    "VisualInContextPipeline",
]
