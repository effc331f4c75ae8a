"""The one error that a user of `train` can cause, and how to install what is missing; imports nothing.

A message says what was found, what was expected and what to do next, in sentences. The command prints it as
`Error: ...` and exits with 1. Any other exception is a bug of ours and may show its traceback.
"""


class TrainError(Exception):
    """Something the user can repair: a config, a data set, a folder, a device."""


def install(extra: str) -> str:
    """The command that installs an extra. Not the package's name: it is on no registry.

    >>> install("train")
    "pip install '.[train]' in slerp-merge's folder (a checkout)"
    """
    return f"pip install '.[{extra}]' in slerp-merge's folder (a checkout)"


DELETE_CHECKPOINT = "Delete this folder to go on from the checkpoint before it, or set another `output` to start anew."
