"""`python -m nemo_upcycle.cli`: what the launcher starts on each rank."""

from nemo_upcycle.cli import main

main()
