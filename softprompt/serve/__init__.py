"""A server for many prompts before one base model, with the OpenAI API. `softprompt serve BASE --prompts DIR`."""
