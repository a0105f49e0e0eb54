"""Make one picture with the default model: python examples/picture.py "a red heart"."""

import sys

from tiue_runtime import generate

prompt = sys.argv[1] if len(sys.argv) > 1 else "a red heart"
generate(prompt, seed=1)[0].save("picture.png")
print("picture.png")
