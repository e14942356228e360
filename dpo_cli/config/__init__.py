"""Settings: what there is (`settings`), in bundles (`presets`), and where each value comes from (`resolve`)."""
