"""`python -m rlhf_env` is `rlhf-env`."""

from rlhf_env.cli import main

main()
