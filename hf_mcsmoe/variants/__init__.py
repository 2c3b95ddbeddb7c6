"""Related systems of sparse Mixture-of-Experts, a file each, on models of Transformers."""

from hf_mcsmoe.variants.auto import register
from hf_mcsmoe.variants.elastic_top_k import ElasticTopK, evaluate_k_sweep, get_top_k, set_top_k
from hf_mcsmoe.variants.expert_cache import ExpertCache, hobbit, lfu, lru, record_trace, simulate
from hf_mcsmoe.variants.fairseq_moe import convert_fairseq_moe
from hf_mcsmoe.variants.lory_mcsmoe import soft_merge
from hf_mcsmoe.variants.mixed_precision_mcsmoe import mix_precision, next_layer_accuracy
from hf_mcsmoe.variants.momentum_mcsmoe import MomentumWarmup, add_momentum, robust_constants, set_momentum
from hf_mcsmoe.variants.peer_mcsmoe import PEERLayer, swap_peer
from hf_mcsmoe.variants.prompt_merging import merge_for_prompt
from hf_mcsmoe.variants.similarity_routing import add_attention_routing, add_similarity_routing
from hf_mcsmoe.variants.smoe_dropout_mcsmoe import moefy_dense
from hf_mcsmoe.variants.specialization import (
    DenseMixture,
    importance_loss,
    mutual_information,
    sample_entropy,
    sample_similarity_loss,
    utilization_entropy,
)
from hf_mcsmoe.variants.upcycling import upcycle_dense

__all__ = [
    "DenseMixture",
    "ElasticTopK",
    "ExpertCache",
    "MomentumWarmup",
    "PEERLayer",
    "add_attention_routing",
    "add_momentum",
    "add_similarity_routing",
    "convert_fairseq_moe",
    "evaluate_k_sweep",
    "get_top_k",
    "hobbit",
    "importance_loss",
    "lfu",
    "lru",
    "merge_for_prompt",
    "mix_precision",
    "moefy_dense",
    "mutual_information",
    "next_layer_accuracy",
    "record_trace",
    "robust_constants",
    "sample_entropy",
    "sample_similarity_loss",
    "set_momentum",
    "set_top_k",
    "simulate",
    "soft_merge",
    "swap_peer",
    "upcycle_dense",
    "utilization_entropy",
]

register()
