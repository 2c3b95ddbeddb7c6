"""`python -m hf_mcsmoe.cli` is `hf-mcsmoe`."""

from hf_mcsmoe.cli import main

main()
