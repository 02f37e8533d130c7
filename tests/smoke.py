"""Run the README's Python with the package that is installed; for `.ci/wheels`. Arguments: README, the environment."""

import re
import sys
from pathlib import Path

import torch

import pc_triton

readme, environment = sys.argv[1:]
assert Path(pc_triton.__file__).is_relative_to(environment), f"{pc_triton.__file__}: not the one installed"
print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, pc_triton {pc_triton.__version__}")
for block in re.findall(r"^```python\n(?s:(.*?))^```", Path(readme).read_text(encoding="utf-8"), re.MULTILINE):
    exec(block)
