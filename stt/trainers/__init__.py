"""Training loops. There is one: transformers.Trainer."""
