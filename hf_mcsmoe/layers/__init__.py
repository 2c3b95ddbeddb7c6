"""Where each architecture keeps its experts; nothing else knows."""
