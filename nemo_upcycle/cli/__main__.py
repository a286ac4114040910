"""`python -m nemo_upcycle.cli`: the command that the launcher starts on each rank."""

from nemo_upcycle.cli import main

main()
