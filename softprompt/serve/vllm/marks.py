"""What the API's side and the engine's side of a request with a prompt say to each other."""

import re

DIGEST, LENGTH = "softprompt", "softprompt_length"
"""Keys of a request's `kv_transfer_params`: the prompt's digest and its number of virtual tokens."""

SALT = "softprompt@"
"""What the cache salts of requests with a prompt begin with; vLLM's API refuses a salt with an "@" in it."""

_DIGEST = re.compile(r"[0-9a-f]{64}")


def is_digest(value: object) -> bool:
    """Whether it is 64 hex digits, and so can be part of a path."""
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def salt_of(digest: str, more: str | None = None) -> str:
    """The salt of the block hashes of requests with this prompt; `more` sets some of them apart from the others."""
    return f"{SALT}{digest}" if more is None else f"{SALT}{digest}@{more}"


def is_salt_of(digest: str, salt: str | None) -> bool:
    """Whether requests with this salt share cached blocks with nobody who has another prompt, or none."""
    return salt is not None and (salt == salt_of(digest) or salt.startswith(salt_of(digest, "")))
