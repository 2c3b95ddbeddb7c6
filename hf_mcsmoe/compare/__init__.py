"""Methods compared: each at several sizes, on the same calibration text, judged on the same rows."""
