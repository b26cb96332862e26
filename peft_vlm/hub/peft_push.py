"""`model.push_to_hub("user/adapter")` for adapters of this package.

PEFT's own method uploads weights and configuration with a template card, "More Information Needed" throughout, which
it writes after every hook an adapter has, and keeps on the next upload. So the method itself is extended, for models
whose active adapter is of this package; all others get PEFT's.
"""

from functools import wraps
from typing import Any

from peft import PeftModel

from peft_vlm.adapters.config import VLMConfig
from peft_vlm.hub.publish import push_model


def extend_push_to_hub() -> None:
    """Extend `PeftModel.push_to_hub`, once."""
    original = PeftModel.push_to_hub
    if original.__module__ == __name__:
        return

    @wraps(original)
    def push_to_hub(self: PeftModel, repo_id: str, **options: Any) -> Any:
        if isinstance(self.active_peft_config, VLMConfig):
            return push_model(self, repo_id, **options)
        return original(self, repo_id, **options)

    push_to_hub.__module__ = __name__
    PeftModel.push_to_hub = push_to_hub
