"""A prefix in transformers' Trainer: python examples/loops/trainer.py OUT STEPS (again: goes on where it stopped)."""

import json
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from softprompt import PrefixTuningConfig, get_peft_model, initialize_from_text
from softprompt.demo_data import HELD_OUT, TRAIN
from softprompt.embedded import PATH

out, steps = Path(sys.argv[1]), int(sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained(PATH)


def rows(path: Path, count: int) -> list[dict[str, list[int]]]:
    """Token ids and labels; −100 where the card stands, so that the loss counts the sentence only."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines()[:count]:
        card, text = json.loads(line).values()
        asked = tokenizer(f"{card} =>")["input_ids"]
        told = text if isinstance(text, str) else text[0]
        answer = tokenizer(f" {told}{tokenizer.eos_token}", add_special_tokens=False)["input_ids"]
        found.append({"input_ids": asked + answer, "labels": [-100] * len(asked) + answer})
    return found


config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=16)
model = get_peft_model(AutoModelForCausalLM.from_pretrained(PATH), config)
initialize_from_text(model, tokenizer, "name: Tom | kind: cat => Tom is a cat. Meet Tom, a cat that likes warm milk.")
arguments = TrainingArguments(
    output_dir=str(out), max_steps=steps, per_device_train_batch_size=4, gradient_accumulation_steps=2,
    learning_rate=0.05, label_smoothing_factor=0.1, logging_steps=1, eval_strategy="steps", eval_steps=0.25,
    save_steps=0.25, load_best_model_at_end=True, report_to=[],
)  # fmt: skip
data = {"train_dataset": rows(TRAIN, 200), "eval_dataset": rows(HELD_OUT, 16)}
trainer = Trainer(model, arguments, DataCollatorForSeq2Seq(tokenizer), **data)
trainer.train(resume_from_checkpoint=any(out.glob("checkpoint-*")))
model.save_pretrained(out / "prompt")  # the best; a checkpoint-N can be loaded with PeftModel.from_pretrained, too
