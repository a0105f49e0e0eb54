"""The exporter: from a student, or a diffusers pipeline, to an ONNX bundle that computes the same.

    onnx                  the command line; export_options: its settings
    source                reads the model
    assemble              the stages of an export, in order, with the modules that each uses:
      plan                  plan: targets, files, manifest
      trace, trace_text     trace the halves that tiue.hoist makes; translate: operators that PyTorch translates badly;
                            cuda: rewrites each graph of the cuda target
      int8, storage         rewrite for smaller weights; calibrate: the ranges of activations that int8 needs
      writer                write
      fit_preview           fit the preview matrix
      parity                check; parity_case: one size; execution, cuda_definitions: how graphs run here
      working_memory        measure and fit the memory of runs
      triton, triton_model  a model repository for Triton Inference Server, and the Python model in it
      card, publish         write README.md, and move the finished directory into place
    errors, quiet         exceptions; libraries that print too much

A rewriter takes a graph, changes it in place, and returns the number of its changes.

The folder has a module named onnx, so it must never be on sys.path itself: start `python -m export.onnx` above it.
"""

# Importing tiue first keeps other libraries off the network.
import tiue as tiue
