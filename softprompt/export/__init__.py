"""Prompts for engines that are not ours and know nothing of us: one module per engine, each with a parity test."""
