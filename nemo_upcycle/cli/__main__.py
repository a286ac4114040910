"""`python -m nemo_upcycle.cli`: the command that the launcher starts on each rank."""

from nemo_upcycle.cli import main

if __name__ == "__main__":  # processes that Megatron spawns for saving import this module too
    main()
