"""The exporter: from a student, or a diffusers pipeline, to an ONNX bundle that computes the same.

    onnx                  the command line; export_options: its settings
    source                reads the model
    assemble              the stages of an export, in order, with the modules that each uses:
      plan                  plan: targets, files, manifest
      trace, trace_text     trace; translate: operators that PyTorch does not translate well
      cuda, int8, storage   rewrite; calibrate: the ranges of activations that int8 needs
      writer                write
      parity                check; parity_case: one size; execution, cuda_definitions: how graphs run here
      publish               move the finished directory into place
    working_memory        measures and fits the memory of runs
    fit_preview, card     the preview matrix and README.md of a bundle

A rewriter takes a graph, changes it in place, and returns the number of its changes.

The folder has a module named onnx, so it must never be on sys.path itself: start `python -m export.onnx` above it.
"""

# Before other libraries are imported, it tells them not to use the network.
import tiue as tiue
