"""PPO, SFT, DPO and self-distillation under the same recipe."""
