"""Pure tensor functions of the objectives: one idea per file, with paper, shapes and reduction."""
