"""Imported once by the process that the killed ones are forked from: what each of them would spend its time on.

It computes nothing with torch, whose threads would not survive a fork.
"""

import contextlib
import importlib

for _name in (
    "pytest", "pydantic.type_adapter", "torch.profiler", "jinja2.ext", "typer", "softprompt.cli.output",
    "softprompt.train.finish", "transformers.generation.utils", "transformers.models.llama.modeling_llama",
):  # fmt: skip
    importlib.import_module(_name)

with contextlib.suppress(ImportError):  # half a second of regular expressions, for the first model a process loads
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    get_checkpoint_conversion_mapping("llama")
