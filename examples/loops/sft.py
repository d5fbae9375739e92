"""A soft prompt in TRL's SFTTrainer, completions only, packed: python examples/loops/sft.py OUT STEPS"""

import json
import sys

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from softprompt import PromptTuningConfig, get_peft_model, initialize_from_text
from softprompt.demo_data import TRAIN
from softprompt.embedded import PATH

out, steps = sys.argv[1], int(sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained(PATH)
lines = [json.loads(line) for line in TRAIN.read_text(encoding="utf-8").splitlines()[:64]]
rows = Dataset.from_list([{"prompt": f"{line['data']} =>", "completion": f" {line['text']}"} for line in lines])

config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=16)
model = get_peft_model(AutoModelForCausalLM.from_pretrained(PATH), config)
initialize_from_text(model, tokenizer, "name: Tom | kind: cat => Tom is a cat. Meet Tom, a cat that likes warm milk.")

for packing in (False, True):  # the same prompt trains on: first in padded rows, then in packed ones
    arguments = SFTConfig(
        output_dir=out, max_steps=steps, per_device_train_batch_size=2 if packing else 8, learning_rate=0.1,
        packing=packing, max_length=256, completion_only_loss=True, logging_steps=1, bf16=False, save_strategy="no",
        report_to="none",
    )  # fmt: skip
    trainer = SFTTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
model.save_pretrained(f"{out}/prompt")
