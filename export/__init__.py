"""From a student, or a diffusers pipeline, to an ONNX bundle that is shown to compute the same."""

# Before other libraries are imported, it tells them not to use the network.
import tiue as tiue
