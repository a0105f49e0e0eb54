"""What tokenizer.json may hold."""
