"""Commands for a trained model: generate, score, convert."""
