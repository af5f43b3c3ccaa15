"""Post-training quantization through ModelOpt: calibration yields scales, never a second model."""
