"""What `autotune` and its subcommands do, one file per topic; `tilewright.tuner.cli` is the command itself.

Each imports what it needs when it runs: `--help` answers before Triton is loaded.
"""
