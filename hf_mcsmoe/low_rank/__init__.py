"""MC-SMoE: experts as low rank + structured sparse."""
