"""From a student, or a diffusers pipeline, to an ONNX bundle that is shown to compute the same."""
