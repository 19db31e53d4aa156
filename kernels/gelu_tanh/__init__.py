"""The activation of GPT-2: GELU in its approximation by tanh."""
