"""The app of `peft-vlm app`: what it shows (`compare`, `prompts`), and the page around it (`page`, with Gradio)."""
