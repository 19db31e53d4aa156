"""What one does with a trained model: generate, score, convert."""
