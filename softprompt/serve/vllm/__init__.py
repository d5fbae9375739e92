"""Prompts served by an unmodified vLLM: a KV connector and an endpoint plugin."""
