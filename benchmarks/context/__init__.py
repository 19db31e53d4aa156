"""Speed and memory against context length."""
