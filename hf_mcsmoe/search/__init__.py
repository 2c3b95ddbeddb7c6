"""The search for a size: what each choice would cost, and which choices are the best for the bytes there are."""
