"""What every command needs and a reader may skip: settings, a run's folder, Hugging Face folders, costs,
devices."""

import sys


def report(kind: type, error: BaseException, traceback) -> None:
    """Ctrl-C while torch is imported, which takes seconds, ends a command without a traceback."""
    if kind is not KeyboardInterrupt:
        sys.__excepthook__(kind, error, traceback)


sys.excepthook = report
