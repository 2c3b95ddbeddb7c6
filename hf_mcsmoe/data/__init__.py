"""From text, tables and tasks to batches."""
