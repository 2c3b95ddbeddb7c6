"""What a run will take, before any weight is read: parameters, bytes, memory, disk and time."""
