"""The Hugging Face hub: whether it answers, and keeping the libraries from asking it in vain."""

from __future__ import annotations

import os
import urllib.error
import urllib.request

OFFLINE_SWITCHES = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
TIMEOUT_S = 5.0


def is_reachable() -> bool:
    """One quick question, since the hub's client asks for half a minute before it gives up."""
    if any(os.environ.get(name, "0") not in ("", "0") for name in OFFLINE_SWITCHES):
        return False
    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        with urllib.request.urlopen(
            urllib.request.Request(address, method="HEAD"), timeout=TIMEOUT_S
        ):
            return True
    except urllib.error.HTTPError:
        return True  # it answered
    except OSError:
        return False


def set_offline(offline: bool) -> None:
    """Let datasets and the hub's client do with what is on this machine, or not.

    They read OFFLINE_SWITCHES when they are imported, which may be long past. Even a local file is
    reported to the hub otherwise, for its count of downloads.
    """
    import datasets.config

    datasets.config.HF_HUB_OFFLINE = offline
    datasets.config.constants.HF_HUB_OFFLINE = offline
    if offline:
        # For metrics, whose library is imported when one is needed.
        os.environ.setdefault("HF_EVALUATE_OFFLINE", "1")
