"""The emoji bundle of tiue-runtime: a directory of ONNX graphs. The entry point `tiue_runtime.bundles` names it."""
