"""Merge the experts of any Mixture-of-Experts model of Transformers (M-SMoE)."""

from transformers import AutoConfig

from hf_mcsmoe.adapters import MoELayer, moe_layers
from hf_mcsmoe.calibration import collect_statistics
from hf_mcsmoe.compress import compress, merge_experts
from hf_mcsmoe.config import LoSparseConfig, MergeConfig
from hf_mcsmoe.decompose import compact, decompose_experts
from hf_mcsmoe.distillation import (
    DistillationArguments,
    DistillationSeq2SeqArguments,
    DistillationSeq2SeqTrainer,
    DistillationTrainer,
    store_teacher_outputs,
)
from hf_mcsmoe.layer_repair import RepairConfig
from hf_mcsmoe.low_rank.linear import LoSparseLinear
from hf_mcsmoe.modeling.auto import RegisteredConfig
from hf_mcsmoe.modeling.modeling_mcsmoe import MergedSwitchSparseMLP
from hf_mcsmoe.plan import MergePlan, plan_merge
from hf_mcsmoe.repair import repair_experts
from hf_mcsmoe.sparsification import SparsificationCallback
from hf_mcsmoe.statistics import RoutingStatistics

__all__ = [
    "DistillationArguments",
    "DistillationSeq2SeqArguments",
    "DistillationSeq2SeqTrainer",
    "DistillationTrainer",
    "LoSparseConfig",
    "LoSparseLinear",
    "MergeConfig",
    "MergePlan",
    "MergedSwitchSparseMLP",
    "MoELayer",
    "RepairConfig",
    "RoutingStatistics",
    "SparsificationCallback",
    "collect_statistics",
    "compact",
    "compress",
    "decompose_experts",
    "merge_experts",
    "moe_layers",
    "plan_merge",
    "repair_experts",
    "store_teacher_outputs",
]

AutoConfig.register("mcsmoe", RegisteredConfig, exist_ok=True)
