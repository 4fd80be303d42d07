"""`python -m rl.cli`, as launchers start it on every rank."""

from rl.cli import main

main()
