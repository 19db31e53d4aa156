"""The main job: train every architecture at one budget, and tune learning rates."""
