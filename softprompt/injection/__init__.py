"""The ways into a frozen model: vectors enter its input (`embedding`, `encoder`, `decoder`), keys and values a layer.

`attention` reaches layers through transformers' attention interface, `cache` those of models that attend otherwise.
"""
