"""Publishing adapters with cards made from facts."""

from peft_vlm.hub.adapter_folder import AdapterFolder
from peft_vlm.hub.card import render_card, write_card
from peft_vlm.hub.publish import Published, extend_load_adapter, extend_push_to_hub, publish, write_folder

extend_push_to_hub()
extend_load_adapter()

__all__ = ["AdapterFolder", "Published", "publish", "render_card", "write_card", "write_folder"]
