"""`python -m revq`: what `torchrun -m revq` runs."""

from .cli import main

main()
