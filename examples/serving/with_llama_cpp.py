"""Convert a plain checkpoint for llama.cpp, and compare its greedy tokens with those of Transformers.

    pip install llama-cpp-python gguf sentencepiece
    pip download --no-deps --no-binary llama-cpp-python llama-cpp-python  # its source has the converter
    tar xf llama_cpp_python-*.tar.gz
    python examples/serving/with_llama_cpp.py DIR --converter llama_cpp_python-*/vendor/llama.cpp

The converter knows how published models split text. A tokenizer of one's own it refuses ("BPE pre-tokenizer was not
recognized"), unless `--pre` says by the name of which one it goes: gpt-2 for the `ByteLevel` of Tokenizers.
"""

import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

from greedy import Greedy, arguments, with_transformers
from llama_cpp import Llama

CONVERT = """
import runpy, sys
from conversion.base import TextModel
if name := sys.argv.pop(1):
    TextModel.get_vocab_base_pre = lambda model, tokenizer: name
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


def convert(folder: str, converter: Path, kind: str, output: Path, pre: str) -> None:
    """Write a checkpoint as one GGUF file, in f32, f16, bf16 or q8_0."""
    places = os.pathsep.join([str(converter), str(converter / "gguf-py"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", CONVERT, pre, str(converter / "convert_hf_to_gguf.py"), folder]
    command += ["--outtype", kind, "--outfile", str(output)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": places}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"The converter stopped with: {done.stderr.strip().splitlines()[-1]}")


def run(file: Path, prompt: str, expected: Greedy) -> str:
    """Generate with llama.cpp, and say how that compares with Transformers."""
    model = Llama(str(file), n_ctx=len(expected.prompt) + len(expected.tokens) + 1, verbose=False)
    ids = model.tokenize(prompt.encode(), special=True)
    text = "split alike" if ids == expected.prompt else f"split into {len(ids)} tokens, not {len(expected.prompt)}"
    found = list(islice(model.generate(expected.prompt, temp=0.0), len(expected.tokens)))
    return f"{file.stat().st_size:,} bytes, prompt {text}, {expected.compare(found)}"


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--converter", type=Path, required=True, help="folder of llama.cpp's source")
    parser.add_argument("--types", nargs="+", default=["f16", "q8_0"], help="default: f16 q8_0")
    parser.add_argument("--pre", default="", help="llama.cpp's name for the pre-tokenizer, if it does not know it")
    parser.add_argument("--output", type=Path, default=Path(), help="folder for the files (default: this one)")
    options = parser.parse_args()
    expected = with_transformers(options.model, options.prompt, options.tokens)
    for kind in options.types:
        file = options.output / f"{Path(options.model).resolve().name}-{kind}.gguf"
        convert(options.model, options.converter, kind, file, options.pre)
        print(f"{kind}: {run(file, options.prompt, expected)}")


if __name__ == "__main__":
    main()
