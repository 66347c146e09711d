"""``python -m edgeflex``."""

from edgeflex.cli import main

if __name__ == "__main__":
    try:
        main()
    finally:
        # CPython notes a Ctrl-C that passed through exec() of a text, as dataclasses and torch use it, and then
        # ends `python -m` by that signal whatever the exit code was. Another text clears the note.
        exec("")  # noqa: S102
