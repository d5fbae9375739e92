"""Attention with a prefix that rows share: one copy of its keys and values, whatever the batch.

A row's own keys and the prefix go through the kernel separately, the prefix with all its rows' queries at once, and the
two results are merged by their log-sum-exp. Nothing is concatenated and no mask is made wider.
"""

from softprompt.attention.groups import Group, groups_of
from softprompt.attention.shared import Prefix, attend

__all__ = ["Group", "Prefix", "attend", "groups_of"]
