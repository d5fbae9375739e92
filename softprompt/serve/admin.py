"""HTTP routes to look at the library and, with the admin key, to load and unload prompts."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from softprompt.serve.library import PromptLibrary

if TYPE_CHECKING:
    from fastapi import APIRouter, Request


def admin_router(
    library: PromptLibrary,
    admin_key: str | None,
    may_see: "Callable[[Request, str], bool] | None" = None,
) -> "APIRouter":
    """GET /v1/prompts, POST /v1/prompts/load and /unload (`{"name": …}`), GET /v1/prompts/{name}/nearest.

    `may_see` says which names a request may know of (None: all). Without an `admin_key` nobody loads or unloads.
    Errors are `{"error": {"message", "type", "param", "code"}}`.
    """
    raise NotImplementedError
