"""Run a plain checkpoint with mlx-lm, and compare its greedy tokens with those of Transformers.

    pip install mlx-lm          # on a Mac
    pip install "mlx[cpu]" mlx-lm    # on Linux
    python examples/serving/with_mlx.py DIR

Nothing is converted: mlx-lm reads the folder. It knows the base and the count of experts by the names that
Transformers 4 wrote into `config.json`; where only those of Transformers 5 are there, they are handed over.
"""

from pathlib import Path

import mlx.core as mx
from greedy import arguments, with_transformers
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model
from transformers import AutoConfig, PreTrainedConfig


def older_names(config: PreTrainedConfig) -> dict[str, float]:
    """Return what mlx-lm looks for beside what Transformers 5 writes."""
    parameters = config.rope_parameters or {}
    names = {"rope_theta": parameters.get("rope_theta"), "num_experts": config.to_dict().get("num_local_experts")}
    return {name: value for name, value in names.items() if value is not None}


def main() -> None:
    options = arguments(__doc__).parse_args()
    expected = with_transformers(options.model, options.prompt, options.tokens)
    model, _ = load_model(Path(options.model), model_config=older_names(AutoConfig.from_pretrained(options.model)))
    steps = generate_step(mx.array(expected.prompt), model, max_tokens=len(expected.tokens))
    print(f"mlx: {expected.compare([int(token) for token, _ in steps])}")


if __name__ == "__main__":
    main()
