"""The maths of merging: arrays and floats only, no names, no files, no threads.

`inner` has the inner products of two tensors, their angle and the two weights that follow (SLERP, linear); `steps`
defines every other method: passes over the tensors, then a combine. `registry` lists all methods.
"""
