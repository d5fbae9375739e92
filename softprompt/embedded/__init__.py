"""The small language model that ships with the package, for tests, examples and first steps without a download.

``PATH`` is an ordinary Hugging Face folder: pass it to ``AutoModelForCausalLM.from_pretrained`` and
``AutoTokenizer.from_pretrained``. ``README.md`` beside it is the model card.
"""

from pathlib import Path

PATH: Path = Path(__file__).resolve().parent
