"""Other methods of distillation, on the loop of `tiue.distill`, so that the method of the paper can be compared fairly.

    lcm           consistency distillation (arXiv 2310.04378)
    add           adversarial and score distillation, as in SD-Turbo (arXiv 2311.17042)
    swiftbrush    one-step variational score distillation (arXiv 2312.05239)
    swiftbrushv2  the same from an adversarial student, with a clamped CLIP loss, and two students merged (2408.14176)

Each method is one file. Its docstring has the equations of its paper, in the symbols of docs/method.md.
"""
