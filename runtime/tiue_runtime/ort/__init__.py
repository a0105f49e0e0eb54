"""ONNX Runtime: the only folder that imports it.

devices       the kinds of devices, as data: providers, options, policies
placement     where a bundle's graphs run: device, variant, precision and settings, decided once
sessions      ONNX Runtime's sessions, and the proof that a device was granted
graph         one loaded graph: named arrays in, named arrays out
cuda_graphs   kernels that are recorded once per shape and replayed
engines       the directories in which TensorRT keeps what it compiles
"""
