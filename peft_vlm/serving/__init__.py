"""What a server needs to run an exported classifier.

The files of this folder import torch, safetensors, numpy and Pillow (the ONNX runner: onnxruntime instead of torch and
safetensors) and nothing else of peft_vlm, so the folder can be copied to a machine that has neither peft_vlm nor PEFT
nor transformers. Shapes therefore stand in the docstrings here, not in jaxtyping annotations.
"""
