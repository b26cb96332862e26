"""Run an exported classifier on a server.

The files of this folder import torch, safetensors, numpy and Pillow (the ONNX runner: onnxruntime instead of torch and
safetensors) and nothing else of peft_vlm, so the folder can be copied to a machine that has neither peft_vlm nor PEFT
nor transformers. Shapes are therefore in the docstrings here, not in jaxtyping annotations.
"""
