"""The recurrence of the LSTM (Hochreiter & Schmidhuber 1997; forget gate: Gers et al. 2000)."""
