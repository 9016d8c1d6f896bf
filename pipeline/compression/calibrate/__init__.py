"""Calibration on pictures: compensation, repair, synthetic pictures, and the prediction of accuracy."""
