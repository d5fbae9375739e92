"""What of a prompted model's `state_dict` is its own: prompts, heads, what PEFT trains in the base; nothing frozen."""

from typing import Any

from torch import nn

from softprompt.stacking import trained_in


def leave_base_out(model: nn.Module) -> None:
    """Keep what is frozen in the submodule `base_model` out of what `state_dict` gives and `load_state_dict` wants."""
    model.register_state_dict_post_hook(_leave_out_base)
    model.register_load_state_dict_post_hook(_do_not_miss_base)


def _leave_out_base(model: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """The frozen model is nobody's to save here; its tied weights and swapped heads would also be there twice."""
    own, base = f"{prefix}base_model.", model.get_submodule("base_model")
    trained = {f"{own}{name}" for name in trained_in(base)}
    for name in [name for name in state if name.startswith(own) and name not in trained]:
        del state[name]


def _do_not_miss_base(model: nn.Module, incompatible: Any) -> None:
    """Nor is it missing from what is loaded."""
    base = model.get_submodule("base_model")
    own = {f"base_model.{name}" for name in base.state_dict().keys() - trained_in(base)}
    incompatible.missing_keys[:] = [name for name in incompatible.missing_keys if name not in own]
