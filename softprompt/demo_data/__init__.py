"""The demo's data-to-text set: small-town cards and plain sentences about them (scripts/make_demo_data.py).

`TRAIN` has one text per card; `HELD_OUT` lists every wording of each card as references, and each of its cards joins
two values that no training card joins. Our own words, Apache-2.0.
"""

from pathlib import Path

TRAIN = Path(__file__).parent / "train.jsonl"
HELD_OUT = Path(__file__).parent / "heldout.jsonl"
TEMPLATE = "{data} => {text}"
