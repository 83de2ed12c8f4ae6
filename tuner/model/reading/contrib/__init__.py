"""ONNX Runtime's own operators (domain `com.microsoft`) → standard ones.

Its optimiser, its quantisers and its model builder write them; nobody else reads them, TensorRT's parser least. Each
form is written after the operator's documentation, ContribOperators.md of ONNX Runtime, and held against what ONNX
Runtime computes, wherever it has a kernel for the CPU.
"""
