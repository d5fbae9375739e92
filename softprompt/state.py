"""What of a prompted model's `state_dict` is its own: prompts and heads, never the base model."""

from typing import Any

from torch import nn


def leave_base_out(model: nn.Module) -> None:
    """Keep the submodule `base_model` out of what `state_dict` gives and `load_state_dict` wants."""
    model.register_state_dict_post_hook(_leave_out_base)
    model.register_load_state_dict_post_hook(_do_not_miss_base)


def _leave_out_base(model: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """The frozen model is nobody's to save here; its tied weights and swapped heads would also be there twice."""
    for name in [name for name in state if name.startswith(f"{prefix}base_model.")]:
        del state[name]


def _do_not_miss_base(model: nn.Module, incompatible: Any) -> None:
    """Nor is it missing from what is loaded."""
    own = {f"base_model.{name}" for name in model.get_submodule("base_model").state_dict()}
    incompatible.missing_keys[:] = [name for name in incompatible.missing_keys if name not in own]
