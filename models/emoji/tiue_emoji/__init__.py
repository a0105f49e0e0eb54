"""The emoji bundle of tiue-runtime: a directory of ONNX graphs, found by the entry point `tiue_runtime.bundles`."""
