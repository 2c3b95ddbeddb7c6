"""Related systems of sparse Mixture-of-Experts, a file each, on models of Transformers."""

from hf_mcsmoe.variants.auto import register
from hf_mcsmoe.variants.momentum_mcsmoe import MomentumWarmup, add_momentum, robust_constants, set_momentum
from hf_mcsmoe.variants.smoe_dropout_mcsmoe import ElasticTopK, evaluate_k_sweep, get_top_k, moefy_dense, set_top_k
from hf_mcsmoe.variants.upcycling import upcycle_dense

__all__ = [
    "ElasticTopK",
    "MomentumWarmup",
    "add_momentum",
    "evaluate_k_sweep",
    "get_top_k",
    "moefy_dense",
    "robust_constants",
    "set_momentum",
    "set_top_k",
    "upcycle_dense",
]

register()
