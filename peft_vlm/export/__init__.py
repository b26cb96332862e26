"""A prompted classifier with fixed classes as an ordinary image classifier: plain torch, torch.export, ONNX."""

from peft_vlm.export.classifier import (
    FORMATS,
    export_classifier,
    plain_classifier,
    save_onnx,
    save_program,
    write_export,
)

__all__ = ["FORMATS", "export_classifier", "plain_classifier", "save_onnx", "save_program", "write_export"]
