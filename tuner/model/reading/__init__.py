"""Reading an ONNX file that may be anything, into a model whose shapes are all known."""
