"""The language-model head and its loss as one operation, so that the logits never exist whole."""
