"""Compressed models of fairseq's layout: brings together the code of both. This file travels with their checkpoints.

`auto_map` names it, since a process without the package copies what the named file imports.
"""

from typing import Any

from hf_mcsmoe.modeling.generated_mcsmoe import build_on
from hf_mcsmoe.modeling.modeling_mcsmoe import generated_class
from hf_mcsmoe.variants.fairseq_moe_mcsmoe import FairseqMoeModel
from hf_mcsmoe.variants.variant_experts_mcsmoe import VariantExperts

build_on(FairseqMoeModel, VariantExperts)


def __getattr__(name: str) -> type[Any]:
    return generated_class(name)
