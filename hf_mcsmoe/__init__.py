"""Merge the experts of any Mixture-of-Experts model of Transformers (M-SMoE)."""

from importlib.metadata import version

from transformers import AutoConfig

import hf_mcsmoe.variants  # noqa: F401  (whose folders load from here on)
from hf_mcsmoe.calibration.collect import collect_statistics
from hf_mcsmoe.calibration.statistics import RoutingStatistics
from hf_mcsmoe.compress import compress
from hf_mcsmoe.distillation import (
    DistillationArguments,
    DistillationSeq2SeqArguments,
    DistillationSeq2SeqTrainer,
    DistillationTrainer,
    MCSMoEDistillationTrainer,
    store_teacher_outputs,
)
from hf_mcsmoe.distillation.expert_pruning import ExpertPruningCallback
from hf_mcsmoe.distillation.pruned_students import prepare_pruning
from hf_mcsmoe.layers.find import moe_layers
from hf_mcsmoe.layers.finite import check_weights
from hf_mcsmoe.layers.layer import MoELayer
from hf_mcsmoe.layers.lora import lora_targets
from hf_mcsmoe.low_rank.config import LoSparseConfig
from hf_mcsmoe.low_rank.decompose import compact, decompose_experts
from hf_mcsmoe.low_rank.linear import LoSparseLinear
from hf_mcsmoe.low_rank.pruning import SparsificationCallback
from hf_mcsmoe.merge import merge_experts
from hf_mcsmoe.methods.config import MergeConfig
from hf_mcsmoe.modeling.auto import RegisteredConfig
from hf_mcsmoe.modeling.modeling_mcsmoe import MergedSwitchSparseMLP
from hf_mcsmoe.plan import MergePlan
from hf_mcsmoe.planning import plan_merge
from hf_mcsmoe.processes import together
from hf_mcsmoe.quantization.config import QuantizationConfig
from hf_mcsmoe.quantization.quantize import quantize_experts
from hf_mcsmoe.repair.methods import RepairConfig
from hf_mcsmoe.repair.repair import repair_experts
from hf_mcsmoe.search.config import SizeConfig
from hf_mcsmoe.sparsity.config import SparsityConfig
from hf_mcsmoe.sparsity.sparsify import sparsify_experts
from hf_mcsmoe.streamed.compress import compress_folder
from hf_mcsmoe.streamed.config import StreamConfig

__all__ = [
    "DistillationArguments",
    "DistillationSeq2SeqArguments",
    "DistillationSeq2SeqTrainer",
    "DistillationTrainer",
    "ExpertPruningCallback",
    "LoSparseConfig",
    "LoSparseLinear",
    "MCSMoEDistillationTrainer",
    "MergeConfig",
    "MergePlan",
    "MergedSwitchSparseMLP",
    "MoELayer",
    "QuantizationConfig",
    "RepairConfig",
    "RoutingStatistics",
    "SizeConfig",
    "SparsificationCallback",
    "SparsityConfig",
    "StreamConfig",
    "check_weights",
    "collect_statistics",
    "compact",
    "compress",
    "compress_folder",
    "decompose_experts",
    "lora_targets",
    "merge_experts",
    "moe_layers",
    "plan_merge",
    "prepare_pruning",
    "quantize_experts",
    "repair_experts",
    "sparsify_experts",
    "store_teacher_outputs",
    "together",
]

__version__ = version("hf_mcsmoe")

AutoConfig.register("mcsmoe", RegisteredConfig, exist_ok=True)
