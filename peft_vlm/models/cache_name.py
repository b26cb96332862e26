"""The name that transformers gives to the cache of keys and values."""

import inspect

from transformers.masking_utils import create_causal_mask

CACHE_NAME = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
"""Name of the argument that passes the cache to a model or a mask, and of the output that holds it: `cache` from
transformers 5.24 on, `past_key_values` before, for all architectures at once."""
