"""`python -m advcl_hub.cli`, for launchers of several processes such as torchrun."""

from advcl_hub.cli import main

main(prog_name="advcl-hub")
