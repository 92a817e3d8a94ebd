"""Documents, and how they become token ids. Calibration, uptraining and evaluation share it."""
