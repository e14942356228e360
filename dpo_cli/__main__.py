"""The entry point of `nothing-dpo`, and `python -m dpo_cli` where the script is not on the path."""

import gc


def main() -> None:
    """Load the commands, and run the one that was typed.

    Nothing that imports make is garbage; looking for some takes a tenth of the start.
    """
    gc.disable()
    from dpo_cli import errors
    from dpo_cli.cli import main as run

    gc.freeze()
    gc.enable()
    errors.one_command = True
    run()


if __name__ == "__main__":
    main()
