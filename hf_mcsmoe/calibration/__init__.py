"""The pass over calibration data, and what it gathers."""
