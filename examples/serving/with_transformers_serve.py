"""Serve a checkpoint with `transformers serve`, ask it one question over HTTP, and stop it.

    pip install "transformers[serving]"
    python examples/serving/with_transformers_serve.py DIR

The chat template is that of the folder's tokenizer. The checkpoint has to be plain: code beside the
weights is not served.
"""

import json
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

from greedy import arguments


def ask(address: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """Send a request to a server, and return its answer."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)


def wait(address: str, server: subprocess.Popen[bytes]) -> None:
    """Wait until a server answers."""
    while server.poll() is None:
        try:
            ask(f"{address}/health")
            return
        except OSError:
            time.sleep(0.5)
    raise SystemExit(f"transformers serve ended with status {server.returncode}")


def check_plain(folder: Path) -> None:
    """Stop where a folder's model has a class of its own, which Transformers 5.23 does not serve."""
    config = folder / "config.json"
    if config.is_file() and "auto_map" in json.loads(config.read_text(encoding="utf-8")):
        raise SystemExit(
            f"{folder} has code of its own, which is not served: hf-mcsmoe export {folder} --output PLAIN"
        )


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    check_plain(Path(options.model))
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", options.model]
    command += ["--port", str(options.port)]
    address = f"http://localhost:{options.port}"
    server = subprocess.Popen(command)
    try:
        wait(address, server)
        body = {"model": options.model, "max_tokens": options.tokens, "temperature": 0}
        chat = ask(
            f"{address}/v1/chat/completions", body | {"messages": [{"role": "user", "content": options.prompt}]}
        )
        print(chat["choices"][0]["message"]["content"])
    finally:
        server.terminate()
        server.wait(30)


if __name__ == "__main__":
    main()
