"""The one error a user of `train` can cause; imports nothing.

A message names what was found, what was expected and the next step. The command prints it as
`Error: ...` and exits with 1; any other exception is our bug and may show its traceback.
"""


class TrainError(Exception):
    """Something the user can repair: a config, a data set, a folder, a device."""


DELETE_CHECKPOINT = "Delete this folder to go on from the checkpoint before it, or set another `output` to start anew."
