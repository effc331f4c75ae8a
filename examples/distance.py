"""A judge for `merge-tool sweep`, in the place of a real evaluation: how far models are from two others.

distance.py BASE FT MODEL... prints two `name value` lines for each model, in order. Needs no torch.
"""

import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

base, ft, *models = [load_file(next(Path(folder).glob("*.safetensors"))) for folder in sys.argv[1:]]
for model in models:
    for name, other in (("base_error", base), ("ft_error", ft)):
        gaps = [np.linalg.norm(model[key].astype(float) - other[key].astype(float)) for key in model]
        print(name, f"{np.linalg.norm(gaps):.4f}")
