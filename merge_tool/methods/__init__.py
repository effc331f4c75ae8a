"""The maths of merging: arrays and floats only, no names, no files, no threads.

`pair` has SLERP and linear interpolation of two tensors; `steps` says what any other method is made of.
"""

from merge_tool.methods.pair import *  # noqa: F403
