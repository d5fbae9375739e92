"""A soft prompt in transformers' Seq2SeqTrainer: python examples/loops/seq2seq_trainer.py OUT STEPS"""

import json
import sys

from transformers import AutoTokenizer, DataCollatorForSeq2Seq, T5Config, T5ForConditionalGeneration
from transformers import Seq2SeqTrainer as Trainer
from transformers import Seq2SeqTrainingArguments as Arguments

from softprompt import PromptTuningConfig, get_peft_model
from softprompt.demo_data import TRAIN
from softprompt.embedded import PATH

out, steps = sys.argv[1], int(sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained(PATH)
shape = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": len(tokenizer)}
ends = {"pad_token_id": 0, "eos_token_id": tokenizer.eos_token_id, "decoder_start_token_id": 0}
base = T5ForConditionalGeneration(T5Config(**shape, **ends))  # untrained; any real encoder-decoder works
model = get_peft_model(base, PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=8))

lines = [json.loads(line) for line in TRAIN.read_text(encoding="utf-8").splitlines()[:64]]
rows = [
    {"input_ids": tokenizer(line["data"])["input_ids"], "labels": tokenizer(line["text"])["input_ids"][1:]}
    for line in lines
]
arguments = Arguments(
    output_dir=out, max_steps=steps, per_device_train_batch_size=4, per_device_eval_batch_size=4, learning_rate=0.3,
    label_smoothing_factor=0.1, predict_with_generate=True, generation_max_length=12, generation_num_beams=2,
    logging_steps=1, save_strategy="no", report_to=[],
)  # fmt: skip
collator = DataCollatorForSeq2Seq(tokenizer, model=model)
trainer = Trainer(model, arguments, collator, train_dataset=rows[8:], processing_class=tokenizer)
trainer.train()
written = trainer.predict(rows[:8]).predictions  # token ids of the decoder alone, nothing of the prompt
print(tokenizer.batch_decode(written, skip_special_tokens=True))
model.save_pretrained(f"{out}/prompt")
