"""The short causal depthwise convolution in front of a state space model (H3, arXiv:2212.14052; Mamba)."""
