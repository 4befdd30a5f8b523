"""torch's own scaled matrix product on Intel GPUs: `xpu.scaled-mm`."""
