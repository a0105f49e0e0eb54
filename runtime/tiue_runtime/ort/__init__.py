"""ONNX Runtime. No other folder of this package imports it.

devices       the kinds of devices, as data: providers, options, policies
placement     where a bundle's graphs run: device, variant, precision and settings, decided and proven once
sessions      ONNX Runtime's sessions, and the check that each runs on the requested device
graph         one loaded graph: named arrays in, named arrays out
interrupt     native calls that Ctrl-C, a cancel function and a deadline can reach
cuda_graphs   kernels that are recorded once per shape and replayed
engines       the directories of files that TensorRT compiles
"""
