"""One decode step of Mamba-2 after its input projection: the short convolution and the state, in one pass."""
