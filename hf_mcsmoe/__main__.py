"""`python -m hf_mcsmoe` is `hf-mcsmoe`."""

from hf_mcsmoe.cli import main

main()
