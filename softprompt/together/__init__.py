"""What several prompts do together: compared, composed, asked in one batch; one prompt with several tasks."""
