"""A prefix in a loop of your own with Accelerate: accelerate launch examples/loops/accelerate_loop.py OUT STEPS"""

import json
import sys

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from softprompt import PrefixTuningConfig, get_peft_model, initialize_from_text
from softprompt.demo_data import TRAIN
from softprompt.embedded import PATH

out, steps = sys.argv[1], int(sys.argv[2])
accelerator = Accelerator(gradient_accumulation_steps=2)
tokenizer = AutoTokenizer.from_pretrained(PATH)
model = get_peft_model(AutoModelForCausalLM.from_pretrained(PATH), PrefixTuningConfig(num_virtual_tokens=16))
initialize_from_text(model, tokenizer, "name: Tom | kind: cat => Tom is a cat. Meet Tom, a cat that likes warm milk.")


def collate(lines: list[dict[str, str]]) -> dict[str, torch.Tensor]:
    batch = tokenizer([f"{card} => {text}{tokenizer.eos_token}" for card, text in map(dict.values, lines)],
                      padding=True, return_tensors="pt")  # fmt: skip
    return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


rows = [json.loads(line) for line in TRAIN.read_text(encoding="utf-8").splitlines()]
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(rows, 4, collate_fn=collate))  # type: ignore
for _, batch in zip(range(2 * steps), loader, strict=False):
    with accelerator.accumulate(model):
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
accelerator.save_state(f"{out}/state")  # for accelerator.load_state: the prompt and the optimiser, not the base model
whole = accelerator.unwrap_model(model)
whole.save_pretrained(f"{out}/prompt", is_main_process=accelerator.is_main_process, save_function=accelerator.save)
