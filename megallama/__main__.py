"""`python -m megallama`: what `megallama` is, where its folder of commands is not on PATH."""

from megallama.cli import main

main()
