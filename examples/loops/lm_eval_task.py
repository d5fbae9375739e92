"""lm-evaluation-harness on a prompt, with a task file of your own: python examples/loops/lm_eval_task.py OUT STEPS"""

import json
import sys
from pathlib import Path

import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from softprompt import PrefixTuningConfig, get_peft_model, initialize_from_text
from softprompt.demo_data import HELD_OUT
from softprompt.embedded import PATH

out, steps, count = Path(sys.argv[1]), int(sys.argv[2]), 16
tokenizer = AutoTokenizer.from_pretrained(PATH)
model = get_peft_model(AutoModelForCausalLM.from_pretrained(PATH), PrefixTuningConfig(num_virtual_tokens=count))
cards = [json.loads(line) for line in HELD_OUT.read_text(encoding="utf-8").splitlines()]
texts = [f"{card['data']} => {card['text'][0]}{tokenizer.eos_token}" for card in cards]
initialize_from_text(model, tokenizer, texts[-1] + texts[-2])
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
batch = tokenizer(texts[-16:-2], padding=True, return_tensors="pt")
labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
for _ in range(steps):
    model(**batch, labels=labels).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
file = out / "cards.jsonl"  # which of two sentences belongs to a card: its own, or that of another card
pairs = zip(cards[:12], cards[12:24], strict=True)
file.write_text("".join(json.dumps({"card": a["data"], "said": [a["text"][0], b["text"][0]]}) + "\n" for a, b in pairs))
task = {"task": "cards", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}}}
task |= {"output_type": "multiple_choice", "test_split": "test", "doc_to_text": "{{card}} =>", "doc_to_choice": "said"}
task |= {"doc_to_target": 0, "metric_list": [{"metric": "acc"}]}
(out / "cards.yaml").write_text(json.dumps(task))  # JSON is YAML
room = model.config.max_position_embeddings - count  # the prompt stands in front of what the harness counts
harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, max_length=room)
found = simple_evaluate(harness, tasks=[str(out / "cards.yaml")], task_manager=TaskManager(include_defaults=False))
print(found["results"]["cards"])
