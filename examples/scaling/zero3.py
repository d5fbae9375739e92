"""DeepSpeed ZeRO-3 in transformers' Trainer: the frozen base spread over the processes, the prompt whole in each.

torchrun --nproc-per-node 2 examples/scaling/zero3.py OUT
"""

import os
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from softprompt import PromptTuningConfig, get_peft_model
from softprompt.embedded import PATH

ZERO3 = Path(__file__).with_name("zero3.json")
NAMES = ("Tom", "Anna", "Max", "Lucy")


def main(out: str, deepspeed: Path | None = ZERO3) -> None:
    # The prompt is made while the model is whole; DeepSpeed takes the model apart when training begins.
    torch.manual_seed(0)
    tokenizer, base = AutoTokenizer.from_pretrained(PATH), AutoModelForCausalLM.from_pretrained(PATH)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=8, prompt_tuning_init="SAMPLE_VOCAB")
    model = get_peft_model(base, config)
    texts = tokenizer([f"name: {name} | kind: cat => {name} is a cat." for name in NAMES], padding=True)["input_ids"]
    arguments = TrainingArguments(
        out, deepspeed=deepspeed and str(deepspeed), use_cpu=not torch.cuda.is_available(),
        per_device_train_batch_size=2 // int(os.environ.get("WORLD_SIZE", "1")), max_steps=4, learning_rate=0.05,
        lr_scheduler_type="constant", logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=[{"input_ids": ids, "labels": ids} for ids in texts])
    trainer.train()
    trainer.save_state()
    model.save_pretrained(out, is_main_process=trainer.is_world_process_zero())


if __name__ == "__main__":
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when DeepSpeed is imported
    main(sys.argv[1])
