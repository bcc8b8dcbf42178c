"""Graphs as ONNX files, run by onnxruntime."""
