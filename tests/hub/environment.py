"""Points the hub libraries at this computer; they read their settings when they are imported, so this comes first.

Nothing listens at the address until `tests/hub` starts its server there: a request that a test makes by mistake is
refused at once and leaves the computer never.
"""

import atexit
import os
import shutil
import socket
import tempfile

#: Bound, not yet listening; the server of `tests/hub/conftest.py` takes it over.
LISTENER = socket.socket()
LISTENER.bind(("127.0.0.1", 0))
atexit.register(LISTENER.close)

CACHE = tempfile.mkdtemp(prefix="hub-cache-")
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)

os.environ |= {
    "HF_ENDPOINT": "http://{}:{}".format(*LISTENER.getsockname()),
    "HF_HUB_CACHE": CACHE,
    "HF_TOKEN_PATH": f"{CACHE}/no-token",
    "HF_HUB_DISABLE_XET": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.pop("HF_TOKEN", None)
