"""`python -m dpo_cli`, where the script is not on the path."""

from dpo_cli.cli import main

main()
