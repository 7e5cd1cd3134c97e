"""What every command needs and a reader may skip: settings, a run's folder, Hugging Face folders, costs,
devices."""

import os
import sys


def report(kind: type, error: BaseException, traceback) -> None:
    """Ctrl-C while torch is imported, which takes seconds, ends a command without a traceback."""
    if kind is not KeyboardInterrupt:
        sys.__excepthook__(kind, error, traceback)


sys.excepthook = report
try:  # torch makes this folder while it is imported, also where nothing is to be compiled
    os.makedirs(os.environ.get("TORCHINDUCTOR_CACHE_DIR", "."), exist_ok=True)
except OSError as e:
    print(f"TORCHINDUCTOR_CACHE_DIR cannot be used ({e}), so torch takes another", file=sys.stderr)
    del os.environ["TORCHINDUCTOR_CACHE_DIR"]
