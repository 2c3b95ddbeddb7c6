"""The methods of every stage: pure functions of tensors."""
