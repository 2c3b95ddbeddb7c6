"""Experts with a norm behind each of them: what their outputs cannot be fitted to."""

import pytest
from families import build

from hf_mcsmoe import MergeConfig, QuantizationConfig, RepairConfig
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.options import check_options


@pytest.mark.parametrize(
    ("reduce", "method", "bits", "message"),
    [
        ("prune", "refit", None, "choose 'none' or 'local'"),
        ("prune", "joint", None, "choose 'none' or 'local'"),
        ("prune", "local", 4, "choose 'none', or 'local' without few bits"),
        ("merge", "joint", None, "choose the repair 'refit'"),
    ],
)
def test_what_cannot_be_fitted_behind_a_norm_is_refused_before_any_forward(
    reduce: str, method: str, bits: int | None, message: str
) -> None:
    model = build("muse_spark")
    given = {"repair": RepairConfig(method=method), "quantization": QuantizationConfig(bits=bits) if bits else None}
    layers = Layers.of(model)
    with pytest.raises(ValueError, match=message):
        check_options(layers, MergeConfig(experts=0.75, reduce=reduce), low_rank=None, **given)
