"""Room: calibration, device and model become the cost table. Import its modules; this door loads none."""
