"""A prefix in a plain PyTorch loop, with a learning rate that falls: python examples/loops/plain_loop.py OUT STEPS"""

import json
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from softprompt import PeftModel, PrefixTuningConfig, get_peft_model, initialize_from_text
from softprompt.demo_data import TRAIN
from softprompt.embedded import PATH

out, steps = sys.argv[1], int(sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained(PATH)
model = get_peft_model(AutoModelForCausalLM.from_pretrained(PATH), PrefixTuningConfig(num_virtual_tokens=16))
initialize_from_text(model, tokenizer, "name: Tom | kind: cat => Tom is a cat. Meet Tom, a cat that likes warm milk.")
lines = [json.loads(line) for line in TRAIN.read_text(encoding="utf-8").splitlines()]
texts = [f"{line['data']} => {line['text']}{tokenizer.eos_token}" for line in lines]

optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
losses = []
for step in range(steps):
    batch = tokenizer(texts[8 * step % 512 :][:8], padding=True, return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    loss = model(**batch, labels=labels).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()
    losses.append(loss.item())
model.save_pretrained(f"{out}/prompt")

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(PATH), f"{out}/prompt")
inputs = tokenizer("name: Milo | kind: duck | colour: white =>", return_tensors="pt")
print(losses[0], losses[-1], tokenizer.decode(model.generate(**inputs, max_new_tokens=16)[0]))
