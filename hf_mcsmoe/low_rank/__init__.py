"""MC-SMoE: weights as low rank + structured sparse."""
