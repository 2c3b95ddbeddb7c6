"""Run a plain checkpoint with mlx-lm, and compare its greedy tokens with those of Transformers.

    pip install mlx-lm               # on a Mac
    pip install "mlx[cpu]" mlx-lm    # on Linux
    python examples/serving/with_mlx.py DIR

Nothing is converted: mlx-lm reads the folder.
"""

from pathlib import Path

import mlx.core as mx
from greedy import arguments, with_transformers
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model


def main() -> None:
    options = arguments(__doc__).parse_args()
    expected = with_transformers(options.model, options.prompt, options.tokens)
    model, _ = load_model(Path(options.model))
    steps = generate_step(mx.array(expected.prompt), model, max_tokens=len(expected.tokens))
    print(f"mlx: {expected.compare([int(token) for token, _ in steps])}")


if __name__ == "__main__":
    main()
